"""The relaxed problem, differentiable: users may be served in part, and spectrum has a price.

Clock, model and bandwidth are eliminated first: whatever a user gets, the fastest clock that the energy
allows and the model of least bandwidth serve it best (`exact`), so user k with the share y_k of the spectrum
is served to the part z_k = min(1, y_k / b_k), b_k its least bandwidth. What remains is concave,

    maximise  sum_k phi(z_k)   over 0 <= z_k <= 1,  sum_k b_k z_k <= B,
    phi(z) = (z - tau z^2 / 2) / (1 - tau / 2),     phi(0) = 0, phi(1) = 1, phi(z) >= z,

and its optimum is a projection onto a section of the box, z_k = clip((1 - p b_k / B) / tau, 0, 1): one
number, the price p of the spectrum, has to be found: the root of a decreasing function, by a safeguarded
Newton iteration that starts from a guess or from the price of a similar problem. Derivatives follow from the
implicit function theorem (`roots`, reverse mode). Users who need less are served to a larger part, so
rounding keeps the users of least bandwidth, as `exact` does; Lagrange duality proves how good the answer is.

A descent over shares and clocks is not needed: jaxopt's projected gradient over the fractions ends at the
same ones (`tests/slide_jax/test_relaxed.py`), but each of its steps is a projection, which is itself a search
for a price.

Axis: K users. The functions of arrays take float64.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from slide_jax.admission import TOLERANCE, admit
from slide_jax.allocation import allocate
from slide_jax.buckets import compute_in_bucket
from slide_jax.hull import Hull
from slide_jax.leftover import share_out
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import provision
from slide_jax.roots import differentiable_root
from slide_jax.sums import total

TAU = 0.1
"""Curvature tau of the relaxed objective: users whose needs differ by less share the margin."""

RESIDUAL = 1e-13
MAX_STEPS = 200


class Relaxation(NamedTuple):
    """The optimum of the relaxed problem.

    Attributes:
      fraction: z, the part to which each user is served; 0 for whoever needs more than the spectrum.
      served: the objective, at least the users that any allocation serves.
      price_per_hz: the derivative of `served` by the spectrum [users/Hz]; 0 if there is enough for all.
      steps: evaluations of the search for the price.
    """

    fraction: Float[Array, " K"]
    served: Float[Array, ""]
    price_per_hz: Float[Array, ""]
    steps: Int[Array, ""]


def relaxed(problem: Problem, left_over: str = "none") -> Allocation:
    """Returns a rounded optimum of the relaxed problem and, in `upper_bound`, what it proves.

    Args:
      problem: of any size.
      left_over: what becomes of spectrum that nobody needs: one of `leftover.LEFT_OVER`.

    Raises:
      InputError: an unknown policy.
    """
    return relaxed_from(problem, None, left_over)[0]


def relaxed_from(
    problem: Problem, start: Relaxation | None, left_over: str = "none"
) -> tuple[Allocation, Relaxation]:
    """Returns the same answer and its relaxation, from which a problem like it can start.

    Args:
      problem, left_over: as in `relaxed`.
      start: of a problem like this one, of any number of users; None: start cold.

    Raises:
      InputError: an unknown policy.
    """
    price = np.float64(0.0 if start is None else start.price_per_hz)
    allocation, relaxation = compute_in_bucket(decide_relaxed_from, problem, price, left_over=left_over)
    bound = float(allocation.upper_bound)
    return dataclasses.replace(allocation, upper_bound=bound, solver="relaxed"), relaxation


def decide_relaxed(hull: Hull, problem: Problem, left_over: str = "none") -> Allocation:
    """`relaxed` as a pure function of float64 arrays: under `jit`, and `vmap` over drops.

    Args:
      hull: of the catalogue, by `convex_hull`.
      problem: float64 numbers.
      left_over: one of `leftover.LEFT_OVER`.
    """
    return decide_relaxed_from(hull, problem, 0.0, left_over)[0]


def decide_relaxed_from(
    hull: Hull, problem: Problem, start_price_per_hz: Float[ArrayLike, ""], left_over: str = "none"
) -> tuple[Allocation, Relaxation]:
    """As `decide_relaxed`, from a price [users/Hz] (0: none known), and with the relaxation."""
    need = provision(hull, problem)
    relaxation = relax(need.bandwidth_hz, problem.bandwidth_hz, start_price_per_hz)
    served = rounded(relaxation.fraction, need.bandwidth_hz, problem.bandwidth_hz)
    bandwidth = share_out(hull, problem, need, served, left_over)
    bound = certificate(served, need.bandwidth_hz, problem.bandwidth_hz)
    allocation = allocate(hull, problem, need, served, bandwidth)
    return dataclasses.replace(allocation, upper_bound=bound), relaxation


@jax.jit  # else every call outside a jit would compile its loop anew
def relax(
    bandwidth_hz: Float[ArrayLike, " K"],
    spectrum_hz: Float[ArrayLike, ""],
    start_price_per_hz: Float[ArrayLike, ""] = 0.0,
) -> Relaxation:
    """Returns the optimum of the relaxed problem; differentiable, and batched by `vmap`.

    Args:
      bandwidth_hz: least bandwidths b, at least 0; infinite: cannot be served.
      spectrum_hz: B, at least 0.
      start_price_per_hz: the price of a problem like this one [users/Hz]; 0: none known.

    Returns:
      The relaxation. The derivatives of `served` are those of the optimal value: `price_per_hz` by B and
      -`price_per_hz` * `fraction` by b.
    """
    bandwidth_hz, spectrum_hz = jnp.asarray(bandwidth_hz), jnp.asarray(spectrum_hz)
    reachable = (bandwidth_hz <= spectrum_hz * (1 + TOLERANCE)) & (bandwidth_hz < jnp.inf)
    whole = jnp.where(spectrum_hz > 0, spectrum_hz, 1.0)
    part = jnp.where(reachable, bandwidth_hz, 0.0) / whole
    start = start_price_per_hz * whole * (1 - TAU / 2)
    price, steps = _find_price(start, part)
    price = jnp.where(total(part) <= 1, 0.0, price)
    fraction = jnp.where(reachable, _fraction(price, part), 0.0)
    bend = TAU / (2 - TAU)
    served = total(fraction + bend * fraction * (1 - fraction))  # phi, exactly 1 at 1
    return Relaxation(fraction, served, price / whole / (1 - TAU / 2), steps)


def rounded(
    fraction: Float[ArrayLike, " K"], bandwidth_hz: Float[ArrayLike, " K"], spectrum_hz: Float[ArrayLike, ""]
) -> Bool[Array, " K"]:
    """Returns who is served: whoever is served whole, then of the others those who need least, while it fits.

    Args:
      fraction: of the relaxed problem; of any other, the answer is feasible too.
      bandwidth_hz, spectrum_hz: as in `relax`.
    """
    whole = (fraction >= 1) & (bandwidth_hz < jnp.inf)
    whole &= total(jnp.where(whole, bandwidth_hz, 0.0)) <= spectrum_hz * (1 + TOLERANCE)
    taken = total(jnp.where(whole, bandwidth_hz, 0.0))
    room = spectrum_hz - taken / (1 + TOLERANCE)
    return whole | admit(jnp.where(whole, jnp.inf, bandwidth_hz), jnp.maximum(room, 0.0))


def certificate(
    served: Bool[ArrayLike, " K"], bandwidth_hz: Float[ArrayLike, " K"], spectrum_hz: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    """Returns a number of users that no allocation exceeds, by Lagrange duality.

    At any price q >= 0 of a hertz nobody serves more than q B + sum_k max(0, 1 - q b_k): whoever is served
    is worth 1 and has to pay. The price taken is that at which the first of those left out would break
    even; where `served` are the users of least need, the bound is their number.

    Args:
      served: any set of users: a poor one makes a poor bound, never a wrong one.
      bandwidth_hz, spectrum_hz: as in `relax`.
    """
    limit = spectrum_hz * (1 + TOLERANCE)
    reachable = bandwidth_hz <= limit
    cheapest_left_out = jnp.min(jnp.where(reachable & ~served, bandwidth_hz, jnp.inf), initial=jnp.inf)
    price = _quotient(1.0, cheapest_left_out)
    profit = jnp.where(reachable, 1 - price * jnp.where(reachable, bandwidth_hz, 0.0), 0.0)
    bound = price * limit + total(jnp.maximum(profit, 0.0))
    # What the sums may have lost by rounding.
    return jnp.floor(bound + 1e-9 * (1 + bound))


def _fraction(price, part):
    return jnp.clip((1 - price * part) / TAU, 0.0, 1.0)


def _unsold(price, part):
    """Returns the part of the spectrum that nobody asks for at a price."""
    return 1.0 - total(part * _fraction(price, part))


@differentiable_root(_unsold, has_aux=True)
def _find_price(start, part):
    """Returns the price at which the spectrum is sold out, and the number of evaluations.

    Newton on log asked over log price, nearly a line when there are many users. Whenever a step does not
    halve the residual, the next one halves the bracket, outside of which Newton never goes.

    Measured against it, 1.8 ms: `jaxopt.Bisection` takes 5.9 ms for the same price to 1e-13, and
    `jaxopt.projection.projection_box_section` 3.7 ms for fractions to 2e-6, which leave spectrum unsold.

    Args:
      start: a guess of the price; 0: none. Then the price that fits users whose needs are spread evenly
        between 0 and twice the mean is taken.
      part: b / B in [0, 1].
    """
    wanted = total(part)
    asking = jnp.sum(part > 0, dtype=part.dtype)
    lowest, highest = jnp.full_like(wanted, 1 - TAU), jnp.maximum(asking, 1.0)
    start = jnp.where(start > 0, start, asking / (2 * jnp.sqrt(jnp.maximum(wanted, 1.0))))

    def going(state):
        _, _, _, residual, steps = state
        return (jnp.abs(residual) > RESIDUAL) & (steps < MAX_STEPS)

    def step(state):
        low, high, price, previous, steps = state
        fraction = _fraction(price, part)
        asked = total(part * fraction)
        margin = total(jnp.where((fraction > 0) & (fraction < 1), part**2, 0.0)) / TAU
        residual = jnp.log(asked)
        low, high = jnp.where(residual > 0, price, low), jnp.where(residual > 0, high, price)
        newton = price * jnp.exp(_quotient(residual * asked, price * margin))
        inside = (newton > low) & (newton < high) & (jnp.abs(residual) < 0.5 * jnp.abs(previous))
        found, closed = jnp.abs(residual) <= RESIDUAL, high <= low * (1 + RESIDUAL)
        # At the upper end what is asked fits for certain.
        price = jnp.where(
            found, price, jnp.where(closed, high, jnp.where(inside, newton, jnp.sqrt(low * high)))
        )
        return low, high, price, jnp.where(found | closed, 0.0, residual), steps + 1

    begin = (
        lowest,
        highest,
        jnp.clip(start, lowest, highest),
        jnp.where(wanted > 1, jnp.inf, 0.0),
        jnp.int32(0),
    )
    _, _, price, _, steps = lax.while_loop(going, step, begin)
    return price, steps


def _quotient(numerator, denominator):
    """Returns a quotient, 0 where the denominator is 0 or infinite."""
    usable = (denominator != 0) & jnp.isfinite(denominator)
    return jnp.where(usable, numerator / jnp.where(usable, denominator, 1.0), 0.0)
