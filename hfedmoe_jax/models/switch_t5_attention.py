"""Attention of T5: without a scale, with a bias by the distance of two tokens.

Axes: B batch, T tokens of a stack, S tokens that are attended to, D model, H heads, K width of a head.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hfedmoe_jax.models.lora import Dense
from hfedmoe_jax.models.switch_t5_sizes import SwitchSizes

NEVER = -1e30  # logit of what is not attended to


def position_buckets(
    queries: int, keys: int, buckets: int, distance: int, causal: bool
) -> Int[np.ndarray, "queries keys"]:
    """Returns the class of each pair's distance: small ones apart, larger ones by their logarithm.

    Half of the classes are for keys after the query, unless the stack is causal. Of the rest, half are for
    distances of their own; all from `distance` on share one.
    """
    after = np.arange(keys)[None] - np.arange(queries)[:, None]
    offset = 0
    if causal:
        apart = np.maximum(-after, 0)
    else:
        buckets //= 2
        offset, apart = np.where(after > 0, buckets, 0), np.abs(after)
    exact = buckets // 2
    # In float32, as checkpoints learned it.
    ratio = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(distance / exact)) * np.float32(buckets - exact)).astype(int)
    return offset + np.where(apart < exact, apart, np.minimum(far, buckets - 1))


class Around(NamedTuple):
    """What all layers of a stack see alike.

    Attributes:
      position: float32 [H, T, T], added to the logits of self-attention.
      seen: bool [B, T or 1, T], the tokens that each may attend to.
      memory: the encoder's output [B, S, D], and its real tokens [B, 1, S]; None in the encoder.
    """

    position: Float[Array, "heads tokens tokens"]
    seen: Bool[Array, "batch queries tokens"]
    memory: tuple[Array, Array] | None


class Attention(nn.Module):
    """Attention without a scale."""

    shape: SwitchSizes
    dtype: Any

    @nn.compact
    def __call__(self, h_btd, read_bsd, bias, seen):
        """Returns [B, T, D], of what is read.

        Args:
          bias: added to the logits.
          seen: bool, [B, T or 1, S].
        """
        s = self.shape

        def project(name: str, x: Array) -> Array:
            dense = Dense(s.heads * s.head_size, use_bias=False, dtype=self.dtype, lora=s.lora, name=name)
            return dense(x).reshape(*x.shape[:2], s.heads, s.head_size)

        q, k, v = project("query", h_btd), project("key", read_bsd), project("value", read_bsd)
        logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(jnp.where(seen[:, None], logits, NEVER)).astype(v.dtype)
        y = jnp.einsum("bhts,bshk->bthk", weights, v).reshape(*h_btd.shape[:2], -1)
        return Dense(s.width, use_bias=False, dtype=self.dtype, lora=s.lora, name="out")(y)


class Attend(nn.Module):
    """Self-attention, in the decoder attention to the encoder's output, and the norm before the network."""

    shape: SwitchSizes
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], around: Around):
        """Returns the residual stream, and what the network reads."""

        def norm(name):
            return nn.RMSNorm(self.shape.epsilon, dtype=self.dtype, name=name)

        h_btd = norm("norm_self")(x_btd)
        attention = Attention(self.shape, self.dtype, name="self")
        x_btd = x_btd + attention(h_btd, h_btd, around.position, around.seen)
        if around.memory is not None:
            attention = Attention(self.shape, self.dtype, name="cross")
            x_btd = x_btd + attention(norm("norm_cross")(x_btd), around.memory[0], 0.0, around.memory[1])
        return x_btd, norm("norm_network")(x_btd)
