"""Devices that free a layer once it has run, so that the model need not fit their memory at once.

The buffer holds what has been received of the layers that are not yet finished, counted bit by bit as it
arrives; the download runs at a constant rate r and never pauses. With Q_l = r C_l, the bits that would have
been received, were there no end to them, when layer l is done,

    Q_l = max(S_l, Q_{l-1}) + r w_l / v,        peak = max_l  min(Q_l, S_L) - S_{l-1},

for the buffer is fullest just before a layer is freed. By (*) in bits, Q_l is the largest of
S_j + r (w_j + ... + w_l) / v over j <= l: it never falls with r and never rises with v, and so does the peak.
Hence the fastest clock and the least rate, which is what `exact` gives a user, is also what needs the least
memory: a pair of user and model fits iff its peak there does, and admission by least bandwidth stays exact.

Axes: K users, I models, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from slide_jax.admission import TOLERANCE
from slide_jax.exact import decide_exact
from slide_jax.float64 import compute_in_float64
from slide_jax.hull import Hull
from slide_jax.latency import duration, least_rate, prefix_bits
from slide_jax.problem import Allocation, Catalogue, Problem, Users
from slide_jax.provisioning import NO_MEMORY, NOT_ADMISSIBLE, by_blocks, clock_of, is_admissible, named_by


def streaming_memory(problem: Problem) -> Allocation:
    """Returns an allocation that serves the most users when `memory_bits` has to hold the buffer alone.

    Never fewer than `exact`, which asks for room for the whole model; `verify` checks it with `memory_bits`
    infinite, `peak_memory` says what the buffer holds.
    """
    allocation = compute_in_float64(decide_streaming_memory, problem)
    bound = float(allocation.throughput)
    return dataclasses.replace(allocation, upper_bound=bound, solver="streaming_memory")


def decide_streaming_memory(hull: Hull, problem: Problem) -> Allocation:
    """`streaming_memory` as a pure function of float64 arrays: under `jit`, and `vmap` over drops."""
    users = problem.users
    admissible, fits = by_blocks(lambda block: _room(problem.catalogue, block), users)
    unlimited = dataclasses.replace(
        users, memory_bits=jnp.full_like(users.memory_bits, jnp.inf), allowed=admissible & fits
    )
    allocation = decide_exact(hull, dataclasses.replace(problem, users=unlimited))
    kept_out = (allocation.reason == NOT_ADMISSIBLE) & jnp.any(admissible, axis=1)
    return dataclasses.replace(allocation, reason=jnp.where(kept_out, NO_MEMORY, allocation.reason))


def peak_memory(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    rate_bps: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
) -> Float[Array, "..."]:
    """Returns the most bits that are received and not yet freed, at any time.

    A device that sets aside room for a whole layer when its first bit arrives needs at most the largest layer
    more.

    >>> bits, flop = jnp.array([2.0, 2.0, 2.0]), jnp.array([1.0, 1.0, 1.0])
    >>> print(peak_memory(bits, flop, 1.0, 1.0), peak_memory(bits, flop, 100.0, 1.0))
    3.0 6.0
    """
    received = prefix_bits(layer_bits)
    while_running = duration(layer_flop * rate_bps, speed_flop_s)
    received, while_running, layer_bits = jnp.broadcast_arrays(received, while_running, layer_bits)

    def step(progress, layer):
        through, bits, meanwhile = layer
        progress = jnp.maximum(through, progress) + meanwhile
        return progress, jnp.minimum(progress, received[-1]) - (through - bits)

    _, held = lax.scan(step, jnp.zeros_like(received[0]), (received, layer_bits, while_running))
    return jnp.max(held, axis=0)


def _room(catalogue: Catalogue, users: Users) -> tuple[Bool[Array, "K I"], Bool[Array, "K I"]]:
    """Returns which models a user may have, and which fit its memory; what is late counts as fitting."""

    def of_model(entry):
        layer_bits, layer_flop, accuracy, task, allowed = entry
        allowed = is_admissible(users, accuracy, task, allowed)
        speed = clock_of(jnp.sum(layer_flop), users) * users.flop_per_cycle
        bits, flop = layer_bits[:, None], layer_flop[:, None]
        rate = least_rate(bits, flop, users.deadline_s - users.start_s, speed)
        peak = peak_memory(bits, flop, jnp.where(rate < jnp.inf, rate, 0.0), speed)
        return allowed, (rate == jnp.inf) | (peak <= users.memory_bits * (1 + TOLERANCE))

    entries = (
        catalogue.layer_bits,
        catalogue.layer_flop,
        catalogue.accuracy,
        catalogue.task,
        named_by(users),
    )
    return jax.tree.map(jnp.transpose, lax.map(of_model, entries))
