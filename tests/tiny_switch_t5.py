"""Tiny Switch Transformers with a Unigram tokenizer, as directories that `model.source` can name."""

import json
import pathlib
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hfedmoe_jax.models.tensor_files import NewTensor, write_tensors

PARITY = pathlib.Path(__file__).parent / "parity"
sys.path.append(str(PARITY))
from parity_results import load  # noqa: E402
from parity_weights import draw  # noqa: E402

EXPECTED = load(PARITY / "switch.npz")
PIECES = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]


def write_switch_t5(directory: pathlib.Path, case: str = "roomy", **fields) -> pathlib.Path:
    """Writes config, weights and a tokenizer of letters that closes a text with </s>.

    Args:
      case: of tests/parity/make_switch.py.
      fields: of config.json, in place of the usual ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {name: draw(name, shape) for name, shape in EXPECTED[f"{case}/shapes"].items()}
    write_tensors(directory, {name: NewTensor(a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()})
    (directory / "config.json").write_text(json.dumps(EXPECTED[f"{case}/config"] | fields))
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(PIECES[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
