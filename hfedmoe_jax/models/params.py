"""Parameters in the groups that a federated round treats differently.

Axes: L MoE layers, E experts.
"""

import re
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.mesh import BY_EXPERT, REPLICATED


class Params(NamedTuple):
    """What a client trains and sends, by how the server aggregates it.

    Attributes:
      experts: tree of arrays [L, E, ...]; only clients that trained an expert send it.
      router: tree of arrays [L, ..., E]; the gating networks, an expert's row in their last axis.
      shared: everything else (embeddings, attention, norms, head).

    It also holds one value a group, as in the weights of an aggregation.
    """

    experts: Any
    router: Any
    shared: Any


NO_PARAMS = Params((), (), ())
"""What is sent to clients that keep models of their own."""


def split_params(variables: dict, frozen: str = "") -> tuple[Params, dict]:
    """Groups the parameters of a Flax module: `experts` of its own, modules `router`, and the rest.

    Args:
      variables: nested dict; `experts` at its top, a tree of [L, E, ...].
      frozen: a regular expression; parameters whose path ("blocks/attention/query/kernel") it is found in
        are frozen: nobody trains, sends or aggregates them. Empty: none.

    Returns:
      The trainable parameters, and the frozen ones as a nested dict.

    Raises:
      InputError: an expression that is none, or that names experts, or nothing.
    """
    leaves = traverse_util.flatten_dict({name: tree for name, tree in variables.items() if name != "experts"})
    fixed = frozen_paths(list(leaves), frozen)
    groups: dict[str, dict] = {"router": {}, "shared": {}, "frozen": {}}
    for path, leaf in leaves.items():
        group = "frozen" if path in fixed else "router" if "router" in path else "shared"
        groups[group][path] = leaf
    router, shared, kept = (traverse_util.unflatten_dict(group) for group in groups.values())
    return Params(variables["experts"], router, shared), kept


def frozen_paths(paths: list[tuple[str, ...]], frozen: str) -> set[tuple[str, ...]]:
    """Returns the paths that the expression is found in (see `split_params`)."""
    if not frozen:
        return set()
    try:
        found = {path for path in paths if re.search(frozen, "/".join(path))}
    except re.error as error:
        raise InputError("model.frozen", frozen, f"is no regular expression: {error}", "mend it") from None
    if not found:
        known = ", ".join("/".join(path) for path in paths[:3])
        remedy = f"paths are such as {known}; experts are always trained"
        raise InputError("model.frozen", frozen, "is found in no parameter's path", remedy)
    return found


def merge_params(*trees: dict) -> dict:
    """Returns one nested dict of several that share no path."""
    leaves = {}
    for tree in trees:
        leaves.update(traverse_util.flatten_dict(tree))
    return traverse_util.unflatten_dict(leaves)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays (or shapes with dtype) of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def params_specs(params: Params) -> Params:
    """Returns how parameters lie on a mesh: experts [L, E, ...] spread, the rest everywhere."""
    return Params(
        jax.tree.map(lambda _: BY_EXPERT, params.experts),
        *jax.tree.map(lambda _: REPLICATED, (params.router, params.shared)),
    )
