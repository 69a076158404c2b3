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


def _divide_by_slope(slope_times: Callable[[Any], Any], right_side: Array) -> Array:
    """Solves the linear system of implicit differentiation, whose matrix is diagonal."""
    slope = slope_times(jnp.ones_like(right_side))
    usable = (slope > 0) & jnp.isfinite(slope)
    return jnp.where(usable, right_side / jnp.where(usable, slope, 1.0), 0.0)
