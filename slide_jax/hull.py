"""Which layers of a model can determine its latency: the upper-right convex hull of the points (W_l, S_l).

S_l are the bits up to and with layer l and W_l the work from layer l on (`latency`). With the time T from
start to deadline and a speed v, a model needs the rate

    v * max_l  S_l / (v T - W_l),

which is v times the slope of the steepest line from (v T, 0) to a point (W_l, S_l). That line touches the
convex hull of the points, so only its vertices matter: 2 to 10 of 64 layers. The vertex of the maximum moves
along the hull as v T grows; it is found by comparing v T with the values at which two neighbouring vertices
give the same slope, which needs a single division.

Axes: I models, L layers, H hull vertices (of the model with the most), K users.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from slide_jax.problem import is_traced


class Hull(NamedTuple):
    """The layers that can determine the latency of each model; a model with fewer than H repeats its last.

    Attributes:
      bits: S at each vertex, rising along H [bits]; 0 for a model without any bits.
      flop: W at each vertex, falling along H [FLOP].
      switch_flop: v T beyond which vertex h + 1 gives the maximum and no longer h [FLOP].
      total_bits: of the whole model [bits].
      total_flop: of the whole model [FLOP].
    """

    bits: Float[Array, "I H"]
    flop: Float[Array, "I H"]
    switch_flop: Float[Array, "I H-1"]
    total_bits: Float[Array, " I"]
    total_flop: Float[Array, " I"]


def convex_hull(layer_bits: Float[ArrayLike, "I L"], layer_flop: Float[ArrayLike, "I L"]) -> Hull:
    """Returns the hull vertices of every model; NumPy float64, on the host, O(I L).

    H is rounded up to a multiple of four, so that catalogues of a kind share one compiled program. Of layers
    inside `jit`, `vmap` or `grad` the number of vertices is not known: H is L there, O(I L^2).
    """
    if is_traced(layer_bits, layer_flop):
        return _traced_hull(jnp.asarray(layer_bits), jnp.asarray(layer_flop))
    layer_bits, layer_flop = np.asarray(layer_bits, np.float64), np.asarray(layer_flop, np.float64)
    return _hull_of(layer_bits.tobytes(), layer_flop.tobytes(), layer_bits.shape)


@functools.lru_cache(maxsize=64)
def _hull_of(raw_bits: bytes, raw_flop: bytes, shape: tuple[int, int]) -> Hull:
    """`convex_hull`, cached by content: the problems of a program share few catalogues."""
    layer_bits, layer_flop = (np.frombuffer(table).reshape(shape) for table in (raw_bits, raw_flop))
    received = np.cumsum(layer_bits, axis=1)
    remaining = np.cumsum(layer_flop[:, ::-1], axis=1)[:, ::-1]
    vertices = [_vertices(*model) for model in zip(received, remaining, strict=True)]
    longest = max(len(model) for model in vertices)
    width = -(-longest // 4) * 4
    padded = np.array([model + model[-1:] * (width - len(model)) for model in vertices])
    bits, flop = padded[:, :, 0], padded[:, :, 1]
    rise = np.diff(bits, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        switch = (bits[:, 1:] * flop[:, :-1] - bits[:, :-1] * flop[:, 1:]) / rise
    hull = Hull(bits, flop, np.where(rise > 0, switch, np.inf), received[:, -1], remaining[:, 0])
    for array in hull:
        array.setflags(write=False)
    return hull


def _traced_hull(layer_bits: Array, layer_flop: Array) -> Hull:
    """`convex_hull` in JAX, with the next vertex in place of each layer that is none."""
    received = jnp.cumsum(layer_bits, axis=-1)
    remaining = jnp.flip(jnp.cumsum(jnp.flip(layer_flop, -1), axis=-1), -1)
    # With little time layer l asks for more than a later one m, beyond v T = meet[l, m] for less.
    bits, flop = received[..., :, None], remaining[..., :, None]
    later_bits, later_flop = received[..., None, :], remaining[..., None, :]
    rise, cross = later_bits - bits, later_bits * flop - bits * later_flop
    meet = jnp.where(rise > 0, cross / jnp.where(rise > 0, rise, 1.0), jnp.inf)
    layer = jnp.arange(layer_bits.shape[-1])
    pair = (layer[:, None] < layer) & (received[..., :, None] > 0)
    begins = jnp.maximum(jnp.max(jnp.where(pair, meet, -jnp.inf), axis=-2), remaining)
    ends = jnp.min(jnp.where(pair, meet, jnp.inf), axis=-1)
    is_vertex = (received > 0) & (begins < ends)
    # A layer that is no vertex repeats the next one, beyond the last one that.
    following = lax.cummin(jnp.where(is_vertex, layer, layer.size), axis=received.ndim - 1, reverse=True)
    last = jnp.max(jnp.where(is_vertex, layer, 0), axis=-1, keepdims=True)
    chosen = jnp.minimum(following, last)
    some = jnp.any(is_vertex, axis=-1, keepdims=True)
    bits, flop = (
        jnp.where(some, jnp.take_along_axis(table, chosen, -1), 0.0) for table in (received, remaining)
    )
    rise = jnp.diff(bits, axis=-1)
    cross = bits[..., 1:] * flop[..., :-1] - bits[..., :-1] * flop[..., 1:]
    switch = jnp.where(rise > 0, cross / jnp.where(rise > 0, rise, 1.0), jnp.inf)
    return Hull(bits, flop, switch, received[..., -1], remaining[..., 0])


def _vertices(received: np.ndarray, remaining: np.ndarray) -> list[tuple[float, float]]:
    """Returns the hull of one model: no vertex lies on or below the line between its neighbours."""
    chain: list[tuple[float, float]] = []
    # From the last layer to the first S never rises and W never falls. No bits, no rate.
    for bits, flop in zip(received[::-1].tolist(), remaining[::-1].tolist(), strict=True):
        if bits <= 0:
            break
        while chain and chain[-1][0] <= bits:
            chain.pop()
        if chain and flop <= chain[-1][1]:
            continue
        while len(chain) >= 2 and _not_above(chain[-2], chain[-1], (bits, flop)):
            chain.pop()
        chain.append((bits, flop))
    return chain[::-1] or [(0.0, 0.0)]


def _not_above(before: tuple, middle: tuple, after: tuple) -> bool:
    (bits0, flop0), (bits1, flop1), (bits2, flop2) = before, middle, after
    return (bits1 - bits2) * (flop2 - flop0) <= (bits0 - bits2) * (flop2 - flop1)


def least_rate_on_hull(
    bits: Float[ArrayLike, "H ..."],
    flop: Float[ArrayLike, "H ..."],
    switch_flop: Float[ArrayLike, "H-1 ..."],
    total_flop: Float[ArrayLike, "..."],
    slack_s: Float[ArrayLike, " K"],
    speed_flop_s: Float[ArrayLike, " K"],
) -> Float[Array, " K"]:
    """Returns the least rate [bit/s] of one model for many users; infinite if no rate suffices.

    Equal to `latency.least_rate` of all the layers. The model may also be one of each user's own, [H, K].
    """
    workable = speed_flop_s * slack_s
    decided_bits, decided_flop = bits[0], flop[0]
    for vertex in range(len(switch_flop)):
        beyond = workable > switch_flop[vertex]
        decided_bits = jnp.where(beyond, bits[vertex + 1], decided_bits)
        decided_flop = jnp.where(beyond, flop[vertex + 1], decided_flop)
    in_time = (workable >= total_flop) & ((workable > flop[0]) | (bits[0] == 0))
    spare = jnp.where(in_time & (bits[0] > 0), workable - decided_flop, 1.0)
    return jnp.where(in_time, speed_flop_s * decided_bits / spare, jnp.inf)


def latency_on_hull(
    bits: Float[ArrayLike, "H ..."],
    flop: Float[ArrayLike, "H ..."],
    total_flop: Float[ArrayLike, "..."],
    rate_bps: Float[ArrayLike, " K"],
    speed_flop_s: Float[ArrayLike, " K"],
) -> Float[Array, " K"]:
    """Returns the latency [s], from the start, of one model or of each user's [H, K], at positive speeds."""
    moving = rate_bps > 0
    per_bit, per_flop = 1 / jnp.where(moving, rate_bps, 1.0), 1 / speed_flop_s
    slowest = total_flop * per_flop
    for vertex in range(len(bits)):
        downloading = jnp.where(moving | (bits[vertex] == 0), bits[vertex] * per_bit, jnp.inf)
        slowest = jnp.maximum(slowest, downloading + flop[vertex] * per_flop)
    return slowest
