"""The table of solvers, and `solve`, which calls one by name and measures its time.

The results table, the sweeps, the figures and the checks of a config all read `SOLVERS`: a new solver is one
more entry.

>>> from slide_jax.exact import decide_exact
>>> SOLVERS["mine"] = pure_solver(decide_exact, label="my own")
>>> "mine" in sweep_solvers()
True
>>> del SOLVERS["mine"]
"""

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from slide_jax import baselines
from slide_jax.buckets import compute_in_bucket
from slide_jax.errors import InputError, unknown_name
from slide_jax.exact import decide_exact, exact
from slide_jax.milp import milp
from slide_jax.problem import Allocation, Problem, refuse_traced
from slide_jax.relaxed import decide_relaxed, relaxed


class Solver(NamedTuple):
    """A solver, and all that tables, sweeps and figures need to know of it.

    Attributes:
      solve: `(problem, **options) -> Allocation` of NumPy arrays.
      decide: `(hull, problem) -> Allocation`, the same as a pure function of float64 arrays under `jit` and
        `vmap`, for the sweeps over drops; None: the solver is left out of them.
      label: what figures call it; empty: its name.
      options: those that `solve` takes; a run passes its own on: `left_over`, `time_limit_s`, `seed`.
      needs_key: whether `decide` takes a PRNG key as its third argument.
      download_first: whether it solves the problem under download-then-infer (DAI), that is
        `baselines.download_then_infer(problem)`. Its answers are verified against that problem and have no
        gap to the optimum under SLIDE.
      max_users: a run of all solvers leaves it out of cells with more users than this.
    """

    solve: Callable[..., Allocation]
    decide: Callable[..., Allocation] | None = None
    label: str = ""
    options: tuple[str, ...] = ()
    needs_key: bool = False
    download_first: bool = False
    max_users: float = math.inf


def pure_solver(
    decide: Callable[..., Allocation],
    label: str = "",
    *,
    needs_key: bool = False,
    download_first: bool = False,
) -> Solver:
    """Returns the table entry of a solver that is a pure function of arrays.

    Args:
      decide: `(hull, problem) -> Allocation`, or `(hull, problem, key)` with `needs_key`.
      label, needs_key, download_first: as in `Solver`. What else `decide` takes are the solver's options:
        static, so hashable.
    """
    _, _, *others = inspect.signature(decide).parameters
    own = tuple(others[needs_key:])

    def solve(problem: Problem, **options: Any) -> Allocation:
        posed = baselines.download_then_infer(problem) if download_first else problem
        keys = (jax.random.key(_checked_seed(options.pop("seed", 0))),) if needs_key else ()
        return compute_in_bucket(decide, posed, *keys, **options)

    return Solver(solve, decide, label, (*own, "seed") if needs_key else own, needs_key, download_first)


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError("seed", seed, "must be a whole number from 0 to 2**32 - 1", "give e.g. 0")
    return int(seed)


SOLVERS: dict[str, Solver] = {
    "exact": Solver(exact, decide_exact, "SLIDE, exact", ("left_over",)),
    "relaxed": Solver(relaxed, decide_relaxed, "SLIDE, relaxed and rounded", ("left_over",)),
    "milp": Solver(milp, None, "SLIDE, 0/1 programme", ("time_limit_s",), max_users=2000),
    "dai": Solver(
        baselines.dai, decide_exact, "download, then infer (exact)", ("left_over",), download_first=True
    ),
    "equal_share": pure_solver(baselines.decide_equal_share, "SLIDE, equal share"),
    "proportional_share": pure_solver(baselines.decide_proportional_share, "SLIDE, proportional share"),
    "best_channel_first": pure_solver(baselines.decide_best_channel_first, "SLIDE, best channel first"),
    "earliest_deadline_first": pure_solver(
        baselines.decide_earliest_deadline_first, "SLIDE, earliest deadline first"
    ),
    "random_order": pure_solver(baselines.decide_random_order, "SLIDE, random order", needs_key=True),
}


def sweep_solvers() -> tuple[str, ...]:
    """Returns the names of the solvers that the sweeps over drops can run."""
    return tuple(name for name, solver in SOLVERS.items() if solver.decide is not None)


def check_options(solver: str, options: Mapping[str, Any]) -> None:
    """Refuses options that a solver of the table does not have, and values of no type of theirs.

    Raises:
      InputError: the first of them, and the options there are.
    """
    for name, value in options.items():
        if name not in SOLVERS[solver].options:
            raise unknown_name(f"option of {solver}", name, SOLVERS[solver].options)
        if not isinstance(value, Hashable):
            kind = type(value).__name__
            raise InputError(name, kind, "is of the wrong type", "give a text or a number")


def solve(problem: Problem, solver: str = "exact", **options: Any) -> Allocation:
    """Returns the allocation that a solver finds, with the seconds that it took in `solve_s`.

    The first call with a catalogue of a new shape, or a number of users in a new bucket, includes compilation
    (`buckets`).

    Args:
      problem: by `read_scenario`, `make_problem` or `sample_problem`.
      solver: a name from `SOLVERS`.
      **options: of that solver, e.g. `left_over="min_max"` of `exact`.

    Raises:
      InputError: an unknown solver or option, or a value that it refuses.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    refuse_traced("solve", problem)
    check_options(solver, options)
    begun = time.perf_counter()
    allocation = SOLVERS[solver].solve(problem, **options)
    return dataclasses.replace(allocation, solver=solver, solve_s=time.perf_counter() - begun)
