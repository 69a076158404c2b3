"""Numbers of users in steps, so that a problem with a few users more or less runs a program that is compiled.

Users are added who ask for nothing: no model is admissible for them, so they are never served. They add zeros
to sums whose order does not depend on their number (`sums`). Once they are cut off it, the answer is the
same bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slide_jax.float64 import compute_in_float64
from slide_jax.problem import Problem, Users, refuse_traced

LEAST = 8
STEPS = 4
"""Of an octave from `FINE` users on, so that less than a quarter is added; below it an octave is one step."""
FINE = 32


def bucket_of(count: int) -> int:
    """Returns the number of users that a problem with `count` is computed with.

    >>> [bucket_of(count) for count in (0, 3, 17, 33, 100, 1000, 1024, 1025, 10**6)]
    [0, 8, 32, 40, 112, 1024, 1024, 1280, 1048576]
    """
    if count <= LEAST:
        return LEAST if count else 0
    octave = 1 << (count - 1).bit_length() - 1  # the largest power of two below `count`
    step = octave // STEPS if octave >= FINE else octave
    return -(-count // step) * step


def compute_in_bucket(decide: Callable[..., Any], problem: Problem, *arrays: Any, **options: Any) -> Any:
    """Returns `compute_in_float64(decide, problem, *arrays, **options)`, computed with `bucket_of` users.

    Args:
      decide: `(hull, problem, *arrays, **options)` to a pytree of arrays [K, ...] and of numbers. What it
        does for a user must not depend on users for whom no model is admissible.
      problem, options: as there.
      arrays: pytrees of arrays without an axis of users.

    Raises:
      InputError: as there.
    """
    refuse_traced("this function", problem, arrays)
    count = problem.num_users
    bucket = bucket_of(count)
    if bucket == count:
        return compute_in_float64(decide, problem, *arrays, **options)
    posed = dataclasses.replace(problem, users=add_users(problem.users, bucket - count))
    result = compute_in_float64(decide, posed, *arrays, **options)
    return jax.tree.map(lambda array: array[:count] if np.ndim(array) else array, result)


def add_users(users: Users, more: int) -> Users:
    """Returns the users and `more` others, like the last one, for whom no model is admissible."""

    def add(array):
        array = np.asarray(array)
        added = np.empty((len(array) + more, *array.shape[1:]), array.dtype)
        added[: len(array)] = array
        added[len(array) :] = array[-1]
        return added

    added = jax.tree.map(add, users)
    nobody = slice(len(np.asarray(users.task)), None)
    added.task[nobody] = -1
    if added.allowed is not None:
        added.allowed[nobody] = False
    return added
