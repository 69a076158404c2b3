"""Latency of inference that runs while the model downloads, in three formulations, and its inverse.

The download begins at `start`; layers arrive in order, and layer l runs when it has arrived and
layer l-1 is done (arXiv 2512.20946):

    D_l = start + (s_1 + ... + s_l) / rate            arrival
    C_l = max(D_l, C_{l-1}) + w_l / speed             completion,  C_0 = start

Unrolled, with prefix sizes S_l = s_1 + ... + s_l and suffix workloads W_l = w_l + ... + w_L:

    C_L = start + max_l (S_l / rate + W_l / speed)                                       (*)

Axes: L layers, first; any batch axes (users, models, drops) follow and broadcast against rate and speed.
Sizes in bits, workloads in FLOP, rate in bit/s, speed in FLOP/s (clock * FLOP per cycle), times in seconds.
A layer without bits or without work takes no time to download or compute, even at rate or speed 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float


class Timeline(NamedTuple):
    """When each layer arrives, begins and is done [s]; each [L, ...]."""

    arrival_s: Array
    begin_s: Array
    completion_s: Array


def prefix_bits(layer_bits: Float[ArrayLike, "L ..."]) -> Float[Array, "L ..."]:
    """Returns S_l: what has to arrive before layer l can run."""
    return jnp.cumsum(layer_bits, axis=0)


def suffix_flop(layer_flop: Float[ArrayLike, "L ..."]) -> Float[Array, "L ..."]:
    """Returns W_l: what is left to compute when layer l begins."""
    return jnp.flip(jnp.cumsum(jnp.flip(layer_flop, 0), axis=0), 0)


def duration(amount: Float[ArrayLike, "..."], pace: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Returns amount / pace; 0 where there is nothing to do, infinite where nothing moves."""
    return jnp.where(amount > 0, amount / pace, 0.0)


def _passing(amount, time_of_one):
    """Returns `duration` by a product, several times faster inside a loop than by a quotient."""
    return jnp.where(amount > 0, amount * time_of_one, 0.0)


@jax.custom_vjp
def _recursion(layer_bits, layer_flop, rate_bps, speed_flop_s):
    per_bit, per_flop = 1 / rate_bps, 1 / speed_flop_s

    def step(carry, layer):
        received, done = carry
        bits, flop = layer
        received = received + bits
        begin = jnp.maximum(_passing(received, per_bit), done)
        return (received, begin + _passing(flop, per_flop)), None

    zero = _zeros(layer_bits, layer_flop, rate_bps, speed_flop_s)
    (_, done), _ = lax.scan(step, (zero, zero), (layer_bits, layer_flop))
    return done


def _recursion_forward(layer_bits, layer_flop, rate_bps, speed_flop_s):
    # Latency is S_l / rate + W_l / speed of one deciding layer l: carrying l and S_l along turns the
    # gradient into a comparison with l, and W_l is what remains of the latency.
    per_bit, per_flop = 1 / rate_bps, 1 / speed_flop_s

    def step(carry, layer):
        received, done, decided_bits, decider = carry
        number, bits, flop = layer
        received = received + bits
        arrival = _passing(received, per_bit)
        waits = arrival >= done
        done = jnp.maximum(arrival, done) + _passing(flop, per_flop)
        decided_bits = jnp.where(waits, received, decided_bits)
        return (received, done, decided_bits, jnp.where(waits, number, decider)), None

    zero = _zeros(layer_bits, layer_flop, rate_bps, speed_flop_s)
    numbers = jnp.arange(layer_bits.shape[0], dtype=jnp.int32)
    carry = (zero, zero, zero, jnp.zeros(zero.shape, jnp.int32))
    (_, done, decided_bits, decider), _ = lax.scan(step, carry, (numbers, layer_bits, layer_flop))
    downloading = _passing(decided_bits, per_bit)
    # The layers' own arrays are kept for their shapes only.
    return done, (downloading, done - downloading, decider, layer_bits, layer_flop, rate_bps, speed_flop_s)


def _recursion_backward(residuals, cotangent):
    downloading, computing, decider, layer_bits, layer_flop, rate_bps, speed_flop_s = residuals
    number = jnp.arange(layer_bits.shape[0], dtype=jnp.int32).reshape(-1, *[1] * decider.ndim)
    # Gradients are 0, not nan, where the latency is infinite or a rate or speed is 0.
    ends = downloading + computing < jnp.inf
    per_bit = jnp.where(ends & (rate_bps > 0), cotangent / rate_bps, 0.0)
    per_flop = jnp.where(ends & (speed_flop_s > 0), cotangent / speed_flop_s, 0.0)
    # Computed once a user, and not again for every layer, as fusion would have it.
    per_bit, per_flop = lax.optimization_barrier((per_bit, per_flop))
    downloading, computing = jnp.where(ends, downloading, 0.0), jnp.where(ends, computing, 0.0)
    return (
        _sum_to(jnp.where(number <= decider, per_bit, 0.0), layer_bits.shape),
        _sum_to(jnp.where(number >= decider, per_flop, 0.0), layer_flop.shape),
        _sum_to(-per_bit * downloading, rate_bps.shape),
        _sum_to(-per_flop * computing, speed_flop_s.shape),
    )


_recursion.defvjp(_recursion_forward, _recursion_backward)


