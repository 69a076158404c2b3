"""Sums over users: the same to the last bit however many zeros follow, and as exact as fractions tell."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slide_jax.sums import total


@settings(max_examples=30)
@given(count=st.sampled_from((0, 1, 2, 5, 16, 17, 100, 257, 4097)), seed=st.integers(0, 2**32 - 1))
def test_appended_zeros_change_no_bit_and_the_sum_is_right(count, seed):
    values = np.random.default_rng(seed).lognormal(0, 3, count)
    with jax.enable_x64(True):
        sums = [np.asarray(total(jnp.asarray(np.pad(values, (0, more))))) for more in (0, 1, 15, 300, 5000)]
    assert len({value.tobytes() for value in sums}) == 1
    assert sums[0].dtype == np.float64
    np.testing.assert_allclose(sums[0], math.fsum(values), rtol=1e-14)


def test_derivatives_and_batches_are_those_of_a_sum():
    values = jnp.arange(1.0, 41.0).reshape(2, 20)
    np.testing.assert_array_equal(jax.grad(lambda x: total(x))(values[0]), np.ones(20))
    np.testing.assert_array_equal(jax.vmap(total)(values), values.sum(axis=1))
