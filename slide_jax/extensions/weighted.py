"""Users of different weight: a 0/1 knapsack, with its bound and a greedy answer.

What a user needs does not depend on its weight, so each still gets the model of least bandwidth b_k. Left is

    maximise sum w_k x_k   subject to   sum b_k x_k <= B,   x_k in {0, 1}.

With equal weights that is admission by bandwidth; in general it is NP-hard, and the exact answer is HiGHS'.

Axes: K users.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from slide_jax.admission import TOLERANCE, first_of
from slide_jax.allocation import allocate_least
from slide_jax.baselines import admit_in_order
from slide_jax.errors import InputError
from slide_jax.float64 import compute_in_float64
from slide_jax.milp import pack
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import provision


class WeightedAllocation(NamedTuple):
    """An allocation (its `upper_bound`, of users, is nan), the weight it serves and what none can exceed."""

    allocation: Allocation
    value: float
    bound: float


def weighted(
    problem: Problem, weights: Float[ArrayLike, " K"], time_limit_s: float = 60.0
) -> WeightedAllocation:
    """Returns the allocation that serves the largest sum of weights.

    `value` reaches `bound` to 1e-6 of the largest weight, HiGHS' tolerance, unless time runs out first.

    Args:
      problem: of hundreds or thousands of users.
      weights: at least 0.
      time_limit_s: above 0; when it is over, the better of the best found and `weighted_greedy` stands [s].

    Raises:
      InputError: weights of the wrong shape, negative or not finite; a time limit that is not above 0.
    """
    weights = _checked(problem, weights)
    need, spectrum = compute_in_float64(provision, problem), float(problem.bandwidth_hz)
    fits = np.flatnonzero(need.bandwidth_hz <= spectrum * (1 + TOLERANCE))
    packing = pack(weights[fits], need.bandwidth_hz[fits], fits, spectrum, time_limit_s)
    served = np.zeros(problem.num_users, bool)
    served[fits[packing.chosen]] = True
    greedy, fractional = _greedy(weights, need.bandwidth_hz, spectrum)
    if weights[greedy].sum() > weights[served].sum():
        served = greedy
    return _result(problem, weights, need, served, min(packing.bound, fractional))


def weighted_greedy(problem: Problem, weights: Float[ArrayLike, " K"]) -> WeightedAllocation:
    """Returns the better of two answers: the most weight per bandwidth first, or the heaviest user alone.

    It serves at least half of the largest sum of weights: those who fit first and the first who does not are
    together worth the fractional bound. `bound` is that bound, so the gap is known.

    Args, Raises: as in `weighted`.
    """
    weights = _checked(problem, weights)
    need = compute_in_float64(provision, problem)
    served, bound = _greedy(weights, need.bandwidth_hz, float(problem.bandwidth_hz))
    return _result(problem, weights, need, served, bound)


def fractional_bound(
    weights: Float[ArrayLike, " K"], bandwidth_hz: Float[ArrayLike, " K"], spectrum_hz: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    """Returns the most weight that can be served if users may be served in part: the bound of the relaxation.

    Args:
      weights: at least 0.
      bandwidth_hz: what each user needs, at least 0; users who need more than the spectrum count for nothing.
      spectrum_hz: the available spectrum.

    Source: Dantzig, "Discrete-variable extremum problems", Operations Research 5 (1957).

    >>> print(fractional_bound(jnp.array([4.0, 3.0]), jnp.array([2.0, 3.0]), 3.0))
    5.0
    """
    limit = spectrum_hz * (1 + TOLERANCE)
    fits = bandwidth_hz <= limit
    weights, bandwidth = jnp.where(fits, weights, 0.0), jnp.where(fits, bandwidth_hz, 0.0)
    order = _densest_first(weights, bandwidth)
    weights, bandwidth = weights[order], bandwidth[order]
    left = limit - (jnp.cumsum(bandwidth) - bandwidth)
    part = jnp.where(bandwidth > 0, left / jnp.where(bandwidth > 0, bandwidth, 1.0), 1.0)
    return jnp.sum(weights * jnp.clip(part, 0.0, 1.0)) * (1 + TOLERANCE)  # what the sum may have lost


def greedy_choice(
    weights: Float[ArrayLike, " K"], bandwidth_hz: Float[ArrayLike, " K"], spectrum_hz: Float[ArrayLike, ""]
) -> Bool[Array, " K"]:
    """Returns whom `weighted_greedy` serves, given what each user needs."""
    fits = bandwidth_hz <= spectrum_hz * (1 + TOLERANCE)
    dense = admit_in_order(bandwidth_hz, _densest_first(weights, bandwidth_hz), spectrum_hz)
    heaviest = jnp.max(jnp.where(fits, weights, -1.0), initial=-1.0)
    alone = first_of(fits & (weights == heaviest), 1)
    return jnp.where(jnp.sum(weights * dense) >= jnp.sum(weights * alone), dense, alone)


def _densest_first(weights, bandwidth_hz):
    free = bandwidth_hz <= 0
    return jnp.argsort(-jnp.where(free, jnp.inf, weights / jnp.where(free, 1.0, bandwidth_hz)))


@jax.jit
def _choice_and_bound(weights, bandwidth_hz, spectrum_hz):
    return (
        greedy_choice(weights, bandwidth_hz, spectrum_hz),
        fractional_bound(weights, bandwidth_hz, spectrum_hz),
    )


def _greedy(weights, bandwidth_hz, spectrum_hz):
    with jax.enable_x64(True):
        served, bound = _choice_and_bound(weights, bandwidth_hz, np.float64(spectrum_hz))
        return np.asarray(served), float(bound)


def _result(problem, weights, need, served, bound) -> WeightedAllocation:
    value = float(weights[served].sum())
    # Sums of the same weights in another order may differ in the last place.
    return WeightedAllocation(allocate_least(problem, need, served), value, max(bound, value))


def _checked(problem: Problem, weights) -> np.ndarray:
    weights = np.asarray(weights)
    if weights.shape != (problem.num_users,) or weights.dtype.kind not in "iuf":
        given = f"{weights.dtype} of shape {weights.shape}"
        raise InputError("weights", given, "must be numbers [K]", f"give shape {(problem.num_users,)}")
    weights = weights.astype(np.float64)
    good = np.isfinite(weights) & (weights >= 0)
    if not good.all():
        k = int(np.argmin(good))
        raise InputError(f"weights[{k}]", weights[k].item(), "must be finite, 0 or more", "give e.g. 1.0")
    return weights
