"""Computes with transformers what test_decoder.py expects; `make test-parity` runs it.

    python tests/parity/make_decoders.py            # writes tests/parity/decoders.npz

Weights are drawn by the names of their tensors (`parity_weights`), so the file holds results alone, of
gradients a sketch (`parity_results`).
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from parity_results import save, sketch
from parity_weights import draw

COMMON = dict(
    vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
LATENT = COMMON | dict(
    num_key_value_heads=4, intermediate_size=20, moe_intermediate_size=6, n_routed_experts=8,
    num_experts_per_tok=3, n_shared_experts=2, first_k_dense_replace=1, num_hidden_layers=3, kv_lora_rank=8,
    q_lora_rank=None, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=32,
    beta_slow=1, mscale=0.707, mscale_all_dim=0.707,
)  # fmt: skip
GROUPS = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.5)
SPARSE = COMMON | dict(intermediate_size=12, num_experts=4, num_experts_per_tok=2)
QWEN = SPARSE | dict(intermediate_size=20, moe_intermediate_size=6)
CASES = {
    "mixtral": ("Mixtral", COMMON | dict(intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": ("Olmoe", SPARSE | dict(clip_qkv=0.5)),
    "olmoe_renormalised": ("Olmoe", SPARSE | dict(norm_topk_prob=True)),
    "qwen2_moe": ("Qwen2Moe", QWEN | dict(shared_expert_intermediate_size=10)),
    "qwen2_moe_renormalised": (
        "Qwen2Moe", QWEN | dict(shared_expert_intermediate_size=10, norm_topk_prob=True),
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN | dict(head_dim=6, norm_topk_prob=True)),
    "qwen3_moe_plain": ("Qwen3Moe", QWEN | dict(head_dim=6, norm_topk_prob=False)),
    "deepseek_v2_lite": ("DeepseekV2", LATENT | dict(rope_parameters=YARN)),
    "deepseek_v2": ("DeepseekV2", LATENT | dict(q_lora_rank=7) | GROUPS),
    "llama": ("Llama", COMMON | dict(intermediate_size=20, tie_word_embeddings=True)),
}  # fmt: skip
DEEPSEEK = COMMON | dict(
    intermediate_size=20, moe_intermediate_size=6, n_routed_experts=8, num_experts_per_tok=3,
    n_shared_experts=2, first_k_dense_replace=1, norm_topk_prob=False, rms_norm_eps=1e-6,
)  # fmt: skip
GRADIENTS = ("embed_tokens", "1.mlp.gate.", "1.mlp.experts.down", "1.mlp.shared_expert_gate", "1.self_attn.q")
"""Parts of the names of tensors whose gradients are kept."""


Built = tuple[torch.nn.Module, dict, dict]
"""A model, its config.json and the shapes of its tensors as published."""


def build(kind: str, fields: dict) -> Built:
    """Returns a decoder of transformers, read from a checkpoint."""
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._experts_implementation = "eager"  # the others want sizes in multiples of 16 bytes
    factory = getattr(transformers, f"{kind}ForCausalLM")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        factory(config).save_pretrained(folder)
        shapes = {name: list(array.shape) for name, array in sorted(load_file(path).items())}
        save_file({name: draw(name, shape) for name, shape in shapes.items()}, path, {"format": "pt"})
        model = factory.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        stored = json.loads(pathlib.Path(folder, "config.json").read_text())
    return model, stored, shapes


def build_deepseek(fields: dict) -> Built:
    """Returns a DeepSeekMoE (arXiv 2401.06066): a Llama, most networks DeepSeek-V2's mixtures."""
    first = fields["first_k_dense_replace"]
    mixture = transformers.DeepseekV2Config(**fields, topk_method="greedy", routed_scaling_factor=1.0)
    mixture._experts_implementation = "eager"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    for layer in model.model.layers[first:]:
        layer.mlp = DeepseekV2Moe(mixture)
    shapes = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for published, part in parts_of(name, parameter):
                shapes[published] = list(part.shape)
                part.copy_(torch.from_numpy(draw(published, part.shape)))
    return model, fields | dict(model_type="deepseek", moe_layer_freq=1), shapes


def parts_of(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Returns the matrices of single experts in a parameter or its gradient, views by their names."""
    root, _, last = name.rpartition(".")
    if not root.endswith(".experts"):
        return [(name, tensor)]
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    return [
        (f"{root}.{expert}.{part}.weight", matrix)
        for expert, fused in enumerate(tensor)
        for part, matrix in zip(parts, fused.chunk(len(parts)), strict=True)
    ]


def expected(built: Built) -> dict[str, Any]:
    """Returns the results of a decoder, with its config and the shapes of its tensors."""
    model, stored, shapes = built
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, COMMON["vocab_size"], (3, 6))
    tokens[1, 4:], tokens[2, 2:] = 0, 0
    ids = torch.from_numpy(tokens)
    logits = model.eval()(ids, attention_mask=(ids != 0).long()).logits
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, COMMON["vocab_size"]), ids[:, 1:].reshape(-1), reduction="none"
    )
    real = (ids[:, 1:] != 0).reshape(-1).float()
    ((each * real).sum() / real.sum()).backward()
    results = {"config": stored, "shapes": shapes, "tokens": tokens}
    results["logits"] = (logits * (ids != 0)[..., None]).detach().numpy()
    for name, parameter in model.named_parameters():
        if any(part in name for part in GRADIENTS):
            single = stored["model_type"] == "deepseek"  # the others are held fused
            gradients = parts_of(name, parameter.grad) if single else [(name, parameter.grad)]
            results |= {f"gradient {part}": sketch(gradient.numpy()) for part, gradient in gradients}
    return results


def main() -> None:
    """Writes all cases."""
    cases = {name: build(kind, fields) for name, (kind, fields) in CASES.items()}
    cases["deepseek"] = build_deepseek(DEEPSEEK)
    found = {name: expected(built) for name, built in cases.items()}
    results = {f"{name}/{key}": value for name, each in found.items() for key, value in each.items()}
    save(pathlib.Path(__file__).with_name("decoders.npz"), results)
    print(f"{len(cases)} decoders by transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
