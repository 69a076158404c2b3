"""Solvers under `jax.jit`, `jax.vmap` and `jax.grad`: what `solve` does on the host, as a pure function."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from slide_jax.baselines import download_then_infer
from slide_jax.errors import InputError, unknown_name
from slide_jax.float64 import computes_in_float64, to_float64
from slide_jax.hull import Hull, convex_hull
from slide_jax.problem import Allocation, Problem, is_traced
from slide_jax.solvers import SOLVERS, Solver, check_options, sweep_solvers


def solve_batch(
    problem: Problem, solver: str = "exact", key: jax.Array | None = None, **options: Any
) -> Allocation:
    """Returns a solver's allocation of one problem or of a batch, under any of JAX's transformations.

    Numbers are converted to float64. Where the catalogue itself is traced, all layers are kept and not only
    those of the hull: a `jit` of the users alone runs faster.

    Derivatives are those of the numbers while the same users are served with the same models: who is served
    has none. Mask the nan latencies and energies of the others, e.g. by `jnp.where(allocation.served, ...)`.

    Args:
      problem: arrays of K users; or of D drops, [D, K], with `bandwidth_hz` [D] or a number and one catalogue
        or D of them.
      solver: a name from `SOLVERS`, of those in `sweep_solvers()`.
      key: for solvers that draw at random; None: that of seed 0.
      **options: of that solver, e.g. `left_over="min_max"` of `exact`; static.

    Returns:
      JAX arrays, of a batch with the leading axis D. `upper_bound` is that of `relaxed`, nan of the others.

    Raises:
      InputError: an unknown solver or option; or float64 is not enabled inside a transformation.

    >>> import slide_jax, jax.numpy as jnp
    >>> problem = slide_jax.read_scenario({"bandwidth_hz": 2e6, "models": [
    ...     {"name": "m", "task": "t", "accuracy": 0.8, "layers": [{"bits": 2e6, "flop": 1e9}]}],
    ...     "users": [{"task": "t", "deadline_s": 3.0, "spectral_efficiency_bps_hz": 1.0,
    ...                "device": {"f_min_hz": 1e9, "f_max_hz": 1e9, "flop_per_cycle": 1}}]})
    >>> def bandwidth(deadline_s):
    ...     users = dataclasses.replace(problem.users, deadline_s=deadline_s)
    ...     return solve_batch(dataclasses.replace(problem, users=users)).bandwidth_hz.sum()
    >>> with jax.enable_x64(True):
    ...     print(bandwidth(jnp.array([3.0])), jax.grad(bandwidth)(jnp.array([3.0])))
    1000000.0 [-500000.]
    """
    if solver not in sweep_solvers():
        raise unknown_name("solver", solver, sweep_solvers())
    entry = SOLVERS[solver]
    check_options(solver, {name: value for name, value in options.items() if name != "seed"})
    if is_traced(problem) and not computes_in_float64():
        remedy = 'call jax.config.update("jax_enable_x64", True) first'
        raise InputError("problem", "a traced array", "float64 is not enabled", remedy)
    with jax.enable_x64(True):
        posed = to_float64(download_then_infer(problem) if entry.download_first else problem)
        shared = not is_traced(posed.catalogue) and np.ndim(posed.catalogue.accuracy) < 2
        hull = _hull_of(posed) if shared else None
        key = jax.random.key(0) if key is None else key
        allocation = _decide(entry, tuple(options.items()), hull, posed, key)
    return dataclasses.replace(allocation, solver=solver)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decide(entry: Solver, options: tuple, hull, problem: Problem, key) -> Allocation:
    def decide(hull, problem, key):
        assert entry.decide is not None  # as of all `sweep_solvers`
        hull = _hull_of(problem) if hull is None else hull
        return entry.decide(hull, problem, *((key,) if entry.needs_key else ()), **dict(options))

    if np.ndim(problem.users.deadline_s) < 2:
        return decide(hull, problem, key)
    catalogues = 0 if np.ndim(problem.catalogue.accuracy) > 1 else None
    spectra = 0 if np.ndim(problem.bandwidth_hz) else None
    axes = dataclasses.replace(problem, catalogue=catalogues, users=0, bandwidth_hz=spectra)
    keys = jax.random.split(key, np.shape(problem.users.deadline_s)[0])
    return jax.vmap(decide, (None, axes, 0))(hull, problem, keys)


def _hull_of(problem: Problem) -> Hull:
    return convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
