"""Which model a user gets: the admissible one of least bandwidth, with the clock that it runs at.

The least bandwidth of a user does not depend on what others get, so this is K separate problems. Users are
worked on in blocks that stay in a core's cache; within a block the models are scanned.

Axes: K users, I models, N users of a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from slide_jax.device import best_clock, inference_energy
from slide_jax.float64 import require_float64
from slide_jax.hull import Hull, latency_on_hull, least_rate_on_hull
from slide_jax.problem import REASONS, Catalogue, Problem, Users
from slide_jax.rates import linear_bandwidth, linear_rate, shannon_bandwidth, shannon_rate

BLOCK = 16384

(SERVED, NOT_ADMISSIBLE, NO_MEMORY, NO_ENERGY, TOO_LATE, NO_SIGNAL, NO_RATE, NO_SPECTRUM, CROWDED_OUT) = (
    range(len(REASONS))
)


class Need(NamedTuple):
    """What a user needs to be served at the least bandwidth.

    Attributes:
      model: index of the model; -1: no model meets the constraints.
      bandwidth_hz: the least [Hz]; infinite: no model meets the constraints.
      frequency_hz: the clock [Hz].
      reason: code of the constraint that stopped the model that came furthest; `SERVED` if none did.
    """

    model: Int[Array, " K"]
    bandwidth_hz: Float[Array, " K"]
    frequency_hz: Float[Array, " K"]
    reason: Int[Array, " K"]


class Outcome(NamedTuple):
    """What a share of the spectrum makes of a user: latency [s, from time 0] and energy [J]."""

    latency_s: Float[Array, " K"]
    energy_j: Float[Array, " K"]


def signal_of(users: Users, rate_model: str) -> Float[ArrayLike, "..."]:
    """Returns what a rate model knows of the channel: spectral efficiency [bit/s/Hz] or snr_hz [Hz]."""
    return users.spectral_efficiency_bps_hz if rate_model == "linear" else users.snr_hz


RATES = {"linear": linear_rate, "shannon": shannon_rate}
BANDWIDTHS = {"linear": linear_bandwidth, "shannon": shannon_bandwidth}
"""From bandwidth and signal to rate, and back."""


def rate_of(bandwidth_hz: Float[ArrayLike, "..."], users: Users, rate_model: str) -> Float[ArrayLike, "..."]:
    """Returns the users' rates [bit/s] under the problem's rate model."""
    return RATES[rate_model](bandwidth_hz, signal_of(users, rate_model))


def bandwidth_of(rate_bps: Float[ArrayLike, "..."], users: Users, rate_model: str) -> Float[Array, "..."]:
    """Returns the least bandwidths [Hz] that carry the users' rates; infinite where none does."""
    return BANDWIDTHS[rate_model](rate_bps, signal_of(users, rate_model))


def clock_of(total_flop: Float[ArrayLike, "..."], users: Users) -> Float[Array, "..."]:
    """Returns the fastest clock [Hz] at which a workload fits each user's energy; 0 where none does."""
    return best_clock(
        total_flop / users.flop_per_cycle,
        users.energy_j,
        users.f_min_hz,
        users.f_max_hz,
        users.kappa_j_per_hz2_cycle,
        users.static_power_w,
    )


def named_by(users: Users) -> Bool[ArrayLike, "I K"] | None:
    """Returns which users name each model; None: task and accuracy decide."""
    return None if users.allowed is None else users.allowed.T


def is_admissible(
    users: Users,
    accuracy: Float[ArrayLike, ""],
    task: Int[ArrayLike, ""],
    named: Bool[ArrayLike, "..."] | None,
) -> Bool[ArrayLike, "..."]:
    """Returns for which users a model is admissible; `named` is its row of `named_by`."""
    return (users.task == task) & (accuracy >= users.min_accuracy) if named is None else named


def provision(hull: Hull, problem: Problem) -> Need:
    """Returns every user's need; of models that need the same rate the more accurate, then the first.

    Raises:
      InputError: arrays that are not float64.
    """
    require_float64(hull, problem)
    return by_blocks(
        lambda block: _provision_block(hull, problem.catalogue, block, problem.rate_model), problem.users
    )


def outcome(
    hull: Hull,
    users: Users,
    model: Int[ArrayLike, " K"],
    frequency_hz: Float[ArrayLike, " K"],
    bandwidth_hz: Float[ArrayLike, " K"],
    rate_model: str,
) -> Outcome:
    """Returns latency and energy of users at given models, clocks and bandwidths; nan at model -1."""

    def of_block(block):
        users, model, frequency_hz, bandwidth_hz = block
        # Where nobody is served any clock does, so that derivatives are no nan there.
        served = model >= 0
        frequency_hz = jnp.where(served, frequency_hz, 1.0)
        rate, speed = rate_of(bandwidth_hz, users, rate_model), frequency_hz * users.flop_per_cycle
        chosen = hull_of_chosen(hull, model)
        taking = latency_on_hull(chosen.bits, chosen.flop, chosen.total_flop, rate, speed)
        energy = inference_energy(
            frequency_hz,
            chosen.total_flop / users.flop_per_cycle,
            users.kappa_j_per_hz2_cycle,
            users.static_power_w,
        )
        served = model >= 0
        return Outcome(jnp.where(served, users.start_s + taking, jnp.nan), jnp.where(served, energy, jnp.nan))

    return by_blocks(of_block, (users, model, frequency_hz, bandwidth_hz))


