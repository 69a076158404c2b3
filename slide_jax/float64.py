"""Computes functions of a problem in float64, whatever precision the caller has set.

The solvers compare sums over up to a million users with thresholds; float32 sums lose users there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slide_jax.hull import convex_hull
from slide_jax.problem import Problem


def compute_in_float64(function: Callable[..., Any], problem: Problem, *arrays: Any, **options: Any) -> Any:
    """Returns `function(hull, problem, *arrays, **options)` as NumPy arrays.

    Args:
      function: a pure function of arrays; it is jitted.
      problem: its numbers are converted to float64, and the hull of its catalogue is computed from them.
      *arrays: further pytrees of arrays.
      **options: static (hashable) arguments.
    """
    with jax.enable_x64(True):
        hull = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
        result = _jitted(function, hull, to_float64(problem), arrays, tuple(options.items()))
        return jax.tree.map(np.asarray, result)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _jitted(function, hull, problem, arrays, options):
    return function(hull, problem, *arrays, **dict(options))


def to_float64(problem: Problem) -> Problem:
    """Returns the problem with all floating-point arrays in float64; integers and booleans stay."""

    def convert(array):
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        return array.astype(np.float64) if array.dtype.kind == "f" and array.dtype != np.float64 else array

    return jax.tree.map(convert, problem)
