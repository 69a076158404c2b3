"""Attention with a backward pass of its own against Flax and autodiff."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_jax.models.attention import masked_attention

BATCH, TOKENS, HEADS, WIDTH = 2, 5, 3, 4
OPEN = np.ones((BATCH, TOKENS), bool)


def heads(seed, size=1.0):
    """Returns queries, keys, values and a direction to pull back."""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(size * rng.standard_normal((BATCH, TOKENS, HEADS, WIDTH)), jnp.float32) for _ in range(4)
    ]


def reference_attention(query, key, value, mask):
    """Flax's, with the backward pass of autodiff."""
    return nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])


@functools.partial(jax.jit, static_argnums=0)
def both_ways(attention, query, key, value, direction, mask):
    """Returns the output and the pulled-back direction."""
    output, pull = jax.vjp(lambda *x: attention(*x, mask=mask), query, key, value)
    return output, pull(direction)


@given(st.integers(0, 2**16), st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 2**TOKENS - 2))
@settings(max_examples=25)
def test_outputs_and_gradients_are_those_of_autodiff(seed, size, closed):
    """Any keys of the second text may be closed, but not all; logits up to hundreds."""
    mask = np.array([OPEN[0], [not closed >> key & 1 for key in range(TOKENS)]])
    arguments = (*heads(seed, size), mask)
    own, reference = (
        both_ways(attention, *arguments) for attention in (masked_attention, reference_attention)
    )
    chex.assert_trees_all_close(own, reference, rtol=2e-4, atol=2e-5 * max(1, size**3))
    _, (_, d_key, d_value) = own
    assert not np.any(d_key[1, ~mask[1]]) and not np.any(d_value[1, ~mask[1]])


def test_a_text_without_keys_attends_to_all_alike():
    query, key, value, _ = heads(0)
    output = masked_attention(query, key, value, mask=np.array([OPEN[0], ~OPEN[0]]))
    np.testing.assert_allclose(output[1], np.broadcast_to(value[1].mean(0), output[1].shape), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_precision_is_that_of_the_inputs(dtype):
    arguments = [x.astype(dtype) for x in heads(1)]
    output, pulled = jax.eval_shape(functools.partial(both_ways, masked_attention), *arguments, OPEN)
    assert {x.dtype for x in (output, *pulled)} == {jnp.dtype(dtype)}
