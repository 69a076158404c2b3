"""Parameters in the three groups that a federated round treats differently.

Axes: L MoE layers, E experts.
"""

from typing import Any, NamedTuple

import jax
from flax import traverse_util


class Params(NamedTuple):
    """A mixture-of-experts model's parameters by how the server aggregates them.

    Attributes:
      experts: tree of arrays [L, E, ...]; only clients that trained an expert send it.
      router: tree of arrays [L, ...]; the gating networks.
      shared: everything else (embeddings, attention, norms, head).

    It also holds one value a group, as in the weights of an aggregation.
    """

    experts: Any
    router: Any
    shared: Any


def split_params(variables: dict) -> Params:
    """Groups a Flax parameter dict by path: under a module `experts`, under `router`, or shared."""
    groups: dict[str, dict] = {name: {} for name in Params._fields}
    for path, leaf in traverse_util.flatten_dict(variables).items():
        name = next((key for key in ("experts", "router") if key in path), "shared")
        groups[name][path] = leaf
    return Params(**{name: traverse_util.unflatten_dict(leaves) for name, leaves in groups.items()})


def merge_params(params: Params) -> dict:
    """Puts the groups back into one Flax parameter dict, the inverse of `split_params`."""
    leaves = {}
    for group in params:
        leaves.update(traverse_util.flatten_dict(group))
    return traverse_util.unflatten_dict(leaves)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays (or shapes with dtype) of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
