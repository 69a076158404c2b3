"""Bytes that clients send and receive: exact integers from shapes, on the host.

Axes: M clients of a round's cohort, C clients in all.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from hfedmoe_jax.models import Params, tree_bytes

if TYPE_CHECKING:
    from hfedmoe_jax.algorithms.method import Method

Bytes = Int[np.ndarray, " members"]


class Traffic(NamedTuple):
    """Functions of the clients' numbers, int [M]; each returns int64 [M].

    Attributes:
      up: (experts sent [M], clients) -> bytes of an update.
      down: (missed [M], clients) -> bytes that a client receives before it trains.
      terms: (experts sent [M], clients) -> bytes of an update that the server sends on as they are. Every
        client has `missed` them until it takes part again.
    """

    up: Callable[[Bytes, Bytes], Bytes]
    down: Callable[[Bytes, Bytes], Bytes]
    terms: Callable[[Bytes, Bytes], Bytes]


NO_TRAFFIC = Traffic(*[lambda count, clients: np.zeros(len(clients), np.int64)] * 3)
"""Of clients that keep models of their own."""


def one_expert(all_experts: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an expert's part of an array [L, E, ...]."""
    return jax.ShapeDtypeStruct(all_experts.shape[2:], all_experts.dtype)


def traffic_of(
    method: "Method", shapes: Params, budget: Int[np.ndarray, " clients"], all_experts: int
) -> Traffic:
    """Returns the traffic of a method.

    Args:
      shapes: of the parameters.
      budget: int [C], experts that each client can train.
      all_experts: of all layers.
    """
    budgets, kind = np.unique(budget, return_inverse=True)
    parts = [method.part(shapes, np.asarray(np.float32(each) / np.float32(all_experts))) for each in budgets]
    sent_on = [method.terms(part) for part in parts]
    extra = tree_bytes(jax.eval_shape(method.extra, shapes))

    def sent(tree: Any) -> int:
        return sum(map(method.tensor_bytes, jax.tree.leaves(tree)))

    def by_client(count: Callable[[Params], int], trees: list[Params]) -> Bytes:
        return np.array([count(tree) for tree in trees], np.int64)[kind]

    def counted(trees: list[Params]) -> Callable[[Bytes, Bytes], Bytes]:
        rest = by_client(lambda tree: sent((tree.router, tree.shared)), trees)
        expert = by_client(lambda tree: sent(jax.tree.map(one_expert, tree.experts)), trees)
        return lambda sent, clients: rest[clients] + np.asarray(sent, np.int64) * expert[clients]

    model = by_client(tree_bytes, parts) - by_client(tree_bytes, sent_on)
    stacks = any(map(jax.tree.leaves, sent_on))

    def down(missed: Bytes, clients: Bytes) -> Bytes:
        return model[clients] + (np.minimum(missed, extra) if stacks else extra)

    return Traffic(counted(parts), down, counted(sent_on))
