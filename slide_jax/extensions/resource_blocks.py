"""Spectrum that is handed out in whole resource blocks.

The least number of blocks grows with the least bandwidth, so a user's model stays the one of least
bandwidth, and the exchange argument of `admission` holds for blocks as it does for hertz: still exact.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from slide_jax.admission import TOLERANCE, admit
from slide_jax.allocation import allocate
from slide_jax.errors import InputError
from slide_jax.float64 import compute_in_float64
from slide_jax.hull import Hull
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import provision


def resource_blocks(problem: Problem, block_hz: float) -> Allocation:
    """Returns an allocation that serves the most users, each with a whole number of blocks.

    To be verified against the problem whose spectrum is the whole blocks of this one: there a user who needs
    more blocks than there are needs more than the whole spectrum.

    Args:
      problem: of any size.
      block_hz: of one block, e.g. 180e3 in LTE; what is left of the spectrum beside whole blocks is idle.

    Raises:
      InputError: a block that is not above 0 and finite.
    """
    if not 0 < block_hz < float("inf"):
        raise InputError("block_hz", block_hz, "must be a finite number above 0", "give hertz, e.g. 180e3")
    allocation = compute_in_float64(decide_resource_blocks, problem, np.float64(block_hz))
    bound = float(allocation.throughput)
    return dataclasses.replace(allocation, upper_bound=bound, solver="resource_blocks")


def decide_resource_blocks(hull: Hull, problem: Problem, block_hz: Float[ArrayLike, ""]) -> Allocation:
    """`resource_blocks` as a pure function of float64 arrays: under `jit`, and `vmap` over drops."""
    need = provision(hull, problem)
    # An exact fit is a fit, of a user into its blocks and of the blocks into the spectrum.
    blocks = jnp.ceil(need.bandwidth_hz / block_hz * (1 - TOLERANCE))
    available = jnp.floor(problem.bandwidth_hz / block_hz * (1 + TOLERANCE))
    need = need._replace(bandwidth_hz=blocks * block_hz)
    return allocate(hull, problem, need, admit(blocks, available), need.bandwidth_hz)
