"""Sums over users in an order that does not depend on how many users are added who count for nothing.

`jnp.sum` adds in an order that depends on the length: with zeros appended the last digits change.
"""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float

WAYS = 16
"""Parts that are added at a time: a million numbers take five passes, each a sixteenth of the one before."""


def total(values: Float[Array, " K"]) -> Float[Array, ""]:
    """Returns the sum of K numbers; zeros appended to them do not change a bit of it.

    Up to the next power of two there are zeros; the second half is added to the first until one number is
    left. With twice as many zeros there is one more step, which adds nothing.

    >>> import numpy as np
    >>> numbers = np.random.default_rng(0).exponential(size=1000).astype(np.float32)
    >>> bool(total(jnp.asarray(numbers)) == total(jnp.pad(numbers, (0, 24_000))))
    True
    """
    while values.shape[0] > 1:
        values = _folded(values)
    return jnp.sum(values)  # of one number or none


def _folded(values: Float[Array, " K"]) -> Float[Array, "..."]:
    """Returns the numbers after several steps at once, as one pass over them."""
    count = values.shape[0]
    whole = 1 << (count - 1).bit_length()
    ways = min(WAYS, whole)
    length = whole // ways
    parts = [values[begin : begin + length] for begin in range(0, count, length)]
    parts[-1] = jnp.pad(parts[-1], (0, length - parts[-1].shape[0]))
    while ways > 1:
        ways //= 2
        parts = [a + b for a, b in itertools.zip_longest(parts[:ways], parts[ways:], fillvalue=0)]
    return parts[0]
