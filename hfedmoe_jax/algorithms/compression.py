"""Compressed updates with error feedback: what compression loses, a client adds to its next update.

The residual (arXiv 1809.07599, 1901.09847) is what the algorithm keeps of each client, as large as the model.
What a client does not send keeps its residual untouched.

- `topk`: of each tensor the ceil(fraction * size) values largest in magnitude, each with its index: 4 bytes
  and 4.
- `int8`: each tensor as integers in [-127, 127] and a scale, the greatest magnitude over 127: a byte a value
  and 4. Rounded to the nearest, which is biased; the residual carries the rounding over.

Each tensor of an expert is a tensor of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hfedmoe_jax.algorithms.algorithm import algorithms
from hfedmoe_jax.algorithms.composition import compose, refuse_literal_gating
from hfedmoe_jax.algorithms.method import Method
from hfedmoe_jax.algorithms.parts import Change, Transformed
from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.models import Params

VALUE_BYTES = INDEX_BYTES = SCALE_BYTES = 4
LEVELS = 127


@algorithms.register("topk")
def topk(config: ConfigDict) -> Method:
    """Returns `fl.base` whose clients send the largest `compression.fraction` of every tensor."""
    fraction = config.compression.fraction

    def count(size: int) -> int:
        return math.ceil(fraction * size - 1e-9)

    return with_feedback(
        config,
        lambda tensor: keep_largest(tensor, count(tensor.size)),
        lambda tensor: (VALUE_BYTES + INDEX_BYTES) * count(tensor.size),
    )


@algorithms.register("int8")
def int8(config: ConfigDict) -> Method:
    """Returns `fl.base` whose clients send a byte a value."""
    return with_feedback(config, round_to_levels, lambda tensor: tensor.size + SCALE_BYTES)


def with_feedback(
    config: ConfigDict, compress: Callable[[Array], Array], tensor_bytes: Callable[[Any], int]
) -> Method:
    """Returns `fl.base` with compressed updates.

    Args:
      compress: a tensor -> what the server receives of it.
      tensor_bytes: what that takes, see `Method`.
    """
    refuse_literal_gating(config)

    def transform(update: Change) -> Transformed:
        wanted = jax.tree.map(
            lambda change, residual, sent: jnp.where(sent, change + residual, 0.0),
            update.change, update.state, update.sent,
        )  # fmt: skip
        received = Params(
            jax.tree.map(jax.vmap(jax.vmap(compress)), wanted.experts),
            *jax.tree.map(compress, (wanted.router, wanted.shared)),
        )
        residual = jax.tree.map(
            lambda wanted, received, old, sent: jnp.where(sent, wanted - received, old),
            wanted, received, update.state, update.sent,
        )  # fmt: skip
        return Transformed(received, residual)

    return compose(config)._replace(
        state=optax.tree.zeros_like, transform=transform, tensor_bytes=tensor_bytes
    )


def keep_largest(tensor: Float[AnyArray, "*shape"], count: int) -> Float[Array, "*shape"]:
    """Returns a tensor with all but its `count` values largest in magnitude set to zero."""
    values = tensor.reshape(-1)
    _, index = jax.lax.top_k(jnp.abs(values), count)
    return jnp.zeros_like(values).at[index].set(values[index]).reshape(tensor.shape)


def round_to_levels(tensor: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns a tensor rounded to whole multiples of its greatest magnitude over 127."""
    scale = jnp.max(jnp.abs(tensor)) / LEVELS
    return jnp.round(tensor / jnp.where(scale > 0, scale, 1.0)) * scale