def latency(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    rate_bps: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
    start_s: Float[ArrayLike, "..."] = 0.0,
) -> Float[Array, "..."]:
    """Returns C_L by the recursion, a scan over layers; the fastest to differentiate.

    The gradient is that of the deciding layer in (*), the last one that is waited for: a subgradient
    where several decide; 0 where the latency is infinite. For forward mode take `latency_closed_form`.

    >>> bits, flop = jnp.array([2.0, 2.0]), jnp.array([1.0, 1.0])
    >>> float(latency(bits, flop, 1.0, 1.0)), float(dai_latency(bits, flop, 1.0, 1.0))
    (5.0, 6.0)
    """
    return start_s + _recursion(*_aligned(layer_bits, layer_flop, rate_bps, speed_flop_s))


def latency_associative(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    rate_bps: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
    start_s: Float[ArrayLike, "..."] = 0.0,
) -> Float[Array, "..."]:
    """Returns C_L by a parallel prefix of (max, +) affine maps, of depth log L."""
    layer_bits, layer_flop, rate_bps, speed_flop_s = _aligned(layer_bits, layer_flop, rate_bps, speed_flop_s)
    arrival = duration(prefix_bits(layer_bits), rate_bps)
    computing = duration(layer_flop, speed_flop_s)
    arrival, computing = jnp.broadcast_arrays(arrival, computing)

    # Layer l maps C to max(C + delay, floor); so does any run of layers.
    def compose(first, second):
        (delay1, floor1), (delay2, floor2) = first, second
        return delay1 + delay2, jnp.maximum(floor1 + delay2, floor2)

    delay, floor = lax.associative_scan(compose, (computing, arrival + computing), axis=0)
    return start_s + jnp.maximum(delay[-1], floor[-1])


def latency_closed_form(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    rate_bps: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
    start_s: Float[ArrayLike, "..."] = 0.0,
) -> Float[Array, "..."]:
    """Returns C_L by (*): the largest of L sums."""
    layer_bits, layer_flop, rate_bps, speed_flop_s = _aligned(layer_bits, layer_flop, rate_bps, speed_flop_s)
    arrival = duration(prefix_bits(layer_bits), rate_bps)
    return start_s + jnp.max(arrival + duration(suffix_flop(layer_flop), speed_flop_s), axis=0)


def dai_latency(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    rate_bps: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
    start_s: Float[ArrayLike, "..."] = 0.0,
) -> Float[Array, "..."]:
    """Returns the latency of downloading first and inferring then (DAI), the convention."""
    return (
        start_s
        + duration(jnp.sum(layer_bits, axis=0), rate_bps)
        + duration(jnp.sum(layer_flop, axis=0), speed_flop_s)
    )


def timeline(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    rate_bps: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
    start_s: Float[ArrayLike, "..."] = 0.0,
) -> Timeline:
    """Returns when each layer arrives, begins to run and is done."""
    layer_bits, layer_flop, rate_bps, speed_flop_s, start_s = _aligned(
        layer_bits, layer_flop, rate_bps, speed_flop_s, start_s
    )
    arrival = start_s + duration(prefix_bits(layer_bits), rate_bps)
    computing = duration(layer_flop, speed_flop_s)
    arrival, computing = jnp.broadcast_arrays(arrival, computing)

    def step(done, layer):
        arrives, takes = layer
        begin = jnp.maximum(arrives, done)
        return begin + takes, (begin, begin + takes)

    _, (begin, completion) = lax.scan(step, jnp.zeros_like(arrival[0]) + start_s, (arrival, computing))
    return Timeline(arrival, begin, completion)


def least_rate(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    slack_s: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
) -> Float[Array, "..."]:
    """Returns the least rate [bit/s] at which C_L - start <= slack; infinite if no rate suffices.

    By (*), rate >= S_l / (slack - W_l / speed) for every layer: a prefix without bits asks for no rate but
    for the time W_l / speed; one with bits must arrive strictly before slack - W_l / speed.

    Args:
      slack_s: deadline minus start.
    """
    layer_bits, layer_flop, slack_s, speed_flop_s = _aligned(layer_bits, layer_flop, slack_s, speed_flop_s)
    received = prefix_bits(layer_bits)
    spare = slack_s - duration(suffix_flop(layer_flop), speed_flop_s)
    needed = jnp.where(received > 0, received / jnp.where(spare > 0, spare, 1.0), 0.0)
    late = jnp.where(received > 0, spare <= 0, spare < 0)
    return jnp.max(jnp.where(late, jnp.inf, needed), axis=0)


def _aligned(layer_bits, layer_flop, *of_batch):
    """Returns the arrays in one floating dtype, with as many batch axes each."""
    arrays = [jnp.asarray(array) for array in (layer_bits, layer_flop, *of_batch)]
    dtype = jnp.result_type(*arrays, jnp.float32)
    layers = len(layer_bits)
    batches = [array.shape[1:] for array in arrays[:2]] + [array.shape for array in arrays[2:]]
    axes = max(len(batch) for batch in batches)
    padded = [(1,) * (axes - len(batch)) + batch for batch in batches]
    shapes = [(layers, *batch) for batch in padded[:2]] + padded[2:]
    return [array.astype(dtype).reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]


def _zeros(layer_bits, layer_flop, rate_bps, speed_flop_s):
    shape = jnp.broadcast_shapes(
        layer_bits.shape[1:], layer_flop.shape[1:], rate_bps.shape, speed_flop_s.shape
    )
    return jnp.zeros(shape, layer_bits.dtype)


def _sum_to(cotangent, shape):
    """Returns the cotangent of an array that was broadcast from `shape`, of as many axes."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and cotangent.shape[axis] != 1)
    return jnp.sum(cotangent, axis=axes, keepdims=True) if axes else cotangent
