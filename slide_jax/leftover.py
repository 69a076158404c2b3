"""What becomes of spectrum that is left when everyone who can be served has the least that they need."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from slide_jax.hull import Hull
from slide_jax.problem import Problem
from slide_jax.provisioning import Need, bandwidth_by

LEFT_OVER = ("none", "proportional", "min_max")
"""Nobody; everyone served, in proportion to what they have; so that the last task ends as early as can be."""

HALVINGS = 60


def share_out(
    hull: Hull, problem: Problem, need: Need, served: Bool[Array, " K"], left_over: str
) -> Float[Array, " K"]:
    """Returns the bandwidth [Hz] of every user that is served, at least what it needs; others get 0.

    Args:
      hull, problem, need: as in `exact`.
      served: a set of users whose needs fit the spectrum.
      left_over: one of `LEFT_OVER`.
    """
    least = jnp.where(served, need.bandwidth_hz, 0.0)
    if left_over == "none":
        return least
    if left_over == "proportional":
        total = jnp.sum(least)
        return least * jnp.where(total > 0, jnp.maximum(problem.bandwidth_hz / total, 1.0), 1.0)
    return _earliest_end(hull, problem, need, served, least)


def _earliest_end(hull, problem, need, served, least):
    """Bisects the time at which the last task can be finished; nobody gets less than it needs."""
    users = problem.users

    def bandwidth_at(end_s):
        end_s = jnp.full_like(users.deadline_s, end_s)
        asked = bandwidth_by(end_s, hull, users, need.model, need.frequency_hz, problem.rate_model)
        return jnp.where(served, jnp.maximum(asked, least), 0.0)

    def halve(_, bracket):
        early, late = bracket
        middle = early + (late - early) / 2
        fits = jnp.sum(bandwidth_at(middle)) <= problem.bandwidth_hz
        return jnp.where(fits, early, middle), jnp.where(fits, middle, late)

    late = jnp.max(jnp.where(served, users.deadline_s, 0.0), initial=0.0)
    _, late = lax.fori_loop(0, HALVINGS, halve, (jnp.zeros_like(late), late))
    return bandwidth_at(late)
