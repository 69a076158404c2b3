"""The exact optimum in polynomial time, O(I L + K I h) for K users and I models of L layers.

1. Clock: latency falls and energy rises with the clock, so each user runs the fastest clock that its energy
   budget allows (`device`).
2. Bandwidth: the least bandwidth that meets the deadline has a closed form (`latency`), in which only h of
   the L layers matter, 2 to 10 for common models (`hull`).
3. Provisioning: each user gets the admissible model of least bandwidth (`provisioning`).
4. Admission: the users of least bandwidth are served, as many as fit (`admission`).

Source: arXiv 2512.20946. The modules named give short proofs. All arrays are float64, whatever precision the
caller has set (`float64`).
"""

import dataclasses

from slide_jax.admission import admit
from slide_jax.allocation import allocate
from slide_jax.buckets import compute_in_bucket
from slide_jax.hull import Hull
from slide_jax.leftover import share_out
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import provision


def exact(problem: Problem, left_over: str = "none") -> Allocation:
    """Returns an allocation that serves the most users, and why the others are not served.

    Args:
      problem: of any size; a million users take a fraction of a second.
      left_over: what becomes of spectrum that nobody needs: one of `leftover.LEFT_OVER`.

    Raises:
      InputError: an unknown policy.
    """
    allocation = compute_in_bucket(decide_exact, problem, left_over=left_over)
    return dataclasses.replace(allocation, upper_bound=float(allocation.throughput), solver="exact")


def decide_exact(hull: Hull, problem: Problem, left_over: str = "none") -> Allocation:
    """`exact` as a pure function of float64 arrays: under `jit`, and `vmap` over drops.

    Args:
      hull: of the catalogue, by `convex_hull`.
      problem: float64 numbers.
      left_over: one of `leftover.LEFT_OVER`.
    """
    need = provision(hull, problem)
    served = admit(need.bandwidth_hz, problem.bandwidth_hz)
    bandwidth = share_out(hull, problem, need, served, left_over)
    return allocate(hull, problem, need, served, bandwidth)
