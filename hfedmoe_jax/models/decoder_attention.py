"""Causal attention with rotary positions: grouped heads, and multi-head latent attention.

Axes: B batch, T queries, S keys, H heads, G heads of keys, K width of a head, D model.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hfedmoe_jax.models.decoder_sizes import DecoderSizes, Rotary, yarn_scale
from hfedmoe_jax.models.lora import Dense


def wavelengths(rotary: Rotary) -> Float[Array, " pairs"]:
    """Returns the angle per position of each pair of a head's units."""
    half = jnp.arange(0, rotary.size, 2, dtype=jnp.float32) / rotary.size
    turns = 1.0 / rotary.theta**half
    if rotary.yarn is None:
        return turns
    factor, original, beta_fast, beta_slow, _, _ = rotary.yarn

    def pair_of(turning: float) -> float:
        """Returns the pair, as a real number, that turns so often within the original positions."""
        return rotary.size * math.log(original / (turning * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low = max(math.floor(pair_of(beta_fast)), 0)
    high = min(math.ceil(pair_of(beta_slow)), rotary.size - 1)
    ramp = (jnp.arange(rotary.size // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
    slow = jnp.clip(ramp, 0, 1)  # of the pairs that are interpolated
    return turns / factor * slow + turns * (1 - slow)


def turn(x_bthk: Array, rotary: Rotary) -> Array:
    """Returns heads turned by their positions 0 to T - 1, in the type of `x`."""
    angle = jnp.arange(x_bthk.shape[1], dtype=jnp.float32)[:, None] * wavelengths(rotary)
    scale = 1.0
    if rotary.yarn is not None:
        factor, *_, mscale, all_dims = rotary.yarn
        scale = yarn_scale(factor, 1.0)
        if mscale and all_dims:
            scale = yarn_scale(factor, mscale) / yarn_scale(factor, all_dims)
    cos, sin = (scale * f(angle)[:, None, :] for f in (jnp.cos, jnp.sin))
    x = x_bthk.astype(jnp.float32)
    if rotary.interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape)
    else:
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x_bthk.dtype)


def causal_attention(
    q_bthk: Array, k_bsgk: Array, v_bsgk: Array, mask_bs: Bool[Array, "batch keys"], scale: float
) -> Array:
    """Returns softmax(scale q k') v [B, T, H, ...] over the real keys up to each query's position.

    H / G heads share one of keys. The softmax is in float32.
    """
    batch, length, heads, _ = q_bthk.shape
    groups = k_bsgk.shape[2]
    q = q_bthk.reshape(batch, length, groups, heads // groups, -1)
    logits = scale * jnp.einsum("btgjk,bsgk->bgjts", q, k_bsgk, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones((length, length), bool)) & mask_bs[:, None, :]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30)).astype(v_bsgk.dtype)
    return jnp.einsum("bgjts,bsgv->btgjv", weights, v_bsgk).reshape(batch, length, heads, -1)


class GroupedAttention(nn.Module):
    """Attention whose heads share keys and values by groups (arXiv 2305.13245)."""

    sizes: DecoderSizes
    dtype: Any

    @nn.compact
    def __call__(self, h_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns [B, T, D]."""
        s = self.sizes
        q = self.project(h_btd, "query", s.num_heads)
        k = self.project(h_btd, "key", s.num_key_heads)
        v = self.project(h_btd, "value", s.num_key_heads, norm=False)
        y = causal_attention(turn(q, s.rotary), turn(k, s.rotary), v, mask_bt, s.head_size**-0.5)
        output = Dense(s.width, use_bias=s.output_bias, dtype=self.dtype, lora=s.lora, name="out")
        return output(y.reshape(*y.shape[:2], -1))

    @nn.nowrap
    def project(self, h_btd, name: str, heads: int, norm: bool = True):
        """Returns heads [B, T, heads, K], normalised and clipped as the family has it."""
        s = self.sizes
        project = Dense(heads * s.head_size, use_bias=s.query_bias, dtype=self.dtype, lora=s.lora, name=name)
        x = project(h_btd)
        if norm and s.norm_heads == "all":
            x = nn.RMSNorm(s.epsilon, dtype=self.dtype, name=f"norm_{name}")(x)
        if s.clip:
            x = jnp.clip(x, -s.clip, s.clip)
        x = x.reshape(*x.shape[:2], heads, s.head_size)
        if norm and s.norm_heads == "head":
            x = nn.RMSNorm(s.epsilon, dtype=self.dtype, name=f"norm_{name}")(x)
        return x


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads from one short vector."""

    sizes: DecoderSizes
    dtype: Any

    @nn.compact
    def __call__(self, h_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns [B, T, D]."""
        s = self.sizes
        assert s.latent is not None
        latent, heads = s.latent, s.num_heads

        def dense(features, name, bias=False):
            return Dense(features, use_bias=bias, dtype=self.dtype, lora=s.lora, name=name)

        q = h_btd
        if latent.query_rank:
            q = dense(latent.query_rank, "query_down", s.query_bias)(q)
            q = nn.RMSNorm(1e-6, dtype=self.dtype, name="norm_query")(q)
        q = dense(heads * s.head_size, "query")(q).reshape(*h_btd.shape[:2], heads, s.head_size)
        shared = dense(latent.key_rank + s.rotary.size, "key_down", s.query_bias)(h_btd)
        short, k_turned = jnp.split(shared, [latent.key_rank], axis=-1)
        short = nn.RMSNorm(1e-6, dtype=self.dtype, name="norm_key")(short)
        both = dense(heads * (latent.plain + latent.value), "key_value")(short)
        k_plain, v = jnp.split(both.reshape(*h_btd.shape[:2], heads, -1), [latent.plain], axis=-1)
        k_turned = jnp.broadcast_to(turn(k_turned[:, :, None], s.rotary), (*k_plain.shape[:3], s.rotary.size))
        q_plain, q_turned = jnp.split(q, [latent.plain], axis=-1)
        q = jnp.concatenate([q_plain, turn(q_turned, s.rotary)], axis=-1)
        k = jnp.concatenate([k_plain, k_turned], axis=-1)
        y = causal_attention(q, k, v, mask_bt, latent_scale(s))
        output = dense(s.width, "out", s.output_bias)
        return output(y.reshape(*y.shape[:2], -1))


def latent_scale(sizes: DecoderSizes) -> float:
    """Returns the factor of the logits: 1 / sqrt(width of a head), times YaRN's squared scale."""
    scale = sizes.head_size**-0.5
    if sizes.rotary.yarn is not None and sizes.rotary.yarn[-1]:
        scale *= yarn_scale(sizes.rotary.yarn[0], sizes.rotary.yarn[-1]) ** 2
    return scale
