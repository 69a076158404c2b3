"""Scalar equations solved element by element, with jaxopt: derivatives of their roots, and bisection.

A residual has one unknown per element and rises with it. Where its slope is not a finite number above 0 there
is no root to differentiate, and the derivatives are 0.

Not everything that looks like a root uses these: `rates.efficiency_at_load`, `relaxed._find_price`,
`admission.admit` and `quantise._climb` say why, with measurements (100,000 users, 2 CPU cores).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jaxopt
from jax import lax
from jaxtyping import Array, ArrayLike, Float

HALVINGS = 60


def differentiable_root(
    residual: Callable[..., Array], has_aux: bool = False
) -> Callable[[Callable], Callable]:
    """Returns a decorator that gives a solver of `residual(root, *args) = 0` its reverse-mode derivatives.

    The solver takes `(guess, *args)` and returns the root, or with `has_aux` the root and something that has
    no derivatives. The implicit function theorem gives d root / d args = -(d residual / d args) / (d residual
    / d root), so that the steps of the solver are not differentiated.
    """
    return jaxopt.implicit_diff.custom_root(residual, has_aux=has_aux, solve=_divide_by_slope)


def root_tangent(
    residual: Callable[..., Array], root: Float[ArrayLike, "..."], args: tuple, tangents: tuple
) -> Float[Array, "..."]:
    """Returns the forward-mode derivative of the root of `residual(root, *args) = 0`."""
    return jaxopt.implicit_diff.root_jvp(residual, root, args, tangents, solve=_divide_by_slope)


def bisect(
    residual: Callable[[Float[ArrayLike, ""]], Float[ArrayLike, ""]],
    low: Float[ArrayLike, ""],
    high: Float[ArrayLike, ""],
) -> Float[Array, ""]:
    """Returns the upper end of the bracket around a root after `HALVINGS` halvings.

    Args:
      residual: of one number; below 0 on one side of the root and not on the other.
      low, high: the bracket; where it holds no change of sign, `high` is returned.
    """
    # No tolerance: the last halvings decide whether an exact fit is a fit.
    search = jaxopt.Bisection(residual, low, high, maxiter=HALVINGS, tol=-1.0, check_bracket=False)
    return search.run().state.high


def earliest_gain(
    gain: Callable[[Float[ArrayLike, ""]], Float[ArrayLike, ""]],
    low: Float[ArrayLike, ""],
    high: Float[ArrayLike, ""],
    tolerance: float,
) -> Float[Array, ""]:
    """Returns the least number found whose gain is not below 0, in about ten evaluations; differentiable.

    False position with the Illinois rule, of which every fifth step is a halving. The derivatives are those
    of the root.

    Args:
      gain: rising from -1 or more to 1 or less; the nearer to a line the fewer evaluations.
      low, high: the bracket; where it holds no change of sign, `high` is returned.
      tolerance: a gain from 0 to this one ends the search.
    """

    def search(gain, guess):
        def going(state):
            low, high, *_, actual, steps = state
            return (actual > tolerance) & (high - low > 4 * jnp.finfo(high.dtype).eps * high) & (steps < 200)

        def step(state):
            low, high, gain_low, gain_high, above, actual, steps = state
            # Aimed a little beyond the root, on the side that counts.
            part = (gain_high - tolerance / 2) / jnp.maximum(gain_high - gain_low, tolerance)
            point = high - jnp.where(steps % 5 == 4, 0.5, part) * (high - low)
            point = jnp.where((point > low) & (point < high), point, low + (high - low) / 2)
            here = gain(point)
            reached = here >= 0
            # The end that stays a second time counts half, so that the other one moves too.
            weight = jnp.where(reached == above, 0.5, 1.0)
            return (
                jnp.where(reached, low, point),
                jnp.where(reached, point, high),
                jnp.where(reached, gain_low * weight, here),
                jnp.where(reached, here, gain_high * weight),
                reached,
                jnp.where(reached, here, actual),
                steps + 1,
            )

        ends = gain(guess)
        begin = (lax.stop_gradient(low), guess, jnp.full_like(ends, -1.0), ends, ends < 0, ends, jnp.int32(0))
        return lax.while_loop(going, step, begin)[1]

    return lax.custom_root(gain, high, search, _divide_by_slope)


def _divide_by_slope(slope_times: Callable[[Any], Any], right_side: Array) -> Array:
    """Solves the linear system of implicit differentiation, whose matrix is diagonal."""
    slope = slope_times(jnp.ones_like(right_side))
    usable = (slope > 0) & jnp.isfinite(slope)
    return jnp.where(usable, right_side / jnp.where(usable, slope, 1.0), 0.0)
