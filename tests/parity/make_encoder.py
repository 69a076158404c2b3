"""Computes with transformers what test_encoder.py expects; `make test-parity` runs it.

python tests/parity/make_encoder.py            # writes tests/parity/bert.npz
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
from parity_results import save, sketch
from parity_weights import draw

FIELDS = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
    max_position_embeddings=20,
)  # fmt: skip
GRADIENTS = ("embeddings", "layer.0", "layer.2.output.dense.weight")
"""Parts of the names of tensors whose gradients are kept."""


def main() -> None:
    """Writes tokens, hidden states, gradients, the config and the shapes of the tensors."""
    config = transformers.BertConfig(**FIELDS)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        transformers.BertModel(config).save_pretrained(folder)
        shapes = {name: list(array.shape) for name, array in sorted(load_file(path).items())}
        save_file({name: draw(name, shape) for name, shape in shapes.items()}, path, {"format": "pt"})
        model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
        stored = json.loads(pathlib.Path(folder, "config.json").read_text())
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (3, 9))
    tokens[1, 6:], tokens[2, 2:] = 0, 0
    ids = torch.from_numpy(tokens)
    hidden = model(ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.sum(hidden[ids != 0] * torch.from_numpy(draw("loss", (config.hidden_size,)))).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    results = {
        f"gradient {name}": sketch(gradient.numpy())
        for name, gradient in gradients.items()
        if any(part in name for part in GRADIENTS) and "key.bias" not in name  # which is 0
    }  # fmt: skip
    results |= {"config": stored, "shapes": shapes, "tokens": tokens, "hidden": hidden.detach().numpy()}
    save(pathlib.Path(__file__).with_name("bert.npz"), results)
    print(f"BERT by transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
