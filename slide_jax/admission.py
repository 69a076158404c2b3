"""Admission: the users of least bandwidth are served, as many as fit the spectrum.

That serves the most users: exchanging a served user for one who needs less bandwidth keeps the sum within the
spectrum. Instead of sorting, the largest need up to which everyone fits is searched by halving. The ends of
the search are needs of users, so it ends at the exact one at any scale and in any arithmetic: also where
float64 is a pair of float32, as on TPU. `jaxopt.Bisection` is accurate only relative to the largest
bandwidth: of users whose bandwidths spread from 1e-300 to 1e6 Hz it admits none where 64,727 fit.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from slide_jax.sums import total

TOLERANCE = 1e-12
"""Relative tolerance of the spectrum constraint, so that an exact fit is not lost to rounding."""


def admit(bandwidth_hz: Float[ArrayLike, " K"], spectrum_hz: Float[ArrayLike, ""]) -> Bool[Array, " K"]:
    """Returns the largest set of users whose bandwidths fit the spectrum; of equals the first ones.

    Args:
      bandwidth_hz: what each user needs, at least 0; infinite: cannot be served.
      spectrum_hz: the available spectrum.
    """
    need, spectrum_hz = lax.stop_gradient((jnp.asarray(bandwidth_hz), spectrum_hz))
    limit = spectrum_hz * (1 + TOLERANCE)
    largest = jnp.max(jnp.where(need < jnp.inf, need, 0.0), initial=0.0)

    def next_above(threshold):
        return jnp.min(jnp.where(need > threshold, need, jnp.inf), initial=jnp.inf)

    # Everyone up to `low` fits, in `used`; the least need above it is `above`, and up to `high` not all fit.
    def searching(state):
        _, _, above, high = state
        return above < high

    def step(state):
        low, used, above, high = state
        middle = jnp.where(high < jnp.inf, _between(above, high), largest)
        asked = total(jnp.where(need <= middle, need, 0.0))
        fits = asked <= limit
        too_much = jnp.max(jnp.where(need <= middle, need, 0.0), initial=0.0)
        return (
            jnp.where(fits, middle, low),
            jnp.where(fits, asked, used),
            jnp.where(fits, next_above(middle), above),
            jnp.where(fits, high, too_much),
        )

    zero = jnp.zeros((), need.dtype)
    begin = (zero, zero, next_above(zero), jnp.full((), jnp.inf, need.dtype))
    low, used, _, high = lax.while_loop(searching, step, begin)
    # Of those who need as much as the first who does not fit, some may.
    equals = (need == high) & (high < jnp.inf)
    return (need <= low) | first_of(equals, jnp.floor((limit - used) / high))


def first_of(members: Bool[ArrayLike, " K"], count: Float[ArrayLike, ""]) -> Bool[Array, " K"]:
    """Returns the first `count` of the members."""
    return members & (jnp.cumsum(members, dtype=jnp.int32) <= count)


def _between(low, high):
    """Returns a number from low to below high that halves the digits, or else the range, between them."""
    wide = high > 4 * low
    middle = jnp.where(wide, jnp.sqrt(low) * jnp.sqrt(high), low + (high - low) / 2)
    return jnp.where((middle >= low) & (middle < high), middle, low)
