"""The same problem as a 0/1 programme for HiGHS: a cross-check of `exact` that shares neither hull nor order.

    maximise sum x_ki   subject to   sum_i x_ki <= 1,   sum b_ki x_ki <= B,   x_ki in {0, 1}

over the pairs of user k and model i, with b_ki the least bandwidth of the pair.

Axes: K users, I models, L layers, N choices.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from slide_jax.admission import TOLERANCE
from slide_jax.allocation import allocate_least
from slide_jax.errors import InputError
from slide_jax.float64 import compute_in_float64, require_float64
from slide_jax.hull import Hull
from slide_jax.latency import least_rate
from slide_jax.problem import Allocation, Problem, Users
from slide_jax.provisioning import Need, bandwidth_of, by_blocks, clock_of, is_admissible, named_by, provision

SPECTRUM_UNITS = 1e6
"""HiGHS keeps constraints to 1e-6: with the spectrum worth this many units, to 1e-12 of the spectrum."""

HIGHS_TOLERANCE = 1e-6
"""To which HiGHS proves its bound, relative to the largest value and to the bound itself."""


class PairNeeds(NamedTuple):
    """For every pair of model and user the least bandwidth [Hz], infinite if none suffices, and the clock."""

    bandwidth_hz: Float[Array, "I K"]
    frequency_hz: Float[Array, "I K"]


class Packing(NamedTuple):
    """Which choices a knapsack takes, and the value that no packing exceeds."""

    chosen: Bool[Array, " N"]
    bound: float


def milp(problem: Problem, time_limit_s: float = 60.0) -> Allocation:
    """Returns an allocation found by branch and bound, with the bound that was proven.

    Args:
      problem: 1,000 users take a fraction of a second, 10,000 a quarter of a minute.
      time_limit_s: above 0; when it is over, the best found so far stands, possibly nobody [s].

    Raises:
      InputError: a time limit that is not above 0.
    """
    check_time_limit(time_limit_s)
    needs = least_bandwidth_by_model(problem)
    spectrum = float(problem.bandwidth_hz)
    model, user = np.nonzero(needs.bandwidth_hz <= spectrum * (1 + TOLERANCE))
    bandwidth = needs.bandwidth_hz[model, user]
    packing = pack(np.ones(user.size), bandwidth, user, spectrum, time_limit_s)

    chosen_model, chosen_user = model[packing.chosen], user[packing.chosen]
    need = compute_in_float64(provision, problem)
    need = Need(*(column.copy() for column in need))
    served = np.zeros(problem.num_users, bool)
    served[chosen_user] = True
    need.model[chosen_user] = chosen_model
    need.bandwidth_hz[chosen_user] = bandwidth[packing.chosen]
    need.frequency_hz[chosen_user] = needs.frequency_hz[chosen_model, chosen_user]
    allocation = allocate_least(problem, need, served)
    return dataclasses.replace(allocation, upper_bound=float(np.floor(packing.bound)), solver="milp")


def least_bandwidth_by_model(problem: Problem) -> PairNeeds:
    """Returns the least bandwidth and the best clock of every pair, from all layers; NumPy float64."""
    return compute_in_float64(pair_needs, problem)


def pair_needs(hull: Hull, problem: Problem) -> PairNeeds:
    """`least_bandwidth_by_model` as a pure function of float64 arrays; the hull is not used."""
    require_float64(problem)
    catalogue = problem.catalogue

    def of_block(users: Users) -> tuple[Array, Array]:
        def of_model(entry):
            layer_bits, layer_flop, accuracy, task, allowed = entry
            allowed = is_admissible(users, accuracy, task, allowed)
            clock = clock_of(jnp.sum(layer_flop), users)
            speed = clock * users.flop_per_cycle
            rate = least_rate(
                layer_bits[:, None], layer_flop[:, None], users.deadline_s - users.start_s, speed
            )
            possible = allowed & (jnp.sum(layer_bits) <= users.memory_bits) & (clock > 0)
            return jnp.where(possible, bandwidth_of(rate, users, problem.rate_model), jnp.inf), clock

        entries = (
            catalogue.layer_bits,
            catalogue.layer_flop,
            catalogue.accuracy,
            catalogue.task,
            named_by(users),
        )
        return jax.tree.map(jnp.transpose, lax.map(of_model, entries))

    return PairNeeds(*jax.tree.map(jnp.transpose, by_blocks(of_block, problem.users)))


def pack(
    value: Float[ArrayLike, " N"],
    bandwidth_hz: Float[ArrayLike, " N"],
    user: Int[ArrayLike, " N"],
    spectrum_hz: float,
    time_limit_s: float = 60.0,
) -> Packing:
    """Returns a most valuable set of choices, at most one a user, that fits the spectrum.

    Args:
      value: of each choice, at least 0.
      bandwidth_hz: of each choice, within the spectrum.
      user: whose choice it is.
      spectrum_hz: the available spectrum.
      time_limit_s: as in `milp`.

    Raises:
      InputError: a time limit that is not above 0.
    """
    check_time_limit(time_limit_s)
    count, largest = value.size, float(np.max(value, initial=0.0))
    if largest == 0:
        return Packing(np.zeros(count, bool), 0.0)
    everyone = largest * np.unique(user).size
    # Needs within an exact fit of no spectrum at all are 0: then the row is empty.
    load = bandwidth_hz * (SPECTRUM_UNITS / spectrum_hz if spectrum_hz > 0 else 0.0)
    _, row = np.unique(user, return_inverse=True)
    one_each = scipy.sparse.csr_array((np.ones(count), (row, np.arange(count))))
    result = scipy.optimize.milp(
        -value / largest,
        integrality=np.ones(count),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(scipy.sparse.csr_array(load[None, :]), ub=SPECTRUM_UNITS),
            scipy.optimize.LinearConstraint(one_each, ub=1.0),
        ],
        options={"time_limit": float(time_limit_s), "mip_rel_gap": 0.0},
    )
    chosen = np.zeros(count, bool) if result.x is None else result.x > 0.5
    bound = result.mip_dual_bound
    if bound is None or not np.isfinite(bound):
        bound = everyone
    else:
        bound = min(largest * (-bound + HIGHS_TOLERANCE * (1 - bound)), everyone)
    chosen = _within(chosen, value, bandwidth_hz, spectrum_hz)
    return Packing(chosen, max(bound, float(np.sum(value[chosen]))))


def check_time_limit(time_limit_s: Any) -> None:
    """Refuses a time limit that is no number above 0."""
    number = isinstance(time_limit_s, int | float | np.number) and not isinstance(time_limit_s, bool)
    if not number or not time_limit_s > 0:
        raise InputError("time_limit_s", time_limit_s, "must be above 0", "give seconds, e.g. 60.0")


def _within(chosen, value, bandwidth_hz, spectrum_hz):
    """Drops what HiGHS' tolerance let in beyond ours, the least valuable and of those the widest first."""
    for n in np.lexsort((-bandwidth_hz, value)):
        if np.sum(bandwidth_hz[chosen]) <= spectrum_hz * (1 + TOLERANCE):
            break
        if chosen[n] and bandwidth_hz[n] > 0:
            chosen[n] = False
    return chosen
