"""Numbers of users in steps, so that a problem with a few users more or less runs a program that is compiled.

Users are added who ask for nothing: no model is admissible for them, so they are never served, add nothing to
any sum and change no decision. They are cut off the answer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slide_jax.float64 import compute_in_float64
from slide_jax.problem import Problem, Users, refuse_traced

LEAST = 16
MOST = 2**17
"""Users from which on a problem is taken as it is: copying it would cost a fifth of the solution and more."""
STEPS = 8  # an octave: at most an eighth of the users are added


def bucket_of(count: int) -> int:
    """Returns the number of users that a problem with `count` is computed with.

    >>> [bucket_of(count) for count in (0, 3, 17, 100, 1000, 1024, 1025, 10**6)]
    [0, 16, 18, 104, 1024, 1024, 1152, 1000000]
    """
    if count == 0 or count > MOST:
        return count
    octave = 1 << max(count - 1, LEAST).bit_length() - 1  # the largest power of two below `count`
    step = octave // STEPS
    return max(LEAST, -(-count // step) * step)


def compute_in_bucket(decide: Callable[..., Any], problem: Problem, *arrays: Any, **options: Any) -> Any:
    """Returns `compute_in_float64(decide, problem, *arrays, **options)`, computed with `bucket_of` users.

    Args:
      decide: `(hull, problem, *arrays, **options)` to a pytree of arrays [K, ...] and of numbers.
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
