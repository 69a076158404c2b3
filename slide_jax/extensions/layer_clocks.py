"""A clock for each layer, under one energy budget: slow while the download is far, fast at the end.

For one user and model at rate r, layer l of c_l cycles may run from D_l on. Running all cycles of a layer
at tau seconds each costs c_l phi(tau), phi(tau) = kappa / tau^2 + P tau. By (*) the deadline holds iff

    sum_{j>=l} c_j tau_j <= T - D_l    for every l:

the seconds that are left, drawn over the cycles that are left, begin at (0, 0) and stay below the points
(c_l + ... + c_L, T - D_l). Let phi be constant for clocks below the most economical one in range,
f_0 = clip((P / 2 kappa)^(1/3), f_min, f_max), for a device may run at f_0 and idle: then phi is convex and
never rises, and for every such phi the energy is least when tau_l are the slopes of the greatest convex
minorant of the points, the taut string: where another curve bends more, levelling it saves. So f_l =
max(1 / tau_l, f_0), clocks rise along the chain, and the largest is the least that any schedule gets by
with: f_max suffices iff the minorant keeps it.

The least energy falls with the rate, so the least rate within the budget is bisected, between the least rate
at f_max throughout and the least with one clock (`exact`), which the budget allows. A rate exists iff one
does with one clock, for at an infinite rate one clock is optimal. Provisioning and admission follow `exact`.

Source: Yao, Demers and Shenker, "A scheduling model for reduced CPU energy", FOCS 1995, of which this is the
case of a common deadline; here the arrivals follow from the rate.

Axes: K users, I models, L layers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from slide_jax.admission import TOLERANCE, admit
from slide_jax.allocation import allocate
from slide_jax.device import inference_energy
from slide_jax.float64 import compute_in_float64
from slide_jax.hull import Hull
from slide_jax.latency import duration, least_rate, prefix_bits, suffix_flop
from slide_jax.problem import Allocation, Problem, Users
from slide_jax.provisioning import SERVED, bandwidth_of, clock_of, is_admissible, provision, rate_of
from slide_jax.roots import bisect

USERS_AT_ONCE = 64
"""Of L^2 slopes each: what stays in a cache."""


class LayerClocks(NamedTuple):
    """An allocation with a clock for each layer.

    Attributes:
      allocation: its clocks are the highest of each user's; latencies and energies are those of
        `frequency_hz`.
      frequency_hz: clock of each layer; 0 where not served.
    """

    allocation: Allocation
    frequency_hz: Float[Array, "L K"]


def layer_clocks(problem: Problem) -> LayerClocks:
    """Returns an allocation that serves the most users when each layer has its own clock.

    Never fewer than `exact`. `verify`, which knows one clock, does not apply.
    """
    result = compute_in_float64(decide_layer_clocks, problem)
    bound = float(result.allocation.throughput)
    allocation = dataclasses.replace(result.allocation, upper_bound=bound, solver="layer_clocks")
    return result._replace(allocation=allocation)


def decide_layer_clocks(hull: Hull, problem: Problem) -> LayerClocks:
    """`layer_clocks` as a pure function of float64 arrays."""
    catalogue, users, rate_model = problem.catalogue, problem.users, problem.rate_model
    # A taut string bends only where layers lie on the hull of (W, S): all that runs from one of these to the
    # next is one layer to it, and so is what runs before any bit is needed.
    bits = jnp.diff(hull.bits, axis=1, prepend=0.0)
    bits = jnp.pad(bits, ((0, 0), (1, 0)))
    flop = -jnp.diff(hull.flop, axis=1, prepend=hull.total_flop[:, None], append=0.0)

    def of_user(user: Users) -> tuple[Array, Array]:
        def step(best, entry):
            index, bits, flop, accuracy, task, total_bits, allowed = entry
            allowed = is_admissible(user, accuracy, task, allowed)
            allowed &= total_bits <= user.memory_bits
            rate = jnp.where(allowed, _least_rate(bits, flop, user), jnp.inf)
            better = (rate < best[0]) | ((rate == best[0]) & (rate < jnp.inf) & (accuracy > best[1]))
            return jax.tree.map(
                lambda new, old: jnp.where(better, new, old), (rate, accuracy, index), best
            ), None

        models = jnp.arange(len(hull.bits), dtype=jnp.int32)
        table = (bits, flop, catalogue.accuracy, catalogue.task, hull.total_bits)
        first = (jnp.full((), jnp.inf), jnp.full((), -jnp.inf), jnp.full((), -1, jnp.int32))
        (rate, _, model), _ = lax.scan(step, first, (models, *table, user.allowed))
        return rate, model

    rate, model = lax.map(of_user, users, batch_size=USERS_AT_ONCE)
    bandwidth = bandwidth_of(rate, users, rate_model)
    need = provision(hull, problem)
    # A rate that the channel carries only with clocks of their own is no reason to refuse any more.
    need = need._replace(
        model=jnp.where(bandwidth < jnp.inf, model, -1),
        bandwidth_hz=bandwidth,
        reason=jnp.where(bandwidth < jnp.inf, SERVED, need.reason),
    )
    served = admit(bandwidth, problem.bandwidth_hz)
    allocation = allocate(hull, problem, need, served, bandwidth)

    chosen = jnp.where(served, need.model, 0)
    layer_bits, layer_flop = (
        jnp.asarray(table)[chosen] for table in (catalogue.layer_bits, catalogue.layer_flop)
    )
    rate = rate_of(allocation.bandwidth_hz, users, rate_model)
    clocks, _ = lax.map(
        lambda pair: _clocks_at(*pair), (layer_bits, layer_flop, rate, users), batch_size=USERS_AT_ONCE
    )
    clocks = jnp.where(served, clocks.T, 0.0)
    busy_s = duration(layer_flop.T, clocks * users.flop_per_cycle)
    # What is left to compute when each layer begins is a suffix sum of seconds as it is of FLOP.
    latency_s = users.start_s + jnp.max(
        duration(prefix_bits(layer_bits.T), rate) + suffix_flop(busy_s), axis=0
    )
    allocation = dataclasses.replace(
        allocation,
        frequency_hz=jnp.max(clocks, axis=0),
        latency_s=jnp.where(served, latency_s, jnp.nan),
        energy_j=jnp.where(served, _energy(clocks, layer_flop.T, users), jnp.nan),
    )
    return LayerClocks(allocation, clocks)


def cheapest_clocks(
    cycles: Float[ArrayLike, " L"],
    arrival_s: Float[ArrayLike, " L"],
    deadline_s: Float[ArrayLike, ""],
    f_min_hz: Float[ArrayLike, ""],
    f_max_hz: Float[ArrayLike, ""],
    kappa_j_per_hz2_cycle: Float[ArrayLike, ""],
    static_power_w: Float[ArrayLike, ""],
) -> tuple[Float[Array, " L"], Bool[Array, ""]]:
    """Returns the clocks [Hz] of least energy that end by the deadline, and whether f_max allows them.

    Args:
      cycles: of each layer.
      arrival_s: D_l, when each may run, not falling [s].
      deadline_s: when the last must be done [s].
      f_min_hz, f_max_hz, kappa_j_per_hz2_cycle, static_power_w: of the device, as in `device.best_clock`.

    >>> clocks, _ = cheapest_clocks(jnp.array([1.0, 2.0]), jnp.array([0.0, 3.0]), 4.0, 0.1, 9.0, 1.0, 0.0)
    >>> print(clocks)
    [0.33333334 2.        ]
    """
    seconds = jnp.append(deadline_s - arrival_s, 0.0)
    left = jnp.append(suffix_flop(cycles), 0.0)
    # Slope of the minorant over layer l: the largest over its lower ends a > l of the least over its
    # upper ends b <= l of the slope from a to b. A layer without cycles has none.
    rise, width = seconds[:-1, None] - seconds[1:], left[:-1, None] - left[1:]
    slope = jnp.where(width > 0, rise / jnp.where(width > 0, width, 1.0), jnp.inf)
    from_end = jnp.triu(jnp.ones(slope.shape, bool))
    per_cycle = jnp.max(jnp.where(from_end, lax.cummin(slope, axis=0), -jnp.inf), axis=1)
    busy = cycles > 0
    needed = jnp.where(busy, 1 / jnp.where(per_cycle > 0, per_cycle, 1.0), 0.0)
    late = busy & ((per_cycle <= 0) | (needed > f_max_hz * (1 + TOLERANCE)))
    in_time = ~jnp.any(late) & jnp.all(seconds >= 0)
    economic = jnp.cbrt(static_power_w / jnp.where(kappa_j_per_hz2_cycle > 0, 2 * kappa_j_per_hz2_cycle, 1.0))
    without_kappa = jnp.where(static_power_w > 0, jnp.inf, 0.0)
    economic = jnp.where(kappa_j_per_hz2_cycle > 0, economic, without_kappa)
    return jnp.clip(needed, jnp.clip(economic, f_min_hz, f_max_hz), f_max_hz), in_time


def _least_rate(layer_bits, layer_flop, user: Users):
    """Returns the least rate [bit/s] of one user and model; infinite if no rate suffices."""
    slack_s = user.deadline_s - user.start_s
    fastest = least_rate(layer_bits, layer_flop, slack_s, user.f_max_hz * user.flop_per_cycle)
    clock = clock_of(jnp.sum(layer_flop), user)
    one_clock = least_rate(layer_bits, layer_flop, slack_s, clock * user.flop_per_cycle)

    def excess_energy(rate):
        clocks, in_time = _clocks_at(layer_bits, layer_flop, rate, user)
        excess = _energy(clocks, layer_flop, user) - user.energy_j * (1 + TOLERANCE)
        return jnp.where(in_time, excess, jnp.inf)

    possible = (clock > 0) & (one_clock < jnp.inf)
    low, high = jnp.where(possible, fastest, 0.0), jnp.where(possible, one_clock, 0.0)
    rate = jnp.where(excess_energy(low) <= 0, low, bisect(excess_energy, low, high))
    return jnp.where(possible, rate, jnp.inf)


def _clocks_at(layer_bits, layer_flop, rate_bps, user: Users):
    """Returns `cheapest_clocks` of one user and model at a rate."""
    return cheapest_clocks(
        layer_flop / user.flop_per_cycle,
        duration(prefix_bits(layer_bits), rate_bps),
        user.deadline_s - user.start_s,
        user.f_min_hz,
        user.f_max_hz,
        user.kappa_j_per_hz2_cycle,
        user.static_power_w,
    )


def _energy(clocks, layer_flop, users: Users):
    """Returns the energy [J] of all layers at their clocks; the layer axis comes first."""
    cycles, kappa = layer_flop / users.flop_per_cycle, users.kappa_j_per_hz2_cycle
    return jnp.sum(inference_energy(clocks, cycles, kappa, users.static_power_w), axis=0)
