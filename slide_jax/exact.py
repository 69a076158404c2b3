"""The exact optimum in polynomial time: O(I L + K I h) for K users and I models of L layers, h deciding.

1. Clock: latency falls and energy rises with it, so the fastest that the energy allows (`device`).
2. Bandwidth: the least, in closed form (`latency`, `hull`).
3. Provisioning: the admissible model of least bandwidth (`provisioning`).
4. Admission: the users of least bandwidth, as many as fit (`admission`).

Source: arXiv 2512.20946; the proofs in short stand at each step. Everything is float64, whatever the
caller's setting: thresholds and sums over a million users decide.
"""

import dataclasses

from slide_jax.admission import admit
from slide_jax.allocation import allocate
from slide_jax.errors import unknown_name
from slide_jax.float64 import compute_in_float64
from slide_jax.hull import Hull
from slide_jax.leftover import LEFT_OVER, share_out
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import provision


def exact(problem: Problem, left_over: str = "none") -> Allocation:
    """Returns an allocation that serves the most users, and why the others are not served.

    Args:
      problem: of any size; a million users take a fraction of a second.
      left_over: what becomes of spectrum that nobody needs: one of `LEFT_OVER`.

    Raises:
      InputError: an unknown policy.
    """
    if left_over not in LEFT_OVER:
        raise unknown_name("left_over", left_over, LEFT_OVER)
    allocation = compute_in_float64(decide_exact, problem, left_over=left_over)
    return dataclasses.replace(allocation, upper_bound=float(allocation.throughput), solver="exact")


def decide_exact(hull: Hull, problem: Problem, left_over: str = "none") -> Allocation:
    """`exact` as a pure function of float64 arrays: under `jit`, and `vmap` over drops.

    Args:
      hull: of the catalogue, by `convex_hull`.
      problem: float64 numbers.
      left_over: one of `LEFT_OVER`.
    """
    need = provision(hull, problem)
    served = admit(need.bandwidth_hz, problem.bandwidth_hz)
    bandwidth = share_out(hull, problem, need, served, left_over)
    return allocate(hull, problem, need, served, bandwidth)
