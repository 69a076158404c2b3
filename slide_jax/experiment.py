"""Monte Carlo: how many users each solver serves over thousands of drops, in one compiled program.

A drop is one random draw of the users, their channels and devices. Every point of a sweep sees the same drops
(common random numbers), so that points and solvers can be compared without the noise of the draw.

Axes: G points of a sweep, D drops, K users.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from slide_jax import baselines
from slide_jax.errors import InputError, unknown_name
from slide_jax.exact import decide_exact
from slide_jax.float64 import compute_in_float64
from slide_jax.hull import Hull, convex_hull
from slide_jax.problem import Allocation, Catalogue, Problem
from slide_jax.provisioning import outcome
from slide_jax.sampling import Setting, sample_problem
from slide_jax.solvers import SOLVERS, Solver, sweep_solvers


class Drop(NamedTuple):
    """One random draw of the users, under both conventions.

    Attributes:
      problem, hull: under SLIDE.
      dai_problem, dai_hull: the same users under download-then-infer (DAI), each model one layer.
      key: for solvers that draw at random.
    """

    problem: Problem
    hull: Hull
    dai_problem: Problem
    dai_hull: Hull
    key: jax.Array


class Sweep(NamedTuple):
    """Results at every point of a sweep and in every drop.

    Attributes:
      served: users served, by solver.
      saved: latency that SLIDE saves the users that DAI serves, at the spectrum and clocks of DAI, as a
        share of the sum of their latencies; nan where DAI serves nobody.
      rho: mean ratio of compute time to download time of those users.
    """

    served: Mapping[str, Int[Array, "G D"]]
    saved: Float[Array, "G D"]
    rho: Float[Array, "G D"]


class Latencies(NamedTuple):
    """Latencies of the users that DAI serves, with the bandwidths and clocks of DAI; nan for the others.

    Attributes:
      dai_s, slide_s: under DAI and under SLIDE, from the user's start [s].
      rho: compute time over download time under DAI.
    """

    dai_s: Float[Array, "*D K"]
    slide_s: Float[Array, "*D K"]
    rho: Float[Array, "*D K"]


def run_sweep(
    settings: Sequence[Setting],
    catalogue: Catalogue,
    drops: int,
    seed: int,
    solvers: Sequence[str] = ("exact", "dai"),
    rate_model: str = "linear",
    count: int | None = None,
) -> Sweep:
    """Returns how many users the solvers serve at each setting, as NumPy arrays.

    Args:
      settings: the points.
      catalogue: the models.
      drops: D.
      seed: of the draws.
      solvers: names from `SOLVERS`, of those in `sweep_solvers()`.
      rate_model: `linear` or `shannon`.
      count: users drawn at every point, at least those that ask at any; None: as many. Calls with
        the same share one program.

    Raises:
      InputError: a solver that is unknown or cannot be swept, or fewer users drawn than ask.
    """
    for name in solvers:
        if name not in sweep_solvers():
            raise unknown_name("solvers", name, sweep_solvers())
    most = max(int(setting.users) for setting in settings)
    count = most if count is None else count
    if count < most:
        raise InputError("count", count, f"{most} users ask", "draw at least as many")
    with jax.enable_x64(True):
        points = jax.tree.map(lambda *values: jnp.asarray(values, jnp.float64), *settings)
        keys = jax.random.split(jax.random.key(seed), drops)
        arrays = (catalogue, *_hulls(catalogue))
        # The entries and not their names are static, so that a solver that is redefined is compiled again.
        chosen = tuple((name, SOLVERS[name]) for name in solvers)
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
    return compute_in_float64(_compare, problem, dai)


def _hulls(catalogue: Catalogue) -> tuple[Hull, Catalogue, Hull]:
    collapsed = baselines.collapse(catalogue)
    return (
        convex_hull(catalogue.layer_bits, catalogue.layer_flop),
        collapsed,
        convex_hull(collapsed.layer_bits, collapsed.layer_flop),
    )


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _sweep(points, keys, catalogue, hull, collapsed, collapsed_hull, count, solvers, rate_model):
    def of_drop(setting, key):
        drop = _draw(key, setting, catalogue, hull, collapsed, collapsed_hull, count, rate_model)
        served = {name: jnp.sum(decide_drop(solver, drop).served) for name, solver in solvers}
        dai_s, slide_s, rho = _compare(hull, drop.problem, decide_exact(drop.dai_hull, drop.dai_problem))
        total_dai = jnp.nansum(dai_s)
        saved = jnp.where(total_dai > 0, 1 - jnp.nansum(slide_s) / total_dai, jnp.nan)
        return Sweep(served, saved, jnp.nanmean(rho))

    return lax.map(lambda setting: jax.vmap(of_drop, (None, 0))(setting, keys), points)


def decide_drop(solver: Solver, drop: Drop) -> Allocation:
    """Returns a solver's allocation of one drop, by its pure function."""
    hull, problem = (drop.dai_hull, drop.dai_problem) if solver.download_first else (drop.hull, drop.problem)
    assert solver.decide is not None  # as of all `sweep_solvers`
    return solver.decide(hull, problem, *((drop.key,) if solver.needs_key else ()))


@functools.partial(jax.jit, static_argnums=(6, 7))
def _latencies(setting, keys, catalogue, hull, collapsed, collapsed_hull, count, rate_model):
    def of_drop(key):
        drop = _draw(key, setting, catalogue, hull, collapsed, collapsed_hull, count, rate_model)
        return _compare(hull, drop.problem, decide_exact(drop.dai_hull, drop.dai_problem))

    return jax.vmap(of_drop)(keys)


def _draw(key, setting, catalogue, hull, collapsed, collapsed_hull, count, rate_model) -> Drop:
    key_problem, key_solver = jax.random.split(key)
    problem = sample_problem(key_problem, setting, catalogue, count, rate_model)
    return Drop(problem, hull, dataclasses.replace(problem, catalogue=collapsed), collapsed_hull, key_solver)


def _compare(hull: Hull, problem: Problem, dai: Allocation) -> Latencies:
    users = problem.users
    slide = outcome(hull, users, dai.model, dai.frequency_hz, dai.bandwidth_hz, problem.rate_model)
    speed = jnp.where(dai.model >= 0, dai.frequency_hz * users.flop_per_cycle, jnp.nan)
    computing = hull.total_flop[dai.model] / speed
    taking = dai.latency_s - users.start_s
    return Latencies(taking, slide.latency_s - users.start_s, computing / (taking - computing))
