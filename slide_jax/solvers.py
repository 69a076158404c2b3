"""The solvers by name, and the door that times them."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from slide_jax import baselines
from slide_jax.errors import unknown_name
from slide_jax.exact import exact
from slide_jax.milp import milp
from slide_jax.problem import Allocation, Problem
from slide_jax.relaxed import relaxed

SOLVERS: dict[str, Callable[..., Allocation]] = {
    "exact": exact,
    "relaxed": relaxed,
    "milp": milp,
    "dai": baselines.dai,
    "equal_share": baselines.equal_share,
    "proportional_share": baselines.proportional_share,
    "best_channel_first": baselines.best_channel_first,
    "earliest_deadline_first": baselines.earliest_deadline_first,
    "random_order": baselines.random_order,
}
"""Functions `(problem, **options) -> Allocation`; a new solver is one more entry."""


def solve(problem: Problem, solver: str = "exact", **options: Any) -> Allocation:
    """Returns what a solver makes of a problem, with the seconds that it took in `solve_s`.

    The first call for a shape compiles, and its seconds say so.

    Args:
      problem: by `read_scenario`, `make_problem` or `sample_problem`.
      solver: a name from `SOLVERS`.
      **options: of that solver, e.g. `left_over="min_max"` of `exact`.

    Raises:
      InputError: an unknown solver, or an option that it refuses.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    begun = time.perf_counter()
    allocation = SOLVERS[solver](problem, **options)
    return dataclasses.replace(allocation, solver=solver, solve_s=time.perf_counter() - begun)
