"""How frozen parameters are kept: `model.base`.

int8 and nf4 (QLoRA, arXiv 2305.14314) are for the matrices of experts under adapters, quantised by Qwix: a
scale for each output, with nf4 for each `TILE` inputs of it. Other frozen matrices are then bfloat16, as with
`bfloat16`; norms and biases stay float32. Products read one expert at a time as floats.

Axes: L layers, E experts, D inputs, F outputs.
"""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import unknown_name

BASES = ("float32", "bfloat16", "int8", "nf4")
QUANTISED = ("int8", "nf4")
TILE = 64


def check_base(base: str, adapted: bool) -> None:
    """Raises InputError for an unknown base, one of matrices that are trained, or without Qwix."""
    if base not in BASES:
        raise unknown_name("model.base", base, list(BASES))
    if base != "float32" and not adapted:
        raise InputError("model.base", base, "is for frozen experts", "use model.train=lora, or float32")
    if base in QUANTISED and importlib.util.find_spec("qwix") is None:
        raise InputError("model.base", base, "the package qwix is not installed", "run `pip install qwix`")


def keep_frozen(frozen: dict, base: str) -> dict:
    """Returns frozen parameters as they are kept."""
    leaves = traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict({path: keep_leaf(path, x, base) for path, x in leaves.items()})


def keep_leaf(path: tuple[str, ...], leaf: Any, base: str) -> Any:
    """Returns one of them; experts [L, E, D, F] quantised are a `qwix.QArray`, a tree of [L, E, ...]."""
    is_expert = path[0] == "experts"
    if base == "float32" or leaf.ndim < 2 or path[-1] in ("scale", "bias") or (is_expert and leaf.ndim < 4):
        return leaf
    if not is_expert or base == "bfloat16":
        return leaf.astype(jnp.bfloat16)
    import qwix

    tiles = {2: math.gcd(TILE, leaf.shape[2])} if base == "nf4" else {}
    return qwix.quantize(leaf, base, channelwise_axes=(0, 1, 3), tiled_axes=tiles)


def as_floats(kept: Any) -> Any:
    """Returns a matrix that may be quantised as one of floats."""
    if not hasattr(kept, "qvalue"):
        return kept
    import qwix

    return qwix.dequantize(kept)


@jax.jit
def add_each(kept: dict, added: dict) -> dict:
    """Returns the sums of arrays by name, in the types of the first."""
    return jax.tree.map(lambda x, y: (x.astype(jnp.float32) + y).astype(x.dtype), kept, added)


def add_to_frozen(frozen: dict, added: dict | None) -> dict:
    """Returns frozen parameters with what is added to some of them, in the types that they are kept in.

    Args:
      frozen: as kept; those that are added to are not quantised.
      added: a tree of some of them, float32; None for nothing.
    """
    if added is None:
        return frozen
    leaves = traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(leaves | add_each(*addends(frozen, added)))


def addends(frozen: dict, added: dict) -> tuple[dict, dict]:
    """Returns the arguments of `add_each`, by path."""
    leaves, more = (traverse_util.flatten_dict(tree) for tree in (frozen, added))
    return {path: leaves[path] for path in more}, more
