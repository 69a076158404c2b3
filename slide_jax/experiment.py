"""Monte Carlo: how many users each method serves over thousands of drops, in one program.

Every point of a sweep sees the same drops (common random numbers), so that differences are the sweep's and
the methods', not the draw's.

Axes: G points of a sweep, D drops, K users.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from slide_jax import baselines
from slide_jax.errors import InputError, unknown_name
from slide_jax.exact import decide, run
from slide_jax.hull import Hull, convex_hull
from slide_jax.problem import Allocation, Catalogue, Problem
from slide_jax.provisioning import outcome
from slide_jax.relaxed import decide as decide_relaxed
from slide_jax.sampling import Setting, sample_problem


class Drop(NamedTuple):
    """One drop as the methods see it.

    Attributes:
      problem, hull: under SLIDE.
      collapsed, collapsed_hull: the same under DAI, each model one layer.
      key: for methods that draw.
    """

    problem: Problem
    hull: Hull
    collapsed: Problem
    collapsed_hull: Hull
    key: jax.Array


METHODS: dict[str, Callable[[Drop], Allocation]] = {
    "exact": lambda drop: decide(drop.hull, drop.problem),
    "relaxed": lambda drop: decide_relaxed(drop.hull, drop.problem),
    "dai": lambda drop: decide(drop.collapsed_hull, drop.collapsed),
    "equal_share": lambda drop: baselines.decide_equal_share(drop.hull, drop.problem),
    "proportional_share": lambda drop: baselines.decide_proportional_share(drop.hull, drop.problem),
    "best_channel_first": lambda drop: baselines.decide_best_channel_first(drop.hull, drop.problem),
    "earliest_deadline_first": lambda drop: baselines.decide_earliest_deadline_first(drop.hull, drop.problem),
    "random_order": lambda drop: baselines.decide_random_order(drop.hull, drop.problem, key=drop.key),
}
"""Solvers as pure functions of a drop."""


class Sweep(NamedTuple):
    """What the methods did at every point and drop.

    Attributes:
      served: users served, by method.
      saved: latency that SLIDE saves the users that DAI serves, at the spectrum and clocks of DAI, as a
        share of the sum of their latencies; nan where DAI serves nobody.
      rho: compute over download of those users, mean.
    """

    served: Mapping[str, Int[Array, "G D"]]
    saved: Float[Array, "G D"]
    rho: Float[Array, "G D"]


class Latencies(NamedTuple):
    """The users that DAI serves, at its spectrum and clocks, under DAI and under SLIDE; nan for the others.

    Attributes:
      dai_s, slide_s: latency from the start [s].
      rho: compute over download under DAI.
    """

    dai_s: Float[Array, "*D K"]
    slide_s: Float[Array, "*D K"]
    rho: Float[Array, "*D K"]


def run_sweep(
    settings: Sequence[Setting],
    catalogue: Catalogue,
    drops: int,
    seed: int,
    methods: Sequence[str] = ("exact", "dai"),
    rate_model: str = "linear",
    count: int | None = None,
) -> Sweep:
    """Returns what the methods do at each setting, as NumPy arrays.

    Args:
      settings: the points.
      catalogue: the models.
      drops: D.
      seed: of the draws.
      methods: names from `METHODS`.
      rate_model: `linear` or `shannon`.
      count: users drawn at every point, at least those that ask at any; None: as many. Calls with
        the same share one program.

    Raises:
      InputError: an unknown method, or fewer users drawn than ask.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown_name("methods", method, METHODS)
    most = max(int(setting.users) for setting in settings)
    count = most if count is None else count
    if count < most:
        raise InputError("count", count, f"{most} users ask", "draw at least as many")
    with jax.enable_x64(True):
        points = jax.tree.map(lambda *values: jnp.asarray(values, jnp.float64), *settings)
        keys = jax.random.split(jax.random.key(seed), drops)
        arrays = (catalogue, *_hulls(catalogue))
        # The functions and not their names, so that a method defined anew is compiled anew.
        chosen = tuple((method, METHODS[method]) for method in methods)
        result = _sweep(points, keys, *arrays, count, chosen, rate_model)
        return jax.tree.map(np.asarray, result)


def sample_latencies(
    setting: Setting, catalogue: Catalogue, drops: int, seed: int, rate_model: str = "linear"
) -> Latencies:
    """Returns DAI against SLIDE for the users of many drops, as NumPy arrays [D, K]."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), drops)
        arrays = (catalogue, *_hulls(catalogue))
        return jax.tree.map(np.asarray, _latencies(setting, keys, *arrays, int(setting.users), rate_model))


def compare_latencies(problem: Problem, dai: Allocation) -> Latencies:
    """Returns DAI against SLIDE for the users of a problem, as NumPy arrays [K].

    Args:
      problem: under SLIDE.
      dai: an allocation of `baselines.dai`.
    """
    return run(_compare, problem, dai)


def _hulls(catalogue: Catalogue) -> tuple[Hull, Catalogue, Hull]:
    collapsed = baselines.collapse(catalogue)
    return (
        convex_hull(catalogue.layer_bits, catalogue.layer_flop),
        collapsed,
        convex_hull(collapsed.layer_bits, collapsed.layer_flop),
    )


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _sweep(points, keys, catalogue, hull, collapsed, collapsed_hull, count, methods, rate_model):
    def of_drop(setting, key):
        drop = _draw(key, setting, catalogue, hull, collapsed, collapsed_hull, count, rate_model)
        served = {name: jnp.sum(method(drop).served) for name, method in methods}
        dai_s, slide_s, rho = _compare(hull, drop.problem, decide(collapsed_hull, drop.collapsed))
        total_dai = jnp.nansum(dai_s)
        saved = jnp.where(total_dai > 0, 1 - jnp.nansum(slide_s) / total_dai, jnp.nan)
        return Sweep(served, saved, jnp.nanmean(rho))

    return lax.map(lambda setting: jax.vmap(of_drop, (None, 0))(setting, keys), points)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _latencies(setting, keys, catalogue, hull, collapsed, collapsed_hull, count, rate_model):
    def of_drop(key):
        drop = _draw(key, setting, catalogue, hull, collapsed, collapsed_hull, count, rate_model)
        return _compare(hull, drop.problem, decide(collapsed_hull, drop.collapsed))

    return jax.vmap(of_drop)(keys)


def _draw(key, setting, catalogue, hull, collapsed, collapsed_hull, count, rate_model) -> Drop:
    key_problem, key_method = jax.random.split(key)
    problem = sample_problem(key_problem, setting, catalogue, count, rate_model)
    return Drop(problem, hull, dataclasses.replace(problem, catalogue=collapsed), collapsed_hull, key_method)


def _compare(hull: Hull, problem: Problem, dai: Allocation) -> Latencies:
    users = problem.users
    slide = outcome(hull, users, dai.model, dai.frequency_hz, dai.bandwidth_hz, problem.rate_model)
    speed = jnp.where(dai.model >= 0, dai.frequency_hz * users.flop_per_cycle, jnp.nan)
    computing = hull.total_flop[dai.model] / speed
    taking = dai.latency_s - users.start_s
    return Latencies(taking, slide.latency_s - users.start_s, computing / (taking - computing))
