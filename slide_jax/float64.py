"""Computes functions of a problem in float64, whatever precision the caller has set.

The solvers compare sums over up to a million users with thresholds; float32 sums lose users there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slide_jax.errors import InputError
from slide_jax.hull import convex_hull
from slide_jax.problem import Problem, refuse_traced


def compute_in_float64(function: Callable[..., Any], problem: Problem, *arrays: Any, **options: Any) -> Any:
    """Returns `function(hull, problem, *arrays, **options)` as NumPy arrays.

    Args:
      function: a pure function of arrays; it is jitted.
      problem: its numbers are converted to float64, and the hull of its catalogue is computed from them.
      *arrays: further pytrees of arrays.
      **options: static (hashable) arguments.

    Raises:
      InputError: a problem inside `jit`, `vmap` or `grad`.
    """
    refuse_traced("this function", problem, arrays)
    with jax.enable_x64(True):
        hull = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
        result = _jitted(function, hull, to_float64(problem), arrays, tuple(options.items()))
        return jax.tree.map(np.asarray, result)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _jitted(function, hull, problem, arrays, options):
    return function(hull, problem, *arrays, **dict(options))


def computes_in_float64() -> bool:
    """Returns whether JAX keeps float64 here, or else rounds it to float32."""
    return jnp.zeros(0).dtype == np.float64


def require_float64(*arrays: Any) -> None:
    """Refuses pytrees of arrays in another floating dtype than float64, and programs without it.

    Raises:
      InputError: which dtype there is, and what converts it.
    """
    dtypes = {str(array.dtype) for array in jax.tree.leaves(arrays) if hasattr(array, "dtype")}
    narrow = {name for name in dtypes if jnp.issubdtype(name, jnp.floating)} - {"float64"}
    if not computes_in_float64():
        narrow = narrow or {"float32"}  # to which JAX would round
    if narrow:
        remedy = "call slide_jax.solve or solve_batch, which convert it"
        raise InputError("problem", min(narrow), "decisions are computed in float64", remedy)


def to_float64(problem: Problem) -> Problem:
    """Returns the problem with all floating-point arrays in float64; integers and booleans stay."""

    def convert(array):
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        return array.astype(np.float64) if array.dtype.kind == "f" and array.dtype != np.float64 else array

    return jax.tree.map(convert, problem)
