"""Builds the `Allocation` once it is decided which users are served, and with which bandwidths."""

import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float

from slide_jax.admission import TOLERANCE
from slide_jax.float64 import compute_in_float64
from slide_jax.hull import Hull
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import CROWDED_OUT, NO_SPECTRUM, SERVED, Need, outcome


def allocate(
    hull: Hull,
    problem: Problem,
    need: Need,
    served: Bool[ArrayLike, " K"],
    bandwidth_hz: Float[ArrayLike, " K"],
) -> Allocation:
    """Returns the allocation that serves these users, and the reasons why the others are not served.

    Args:
      hull, problem: float64 arrays.
      need: each user's model, clock and least bandwidth.
      served: who is served.
      bandwidth_hz: of those who are served, at least what they need; ignored for the others.
    """
    model = jnp.where(served, need.model, -1)
    frequency = jnp.where(served, need.frequency_hz, 0.0)
    bandwidth = jnp.where(served, bandwidth_hz, 0.0)
    result = outcome(hull, problem.users, model, frequency, bandwidth, problem.rate_model)
    alone = need.bandwidth_hz <= problem.bandwidth_hz * (1 + TOLERANCE)
    refused = jnp.where(alone, CROWDED_OUT, NO_SPECTRUM)
    reason = jnp.where(need.reason == SERVED, jnp.where(served, SERVED, refused), need.reason)
    return Allocation(
        model=model,
        bandwidth_hz=bandwidth,
        frequency_hz=frequency,
        latency_s=result.latency_s,
        energy_j=result.energy_j,
        reason=reason.astype(jnp.int32),
    )


def allocate_least(problem: Problem, need: Need, served: Bool[ArrayLike, " K"]) -> Allocation:
    """Returns the allocation that serves these users with their least bandwidths, as NumPy arrays."""
    return compute_in_float64(allocate, problem, need, served, need.bandwidth_hz)
