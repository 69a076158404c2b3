"""Attention over the real tokens of a text, with a backward pass written for few passes over the weights.

Autodiff of a softmax reads and writes the [T, T] weights about ten times; here it is four, which on
a CPU is most of what attention costs beside its products. The normalisation is divided out of
the output instead of the weights (as in FlashAttention, arXiv 2205.14135).

Axes: B batch, T queries, S keys, H heads, K width of a head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hfedmoe_jax.arrays import AnyArray

Heads = Float[Array, "batch tokens heads width"]


def masked_attention(
    query: Heads, key: Heads, value: Heads, mask: Bool[AnyArray, "batch keys"], **_: Any
) -> Heads:
    """Returns softmax(query key' / sqrt(K)) value over the keys of `mask`; an `attention_fn` of Flax.

    A text without any key attends to all alike.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    return _attention(query * scale, key, value, mask).swapaxes(1, 2)


@jax.custom_vjp
def _attention(query: Array, key: Array, value: Array, mask: AnyArray) -> Array:
    return _forward(query, key, value, mask)[0]


def _forward(query: Array, key: Array, value: Array, mask: AnyArray) -> tuple[Array, tuple]:
    closed = jnp.where(mask, jnp.float32(0), jnp.float32(-1e30))[:, None, None, :]
    logits = jnp.einsum("bhtk,bhsk->bhts", query, key, preferred_element_type=jnp.float32) + closed
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    inverse = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(query.dtype)
    output = (jnp.einsum("bhts,bhsk->bhtk", weights, value) * inverse).astype(query.dtype)
    return output, (query, key, value, weights, inverse, output)


def _backward(residuals: tuple, d_output: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, weights, inverse, output = residuals
    scaled = (d_output * inverse).astype(d_output.dtype)
    d_value = jnp.einsum("bhts,bhtk->bhsk", weights, scaled)
    d_weights = jnp.einsum("bhtk,bhsk->bhts", scaled, value)
    d_logits = weights * (d_weights - jnp.sum(scaled * output, axis=-1, keepdims=True))
    d_query = jnp.einsum("bhts,bhsk->bhtk", d_logits, key)
    return d_query, jnp.einsum("bhts,bhtk->bhsk", d_logits, query), d_value, None


_attention.defvjp(_forward, _backward)
