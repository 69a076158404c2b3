"""Sums that do not depend on their order: float32 numbers added as integers.

Floating-point sums change with the order of their terms, so with the size of a chunk, the grouping of
clients and the number of devices. Here each term is rounded once, to a multiple of 2^-40, and from
there on everything is integer arithmetic: any grouping gives the same bits.

A number is high * 2^-16 + low * 2^-40 in two int32. Sums must stay below 2^15 in magnitude, and at most
`MOST_TERMS` terms may be added before `settle` carries what has gathered in `low`.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hfedmoe_jax.arrays import AnyArray

HIGH_BITS, LOW_BITS = 16, 24
MOST_TERMS = 96  # 2^31 / 2^24 is 128

LARGEST = 2.0**14
"""Terms beyond it are cut to it."""

MOST_MEMBERS = 2**15 - 1
"""Terms of magnitude at most one whose sum has room."""


def largest_term(members: int) -> float:
    """Returns the magnitude that terms must be cut to, so that the sum of so many has room."""
    return min(LARGEST, power_below((2**15 - 1) / members))


def power_below(number: float) -> float:
    """Returns the largest power of two that is at most `number`."""
    return 2.0 ** math.floor(math.log2(number))


class Fixed(NamedTuple):
    """An array of fixed-point numbers."""

    high: Int[Array, "*shape"]
    low: Int[Array, "*shape"]


def fixed_zeros(shape: tuple[int, ...]) -> Fixed:
    """Returns zeros."""
    return Fixed(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))


def to_fixed(values: Float[AnyArray, "*shape"]) -> Fixed:
    """Returns the nearest fixed-point numbers, `low` in [0, 2^24].

    >>> fixed = to_fixed(jnp.float32(-0.25))
    >>> int(fixed.high), int(fixed.low), float(from_fixed(fixed))
    (-16384, 0, -0.25)
    """
    scaled = jnp.clip(values.astype(jnp.float32), -LARGEST, LARGEST) * jnp.float32(2**HIGH_BITS)
    whole = jnp.floor(scaled)
    rest = jnp.round((scaled - whole) * jnp.float32(2**LOW_BITS))
    return Fixed(whole.astype(jnp.int32), rest.astype(jnp.int32))


def from_fixed(fixed: Fixed) -> Float[Array, "*shape"]:
    """Returns float32 numbers."""
    high = fixed.high.astype(jnp.float32) * jnp.float32(2.0**-HIGH_BITS)
    return high + fixed.low.astype(jnp.float32) * jnp.float32(2.0 ** -(HIGH_BITS + LOW_BITS))


def add_terms(total: Fixed, values: Float[Array, "terms ..."]) -> Fixed:
    """Adds values over their leading axis."""
    terms = to_fixed(values)
    return Fixed(*(t + jnp.sum(x, axis=0, dtype=jnp.int32) for t, x in zip(total, terms, strict=True)))


def add_rows(total: Fixed, index: Int[Array, " terms"], values: Float[Array, "terms ..."]) -> Fixed:
    """Adds values to the rows that `index` names; an index beyond the last row adds nothing."""
    terms = to_fixed(values)
    return Fixed(*(t.at[index].add(x, mode="drop") for t, x in zip(total, terms, strict=True)))


def settle(total: Fixed) -> Fixed:
    """Carries what has gathered in `low`; the same numbers, as they were never added in parts."""
    return Fixed(total.high + (total.low >> LOW_BITS), total.low & (2**LOW_BITS - 1))


def merge_over_devices(total: Fixed) -> Fixed:
    """Adds sums over their leading axis, of at most 2^18 devices; the result is settled."""
    total = settle(total)
    high = jnp.sum(total.high, axis=0, dtype=jnp.int32)
    if total.low.shape[0] <= MOST_TERMS:  # two arrays to move between devices instead of three
        return settle(Fixed(high, jnp.sum(total.low, axis=0, dtype=jnp.int32)))
    half = LOW_BITS // 2
    lower = jnp.sum(total.low & (2**half - 1), axis=0, dtype=jnp.int32)
    upper = jnp.sum(total.low >> half, axis=0, dtype=jnp.int32) + (lower >> half)
    low = ((upper & (2**half - 1)) << half) + (lower & (2**half - 1))
    return Fixed(high + (upper >> half), low)
