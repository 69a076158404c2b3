"""Admission: the users of least bandwidth are served, as many as fit the spectrum.

That serves the most users: exchanging a served user for one who needs less bandwidth keeps the sum within the
spectrum. Instead of sorting, the largest bandwidth up to which everyone fits is bisected, on the bit patterns
of float64: they are ordered like the numbers, so 64 halvings find the exact number at any scale.
`jaxopt.Bisection` over the numbers takes 4.5 ms instead of 6.1, but is accurate only relative to the largest
bandwidth: of users whose bandwidths spread from 1e-300 to 1e6 Hz it admits none where 64,727 fit.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

TOLERANCE = 1e-12
"""Relative tolerance of the spectrum constraint, so that an exact fit is not lost to rounding."""


def admit(bandwidth_hz: Float[ArrayLike, " K"], spectrum_hz: Float[ArrayLike, ""]) -> Bool[Array, " K"]:
    """Returns the largest set of users whose bandwidths fit the spectrum; of equals the first ones.

    Args:
      bandwidth_hz: what each user needs, float64, at least 0; infinite: cannot be served.
      spectrum_hz: the available spectrum.
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


def first_of(members: Bool[ArrayLike, " K"], count: Float[ArrayLike, ""]) -> Bool[Array, " K"]:
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
