"""A BERT of a few units with random weights, as a directory that `model.source` can name."""

import json
import pathlib
import sys

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from hfedmoe_jax.models.tensor_files import NewTensor, write_tensors
from hfedmoe_jax.pretrained import PACKAGED

PARITY = pathlib.Path(__file__).parent / "parity"
sys.path.append(str(PARITY))
from parity_results import load  # noqa: E402
from parity_weights import draw  # noqa: E402

EXPECTED = load(PARITY / "bert.npz")
SHAPES = EXPECTED["shapes"]
CONFIG = EXPECTED["config"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqr", *(f"##{x}" for x in "abcdefghijklmnopqr")]


def write_bert(directory: pathlib.Path, prefix: str = "", **fields) -> pathlib.Path:
    """Writes config, weights and tokenizer.

    Args:
      prefix: of the tensors' names.
      fields: of config.json, in place of the usual ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {prefix + name: draw(name, shape) for name, shape in SHAPES.items()}
    positions = np.arange(CONFIG["max_position_embeddings"])[None]  # as older checkpoints have them
    arrays[f"{prefix}embeddings.position_ids"] = positions
    write_tensors(directory, {name: NewTensor(a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()})
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: pathlib.Path, words: list[str] = WORDS) -> None:
    """Writes a WordPiece tokenizer that puts [CLS] and [SEP] around a text, and pads and cuts by itself."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    other = normalizers.Replace(Regex(r"[^a-r\s]"), "e")  # so that no text is unknown
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(), other])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(words[:4])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(directory / "tokenizer.json"))


def install_as_minilm(monkeypatch, directory: pathlib.Path) -> None:
    """Puts a package with a tiny BERT where `model.source=minilm` finds it, before an installed one."""
    package = directory / PACKAGED["minilm"].module
    write_bert(package / PACKAGED["minilm"].path)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(directory)
