"""Computes with transformers what test_switch_t5.py expects; `make test-parity` runs it.

    python tests/parity/make_switch.py              # writes tests/parity/switch.npz

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

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from parity_results import save, sketch
from parity_weights import draw

COMMON = dict(
    vocab_size=32, d_model=16, d_kv=4, d_ff=12, num_heads=3, num_experts=4, num_layers=2,
    num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0,
)  # fmt: skip
CASES = {
    "roomy": COMMON,
    "dropping": COMMON | dict(expert_capacity=1),
    "uneven": COMMON
    | dict(num_layers=3, num_sparse_encoder_layers=1, num_decoder_layers=1, router_bias=True),
}  # fmt: skip
GRADIENTS = ("shared", "relative", "mlp.router", "expert_2.wo", "EncDecAttention.v")
"""Parts of the names of tensors whose gradients are kept."""


def expected(fields: dict) -> dict[str, Any]:
    """Returns the results of a model, with its config and the shapes of its tensors."""
    config = transformers.SwitchTransformersConfig(**fields)
    factory = transformers.SwitchTransformersForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        factory(config).save_pretrained(folder)
        shapes = {name: list(array.shape) for name, array in sorted(load_file(path).items())}
        save_file({name: draw(name, shape) for name, shape in shapes.items()}, path, {"format": "pt"})
        model = factory.from_pretrained(folder, dtype=torch.float32).eval()
        stored = json.loads(pathlib.Path(folder, "config.json").read_text())
    rng = np.random.default_rng(0)
    tokens, answers = (rng.integers(1, config.vocab_size, (3, length)) for length in (12, 5))
    tokens[1, 7:], tokens[2, 2:], answers[0, 3:], answers[2, 1:] = 0, 0, 0, 0
    ids, labels = torch.from_numpy(tokens), torch.from_numpy(answers)
    out = model(ids, attention_mask=(ids != 0).long(), labels=torch.where(labels != 0, labels, -100))
    out.loss.backward()
    results = {
        "config": stored, "shapes": shapes, "tokens": tokens, "answers": answers,
        "logits": (out.logits * (labels != 0)[..., None]).detach().numpy(), "loss": out.loss.detach().numpy(),
    }  # fmt: skip
    return results | {
        f"gradient {name}": sketch(parameter.grad.numpy())
        for name, parameter in model.named_parameters()
        if any(part in name for part in GRADIENTS) and parameter.grad is not None
    }


def main() -> None:
    """Writes all cases."""
    results = {}
    for name, fields in CASES.items():
        results |= {f"{name}/{key}": value for key, value in expected(fields).items()}
    save(pathlib.Path(__file__).with_name("switch.npz"), results)
    print(f"{len(CASES)} Switches by transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
