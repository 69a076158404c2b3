"""Computes with transformers what test_decoder.py expects; `make test-parity` runs it.

    python tests/parity/make_decoders.py            # writes tests/parity/decoders.npz

Weights are drawn by the names of their tensors (`parity_weights`), so the file holds results alone.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
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
    "qwen3_moe": ("Qwen3Moe", QWEN | dict(head_dim=6, norm_topk_prob=True)),
    "deepseek_v2_lite": ("DeepseekV2", LATENT | dict(rope_parameters=YARN)),
    "deepseek_v2": ("DeepseekV2", LATENT | dict(q_lora_rank=7) | GROUPS),
    "llama": ("Llama", COMMON | dict(intermediate_size=20, tie_word_embeddings=True)),
}
GRADIENTS = ("embed_tokens", "1.mlp.gate.", "1.mlp.experts.down", "1.mlp.shared_expert_gate", "1.self_attn.q")
"""Parts of the names of tensors whose gradients are kept."""


def expected(kind: str, fields: dict) -> dict[str, np.ndarray]:
    """Returns the results of a decoder, with its config and the shapes of its tensors as JSON."""
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._experts_implementation = "eager"  # the others want sizes in multiples of 16 bytes
    factory = getattr(transformers, f"{kind}ForCausalLM")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        factory(config).save_pretrained(folder)
        shapes = {name: list(array.shape) for name, array in sorted(load_file(path).items())}
        save_file({name: draw(name, shape) for name, shape in shapes.items()}, path, {"format": "pt"})
        model = factory.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
        stored = json.loads(pathlib.Path(folder, "config.json").read_text())
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (3, 9))
    tokens[1, 6:], tokens[2, 2:] = 0, 0
    ids = torch.from_numpy(tokens)
    logits = model(ids, attention_mask=(ids != 0).long()).logits
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, config.vocab_size), ids[:, 1:].reshape(-1), reduction="none"
    )
    real = (ids[:, 1:] != 0).reshape(-1).float()
    ((each * real).sum() / real.sum()).backward()
    results = {"tokens": tokens.astype(np.int32), "logits": logits.detach().numpy()}
    results |= {
        f"gradient {name}": parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if any(part in name for part in GRADIENTS)
    }
    return results | {"config": np.array(json.dumps(stored)), "shapes": np.array(json.dumps(shapes))}


def main() -> None:
    """Writes all cases."""
    arrays = {}
    for name, (kind, fields) in CASES.items():
        arrays |= {f"{name}/{key}": value for key, value in expected(kind, fields).items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("decoders.npz"), **arrays)
    print(f"{len(CASES)} decoders by transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
