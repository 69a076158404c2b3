"""Tiny Mixtral-like checkpoints with a byte tokenizer, as directories that `model.source` can name."""

import json
import pathlib
import sys

from tokenizers import Tokenizer, models, pre_tokenizers

from hfedmoe_jax.models.tensor_files import NewTensor, write_tensors
from hfedmoe_jax.pretrained import PACKAGED

PARITY = pathlib.Path(__file__).parent / "parity"
sys.path.append(str(PARITY))
from parity_results import load  # noqa: E402
from parity_weights import draw  # noqa: E402

EXPECTED = load(PARITY / "decoders.npz")
LETTERS = ["e", *"abcdfghijklmnopqrstuvw"]


def write_decoder(directory: pathlib.Path, case: str = "mixtral", **fields) -> pathlib.Path:
    """Writes config, weights and a tokenizer whose token 0 is a letter.

    Args:
      case: of tests/parity/make_decoders.py.
      fields: of config.json, in place of the usual ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shapes, config = (EXPECTED[f"{case}/{key}"] for key in ("shapes", "config"))
    arrays = {name: draw(name, shape) for name, shape in shapes.items()}
    write_tensors(directory, {name: NewTensor(a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()})
    (directory / "config.json").write_text(json.dumps(config | fields))
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def install_as_smollm2(monkeypatch, directory: pathlib.Path) -> None:
    """Puts a tiny Llama where `model.source=smollm2` finds one that was converted before."""
    _, path = PACKAGED["smollm2"]
    package = directory / PACKAGED["smollm2"].module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setenv("HFEDMOE_CACHE", str(directory / "cache"))
    write_decoder(
        directory / "cache" / "checkpoints" / pathlib.Path(path).stem, "llama", intermediate_size=24
    )