def hull_of_chosen(hull: Hull, model: Int[ArrayLike, " N"]) -> Hull:
    """Returns the hull of each user's model, users last: [H, N] and [N]; of the first model for -1."""
    return Hull(*(jnp.asarray(table).T[..., jnp.maximum(model, 0)] for table in hull))


def bandwidth_by(
    deadline_s: Float[ArrayLike, " K"],
    hull: Hull,
    users: Users,
    model: Int[ArrayLike, " K"],
    frequency_hz: Float[ArrayLike, " K"],
    rate_model: str,
) -> Float[Array, " K"]:
    """Returns the least bandwidths [Hz] that meet given deadlines with given models and clocks."""

    def of_block(block):
        deadline_s, users, model, frequency_hz = block
        slack, speed = deadline_s - users.start_s, frequency_hz * users.flop_per_cycle
        chosen = hull_of_chosen(hull, model)
        rate = least_rate_on_hull(
            chosen.bits, chosen.flop, chosen.switch_flop, chosen.total_flop, slack, speed
        )
        return bandwidth_of(jnp.where(model >= 0, rate, jnp.inf), users, rate_model)

    return by_blocks(of_block, (deadline_s, users, model, frequency_hz))


def _provision_block(hull: Hull, catalogue: Catalogue, users: Users, rate_model: str) -> Need:
    slack_s = users.deadline_s - users.start_s

    def step(best, entry):
        rate_best, accuracy_best, model_best, frequency_best, furthest = best
        index, accuracy, task, bits, flop, switch_flop, total_bits, total_flop, allowed = entry
        allowed = is_admissible(users, accuracy, task, allowed)
        clock = clock_of(total_flop, users)
        rate = least_rate_on_hull(bits, flop, switch_flop, total_flop, slack_s, clock * users.flop_per_cycle)
        stopped = jnp.where(rate < jnp.inf, NO_SIGNAL, TOO_LATE)
        stopped = jnp.where(clock > 0, stopped, NO_ENERGY)
        stopped = jnp.where(total_bits <= users.memory_bits, stopped, NO_MEMORY)
        stopped = jnp.where(allowed, stopped, NOT_ADMISSIBLE).astype(jnp.int32)
        rate = jnp.where(stopped == NO_SIGNAL, rate, jnp.inf)
        better = (rate < rate_best) | ((rate == rate_best) & (rate < jnp.inf) & (accuracy > accuracy_best))
        return (
            jnp.where(better, rate, rate_best),
            jnp.where(better, accuracy, accuracy_best),
            jnp.where(better, index, model_best),
            jnp.where(better, clock, frequency_best),
            jnp.maximum(stopped, furthest),
        ), None

    shape = slack_s.shape
    first = (
        jnp.full(shape, jnp.inf),
        jnp.full(shape, -jnp.inf),
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape),
        jnp.full(shape, NOT_ADMISSIBLE, jnp.int32),
    )
    models = jnp.arange(len(hull.bits), dtype=jnp.int32)
    entries = (models, catalogue.accuracy, catalogue.task, *hull, named_by(users))
    (rate, _, model, frequency, furthest), _ = lax.scan(step, first, entries)
    bandwidth = bandwidth_of(rate, users, rate_model)
    # A rate without a bandwidth: no signal at all, or more than the channel can carry.
    unreachable = jnp.where(signal_of(users, rate_model) > 0, NO_RATE, NO_SIGNAL)
    reason = jnp.where(furthest < NO_SIGNAL, furthest, jnp.where(bandwidth < jnp.inf, SERVED, unreachable))
    model = jnp.where(reason == SERVED, model, -1)
    return Need(model, bandwidth, frequency, reason.astype(jnp.int32))


def by_blocks(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Returns `function` of arrays [K, ...], computed over blocks of users that fit a cache.

    The last block overlaps the one before it, so that nothing is padded.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    if count <= BLOCK:
        return function(arrays)

    def block(start):
        return jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, start, BLOCK), arrays)

    def step(number, results):
        start = jnp.minimum(number * BLOCK, count - BLOCK)
        return jax.tree.map(
            lambda result, part: lax.dynamic_update_slice_in_dim(result, part, start, 0),
            results,
            function(block(start)),
        )

    shapes = jax.eval_shape(lambda: function(block(0)))
    empty = jax.tree.map(lambda shape: jnp.empty((count, *shape.shape[1:]), shape.dtype), shapes)
    return lax.fori_loop(0, -(-count // BLOCK), step, empty)
