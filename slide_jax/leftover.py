"""Shares out the spectrum that is left once everyone who is served has the least bandwidth that it needs."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from slide_jax.errors import unknown_name
from slide_jax.hull import Hull
from slide_jax.problem import Problem
from slide_jax.provisioning import Need, bandwidth_by
from slide_jax.roots import earliest_gain
from slide_jax.sums import total

LEFT_OVER = ("none", "proportional", "min_max")
"""`none`: it stays unused. `proportional`: all bandwidths grow by the same factor. `min_max`: the latest
completion of all users becomes as early as possible."""

SPARE = 1e-13
"""The share of the spectrum that `min_max` may leave."""


def share_out(
    hull: Hull, problem: Problem, need: Need, served: Bool[ArrayLike, " K"], left_over: str
) -> Float[Array, " K"]:
    """Returns the bandwidth [Hz] of every user that is served, at least what it needs; others get 0.

    Args:
      hull, problem, need: as in `exact`.
      served: a set of users whose needs fit the spectrum.
      left_over: one of `LEFT_OVER`.

    Raises:
      InputError: an unknown policy.
    """
    if left_over not in LEFT_OVER:
        raise unknown_name("left_over", left_over, LEFT_OVER)
    least = jnp.where(served, need.bandwidth_hz, 0.0)
    if left_over == "none":
        return least
    if left_over == "proportional":
        used = total(least)
        return least * jnp.where(used > 0, jnp.maximum(problem.bandwidth_hz / used, 1.0), 1.0)
    return _earliest_end(hull, problem, need, served, least)


def _earliest_end(hull, problem, need, served, least):
    """Finds the earliest time by which all tasks can be finished; nobody gets less than it needs.

    What everybody asks for falls with the time, much like its inverse: searched is where the spectrum over
    it reaches 1.
    """
    users = problem.users

    def bandwidth_at(end_s):
        end_s = jnp.full_like(users.deadline_s, end_s)
        asked = bandwidth_by(end_s, hull, users, need.model, need.frequency_hz, problem.rate_model)
        return jnp.where(served, jnp.maximum(asked, least), 0.0)

    late = jnp.max(jnp.where(served, users.deadline_s, 0.0), initial=0.0)

    def spare(end_s):
        asked = total(bandwidth_at(end_s))
        reach = problem.bandwidth_hz / jnp.where(asked > 0, asked, 1.0)
        return jnp.where(asked > 0, jnp.minimum(reach, 2.0), 2.0) - 1

    return bandwidth_at(earliest_gain(spare, jnp.zeros_like(late), late, SPARE))
