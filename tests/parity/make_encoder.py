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
from parity_weights import draw

FIELDS = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
    max_position_embeddings=20,
)  # fmt: skip


def main() -> None:
    """Writes tokens, hidden states, the config and the shapes of the tensors."""
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
    np.savez_compressed(
        pathlib.Path(__file__).with_name("bert.npz"),
        tokens=tokens.astype(np.int32), hidden=hidden.detach().numpy(),
        config=np.array(json.dumps(stored)), shapes=np.array(json.dumps(shapes)),
    )  # fmt: skip
    print(f"BERT by transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
