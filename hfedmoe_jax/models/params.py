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


TRAINED = {
    "all": "",
    "experts": r"(?!)",
    "experts_router_head": r"(^|/)(router|head)/",
    "lora": r"(^|/)(router|head)/|/lora_[ab]$",
}
"""Regular expressions by the names that `model.train` may have; `head` is a classifier's, drawn at random."""


def split_params(variables: dict, train: str = "all") -> tuple[Params, dict]:
    """Groups the parameters of a Flax module: `experts` of its own, modules `router`, and the rest.

    Args:
      variables: nested dict; `experts` at its top, a tree of [L, E, ...].
      train: a name of `TRAINED`, or a regular expression. Besides the experts, parameters whose path
        ("blocks/attention/query/kernel") it is found in are trained; nobody trains, sends or aggregates
        the others.

    Returns:
      The trainable parameters, and the frozen ones as a nested dict.

    Raises:
      InputError: an expression that is none, or that is found nowhere.
    """
    leaves = traverse_util.flatten_dict({name: tree for name, tree in variables.items() if name != "experts"})
    trained = trained_paths(list(leaves), train)
    groups: dict[str, dict] = {"router": {}, "shared": {}, "frozen": {}}
    for path, leaf in leaves.items():
        group = "frozen" if path not in trained else "router" if "router" in path else "shared"
        groups[group][path] = leaf
    router, shared, kept = (traverse_util.unflatten_dict(group) for group in groups.values())
    return Params(variables["experts"], router, shared), kept


def trained_paths(paths: list[tuple[str, ...]], train: str) -> set[tuple[str, ...]]:
    """Returns the paths that are trained (see `split_params`)."""
    try:
        pattern = re.compile(TRAINED.get(train, train))
    except re.error as error:
        raise InputError("model.train", train, f"is no regular expression: {error}", "mend it") from None
    found = {path for path in paths if pattern.search("/".join(path))}
    if not found and train not in TRAINED:
        known = ", ".join("/".join(path) for path in paths[:3])
        remedy = f"use one of {', '.join(TRAINED)}, or an expression of paths such as {known}"
        raise InputError("model.train", train, "is found in no parameter's path", remedy)
    return found


def merge_params(*trees: dict) -> dict:
    """Returns one nested dict of several that share no path."""
    leaves = {}
    for tree in trees:
        leaves.update(traverse_util.flatten_dict(tree))
    return traverse_util.unflatten_dict(leaves)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays (or shapes with dtype) of a tree; two integers of 4 bits share one."""

    def num_bytes(leaf: Any) -> int:
        return -(-leaf.size // 2) if leaf.dtype.name == "uint4" else leaf.size * leaf.dtype.itemsize

    return sum(map(num_bytes, jax.tree.leaves(tree)))


def params_specs(params: Params) -> Params:
    """Returns how parameters lie on a mesh: experts [L, E, ...] spread, the rest everywhere."""
    return Params(
        jax.tree.map(lambda _: BY_EXPERT, params.experts),
        *jax.tree.map(lambda _: REPLICATED, (params.router, params.shared)),
    )


def frozen_specs(frozen: dict) -> dict:
    """Returns how frozen parameters lie on a mesh, by their names at the top: as `params_specs` has it."""
    return {name: BY_EXPERT if name == "experts" else REPLICATED for name in frozen}
