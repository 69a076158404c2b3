"""A weighted mean of what clients changed, as running sums: the server never holds copies of their models.

Axes: M clients of a chunk, L MoE layers, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

from hfedmoe_jax.aggregation.sums import (
    Fixed,
    add_rows,
    add_terms,
    fixed_zeros,
    from_fixed,
    merge_over_devices,
    settle,
    to_fixed,
)
from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.bank import ExpertRows
from hfedmoe_jax.models import Params


class RunningMean(NamedTuple):
    """Exact sums of a weighted mean of what clients changed (see `sums`).

    Attributes:
      total: like the parameters; sums of weight * (new - old).
      weight: sums of the weights: experts [L, E], router [] or [L, E], shared [].
      dominant: int32 [L, E], how many clients had the expert in their dominant set.
    """

    total: Params
    weight: Params
    dominant: Int[Array, "layers experts"]


class Scale(NamedTuple):
    """How weights and terms fit into exact sums.

    Attributes:
      unit: a power of two, so that scaling loses nothing, at most one over the largest weight.
      largest: terms are cut to it, see `sums.largest_term`; a model diverged long before.
    """

    unit: float
    largest: float


class Contribution(NamedTuple):
    """What one client adds to a running mean.

    Attributes:
      params, trained, token: as in `ClientUpdate`; or, by a transformed update, changes instead of
        parameters.
      weights: experts [L, E], router [] or [L, E] (a weight for each expert's row), shared []; a client that
        does not count has zeros.
      dominant: bool [L, E].
    """

    params: Params
    trained: ExpertRows
    token: Int[Array, " table_rows"] | None
    weights: Params
    dominant: Bool[Array, "layers experts"]


def widen(weight: AnyArray, like: AnyArray) -> AnyArray:
    """Appends axes so that a weight [L, E] multiplies a value [L, E, ...]."""
    return weight.reshape(weight.shape + (1,) * (like.ndim - weight.ndim))


def widen_rows(weight: AnyArray, like: AnyArray) -> AnyArray:
    """Inserts axes so that a weight [..., L, E], or one in all, multiplies a router's [..., L, D, E]."""
    missing = (1,) * (like.ndim - weight.ndim)
    if weight.ndim < 2:
        return weight.reshape(weight.shape + missing)
    return weight.reshape(*weight.shape[:-1], *missing, weight.shape[-1])


def mean_init(params: Params, router_rows: bool = False) -> RunningMean:
    """Returns empty sums for parameters (arrays or shapes).

    Args:
      router_rows: routers have a weight for each expert's row.
    """
    experts = jax.tree.leaves(params.experts)[0].shape[:2]
    weight = Params(fixed_zeros(experts), fixed_zeros(experts if router_rows else ()), fixed_zeros(()))
    dominant = jnp.zeros(experts, jnp.int32)
    return RunningMean(jax.tree.map(lambda x: fixed_zeros(x.shape), params), weight, dominant)


def mean_accumulate(
    mean: RunningMean, start: Params | None, clients: Contribution, scale: Scale, table: str | None
) -> RunningMean:
    """Adds clients, stacked on a leading axis M of at most `sums.MOST_TERMS` since the last `mean_settle`.

    A zero weight adds nothing, whatever the value (NaN included).

    Args:
      start: the parameters that the clients started from; None where `clients` hold changes.
      scale: of weights and terms.
      table: the name in `shared` of the table that clients hold rows of.
    """
    zeros = jax.tree.map(lambda total: jnp.float32(0), mean.total, is_leaf=is_fixed)
    origin = zeros if start is None else start
    weights = jax.tree.map(lambda w: jnp.minimum(w * scale.unit, scale.largest), clients.weights)

    def change(weight, new, old, widen=widen):
        weight = widen(weight, new)
        term = weight * (new.astype(jnp.float32) - old.astype(jnp.float32))
        return jnp.where(weight > 0, jnp.clip(term, -scale.largest, scale.largest), 0.0)

    def dense(total, new, old, weight, widen=widen):
        return add_terms(total, change(weight, new, old, widen))

    def by_row(total, new, old, weight, index):
        """Adds [M, rows, ...] at index [M, rows]; `weight` has the shape of `index`."""
        index = index.reshape(-1)
        new = new.reshape(-1, *new.shape[2:])
        old = old.at[index].get(mode="clip") if old.ndim else old
        return add_rows(total, index, change(weight.reshape(-1), new, old))

    expert_weight = weights.experts.reshape(weights.experts.shape[0], -1)
    trained = clients.trained

    def add_expert(total, new, old):
        old = old.reshape(-1, *old.shape[2:]) if old.ndim else old
        sums = Fixed(*(x.reshape(-1, *x.shape[2:]) for x in total))
        if new.shape[0] == 1:  # row by row, as many as there are: a CPU pays for what it touches
            sums = jax.lax.fori_loop(0, trained.count[0], lambda i, sums: add_one(sums, new, old, i), sums)
        else:
            weight = jnp.take_along_axis(expert_weight, trained.expert, axis=1, mode="fill", fill_value=0)
            rows = jax.vmap(lambda x, row: x[row])(new, trained.row)
            sums = by_row(sums, rows, old, weight, trained.expert)
        return Fixed(*(x.reshape(t.shape) for x, t in zip(sums, total, strict=True)))

    def add_one(sums, new, old, index):
        expert, row = trained.expert[0, index], trained.row[0, index]
        before = old[expert][None] if old.ndim else old
        term = change(expert_weight[0, expert][None], new[0, row][None], before)
        return Fixed(*(s.at[expert].add(x[0]) for s, x in zip(sums, to_fixed(term), strict=True)))

    def add_shared(path, total, new, old):
        if clients.token is not None and path[0].key == table:
            weight = jnp.broadcast_to(weights.shared[:, None], clients.token.shape)
            return by_row(total, new, old, weight, clients.token)
        return dense(total, new, old, weights.shared)

    total = Params(
        map_totals(add_expert, mean.total.experts, clients.params.experts, origin.experts),
        map_totals(
            lambda total, new, old: dense(total, new, old, weights.router, widen_rows),
            mean.total.router, clients.params.router, origin.router,
        ),
        map_totals(add_shared, mean.total.shared, clients.params.shared, origin.shared, with_path=True),
    )  # fmt: skip
    weight = Params(*(add_terms(total, w) for total, w in zip(mean.weight, weights, strict=True)))
    return RunningMean(total, weight, mean.dominant + jnp.sum(clients.dominant, axis=0, dtype=jnp.int32))


def is_fixed(node: Any) -> bool:
    """Says whether a node of a tree is a `Fixed`."""
    return isinstance(node, Fixed)


def map_totals(function: Callable, totals: Any, *trees: Any, with_path: bool = False) -> Any:
    """Maps over trees of arrays beside a tree of `Fixed`."""

    mapped = jax.tree_util.tree_map_with_path if with_path else jax.tree.map
    return mapped(function, totals, *trees, is_leaf=is_fixed)


def mean_settle(mean: RunningMean) -> RunningMean:
    """Makes room for `sums.MOST_TERMS` more clients a device."""
    return mean._replace(total=map_totals(settle, mean.total), weight=map_totals(settle, mean.weight))


def mean_merge(mean: RunningMean) -> RunningMean:
    """Adds sums over their leading axis, one place a device."""
    total, weight = (map_totals(merge_over_devices, tree) for tree in (mean.total, mean.weight))
    return RunningMean(total, weight, jnp.sum(mean.dominant, axis=0, dtype=jnp.int32))


def mean_finalize(mean: RunningMean, like: Params) -> Params:
    """Returns the mean change, zero where nothing was added (an expert nobody trained).

    Args:
      like: the parameters, for their shapes and types.
    """

    def divide(weight, widen=widen):
        weight = from_fixed(weight)

        def divide_leaf(total, leaf):
            w = widen(weight, leaf)
            total = from_fixed(total).reshape(leaf.shape)
            return jnp.where(w > 0, total / jnp.where(w > 0, w, 1.0), 0.0).astype(leaf.dtype)

        return divide_leaf

    weight, total = mean.weight, mean.total
    return Params(
        map_totals(divide(weight.experts), total.experts, like.experts),
        map_totals(divide(weight.router, widen_rows), total.router, like.router),
        map_totals(divide(weight.shared), total.shared, like.shared),
    )


def literal_gating(mean: RunningMean, router: Any, scale: Scale, union_size: ArrayLike) -> Any:
    """Returns sum_c alpha(c) G_c of (21) as printed, whose weights do not sum to one.

    Args:
      mean: merged sums; the routers' are weighted by `gating_weight`.
      router: the routers that the clients started from.
      scale: of the sums.
      union_size: |S_global|.
    """
    weight = from_fixed(mean.weight.router)

    def printed(total, old):
        return (from_fixed(total) + weight * old) / scale.unit / jnp.maximum(union_size, 1)

    return map_totals(printed, mean.total.router, router)
