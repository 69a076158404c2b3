"""Who is served: the users of least bandwidth, as many as the spectrum holds.

Exchanging an admitted user for one who needs less never breaks the sum, so some optimum admits the users
of least bandwidth. No sort is needed: the threshold is bisected on the bit patterns of float64, which
are ordered as the numbers are.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

TOLERANCE = 1e-12
"""An exact fit is a fit: what is used may exceed what there is by this part of it."""


def admit(bandwidth_hz: Float[Array, " K"], spectrum_hz: Float[Array, ""]) -> Bool[Array, " K"]:
    """Returns the largest set of users whose bandwidths fit the spectrum; of equals the first ones.

    Args:
      bandwidth_hz: what each user needs, float64, at least 0; infinite: cannot be served.
      spectrum_hz: what there is.
    """
    limit = spectrum_hz * (1 + TOLERANCE)

    def total(threshold):
        return jnp.sum(jnp.where(bandwidth_hz <= threshold, bandwidth_hz, 0.0))

    # The largest threshold up to which everyone fits; at 0 everyone does.
    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        fits = total(_number(middle)) <= limit
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    infinite = lax.bitcast_convert_type(jnp.full((), jnp.inf, jnp.float64), jnp.int64)
    low, _ = lax.fori_loop(0, 64, halve, (jnp.zeros((), jnp.int64), infinite))
    threshold = _number(low)
    # The next number is the need of those who do not all fit; the first of them may.
    next_need = _number(low + 1)
    equals = (bandwidth_hz == next_need) & (next_need < jnp.inf)
    room = jnp.floor((limit - total(threshold)) / next_need)
    return (bandwidth_hz <= threshold) | first_of(equals, room)


def first_of(members: Bool[Array, " K"], count: Float[Array, ""]) -> Bool[Array, " K"]:
    """Returns the first `count` of the members."""
    position = jnp.arange(members.shape[0])

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) // 2
        fits = jnp.sum(members & (position < middle)) <= count
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    size = members.shape[0]
    low, _ = lax.fori_loop(0, size.bit_length() + 1, halve, (0, size + 1))
    return members & (position < low)


def _number(pattern):
    return lax.bitcast_convert_type(pattern, jnp.float64)
