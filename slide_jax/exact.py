"""The exact optimum in polynomial time: O(I L + K I h) for K users and I models of L layers, h deciding.

1. Clock: latency falls and energy rises with it, so the fastest that the energy allows (`device`).
2. Bandwidth: the least, in closed form (`latency`, `hull`).
3. Provisioning: the admissible model of least bandwidth (`provisioning`).
4. Admission: the users of least bandwidth, as many as fit (`admission`).

Source: arXiv 2512.20946; the proofs in short stand at each step. Everything is float64, whatever the
caller's setting: thresholds and sums over a million users decide.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from slide_jax.admission import TOLERANCE, admit
from slide_jax.errors import unknown_name
from slide_jax.hull import Hull, convex_hull
from slide_jax.leftover import LEFT_OVER, share_out
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import CROWDED_OUT, NO_SPECTRUM, SERVED, Need, outcome, provision


def exact(problem: Problem, left_over: str = "none") -> Allocation:
    """Returns an allocation that serves the most users, and why the others are not served.

    Args:
      problem: of any size; a million users take a fraction of a second.
      left_over: what becomes of spectrum that nobody needs: one of `LEFT_OVER`.

    Raises:
      InputError: an unknown policy.
    """
    if left_over not in LEFT_OVER:
        raise unknown_name("left_over", left_over, LEFT_OVER)
    decision = run(decide, problem, left_over=left_over)
    return dataclasses.replace(decision, upper_bound=float(decision.throughput), solver="exact")


def decide(hull: Hull, problem: Problem, left_over: str = "none") -> Allocation:
    """The optimum as a pure function of float64 arrays: under `jit`, and `vmap` over drops.

    Args:
      hull: of the catalogue, by `convex_hull`.
      problem: float64 numbers.
      left_over: one of `LEFT_OVER`.
    """
    need = provision(hull, problem.catalogue, problem.users, problem.rate_model)
    served = admit(need.bandwidth_hz, problem.bandwidth_hz)
    bandwidth = share_out(hull, problem, need, served, left_over)
    return settle(hull, problem, need, served, bandwidth)


def run(decide: Callable[..., Any], problem: Problem, *arrays: Any, **options: Any) -> Any:
    """Returns what `decide(hull, problem, *arrays, **options)` makes of a problem, as NumPy arrays.

    It is jitted, with the options static, and computes in float64 whatever the caller's setting.
    """
    with jax.enable_x64(True):
        hull = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
        decided = _jitted(decide, hull, in_float64(problem), arrays, tuple(options.items()))
        return jax.tree.map(np.asarray, decided)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _jitted(decide, hull, problem, arrays, options):
    return decide(hull, problem, *arrays, **dict(options))


def in_float64(problem: Problem) -> Problem:
    """Returns the problem with float64 numbers; integers and truth values stay."""

    def convert(array):
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        return array.astype(np.float64) if array.dtype.kind == "f" and array.dtype != np.float64 else array

    return jax.tree.map(convert, problem)


def settle(
    hull: Hull, problem: Problem, need: Need, served: Bool[Array, " K"], bandwidth_hz: Float[Array, " K"]
) -> Allocation:
    """Returns the allocation that serves these users, their needs met, with these bandwidths."""
    model = jnp.where(served, need.model, -1)
    frequency = jnp.where(served, need.frequency_hz, 0.0)
    bandwidth = jnp.where(served, bandwidth_hz, 0.0)
    result = outcome(hull, problem.users, model, frequency, bandwidth, problem.rate_model)
    alone = need.bandwidth_hz <= problem.bandwidth_hz * (1 + TOLERANCE)
    refused = jnp.where(alone, CROWDED_OUT, NO_SPECTRUM)
    reason = jnp.where(need.reason == SERVED, jnp.where(served, SERVED, refused), need.reason)
    return Allocation(
        model=model,
        bandwidth_hz=bandwidth,
        frequency_hz=frequency,
        latency_s=result.latency_s,
        energy_j=result.energy_j,
        reason=reason.astype(jnp.int32),
    )
