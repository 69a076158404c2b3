"""A Switch-style Transformer encoder that classifies texts, trained from scratch.

Pre-norm blocks of self-attention and a mixture of experts (arXiv 2101.03961), mean pooling
over real tokens, a linear head. The blocks run in one `nn.scan`, so that every expert
parameter is one array [L, E, ...] and every router parameter [L, ...].

Axes: B batch, T tokens, N = B * T, L layers, E experts, D model, F hidden.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.models.attention import masked_attention, reference_attention
from hfedmoe_jax.models.dispatch import DISPATCHERS, ExpertWeights, expert_capacity
from hfedmoe_jax.models.pieces import Pieces
from hfedmoe_jax.models.routing import ExpertControls, Routing, assign

PAD_ID = 0
EMBED_INIT = nn.initializers.normal(0.02)


class Experts(nn.Module):
    """Holds the weights of one layer's experts."""

    num_experts: int
    hidden: int

    @nn.compact
    def __call__(self, width: int) -> ExpertWeights:
        """Returns the weights for inputs of `width`."""
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        return ExpertWeights(
            self.param("w_in_edf", init, (self.num_experts, width, self.hidden)),
            self.param("w_out_efd", init, (self.num_experts, self.hidden, width)),
        )


class MixtureOfExperts(nn.Module):
    """Routes each token to its top-k experts and adds their outputs by gate."""

    num_experts: int
    hidden: int
    top_k: int
    dispatch: str

    @nn.compact
    def __call__(
        self,
        x_btd: Float[Array, "batch tokens model"],
        token_mask_bt: Bool[Array, "batch tokens"],
        controls: ExpertControls,
        capacity_factor: float,
    ) -> tuple[Float[Array, "batch tokens model"], Routing]:
        """Returns the layer's output and its routing; `controls` are this layer's, [E] each."""
        x_nd, token_mask = x_btd.reshape(-1, x_btd.shape[-1]), token_mask_bt.reshape(-1)
        router = nn.Dense(self.num_experts, use_bias=False, name="router", dtype=jnp.float32)
        gates, assignment = assign(router(x_nd), controls.forward, token_mask, self.top_k)
        weights = Experts(self.num_experts, self.hidden, name="experts")(x_nd.shape[-1])
        capacity = expert_capacity(x_nd.shape[0], self.num_experts, self.top_k, capacity_factor)
        y_nd, kept = DISPATCHERS[self.dispatch](
            x_nd, assignment, weights, controls.backward, controls.multiplier, capacity
        )
        one_hot_nke = nn.one_hot(assignment.expert, self.num_experts, dtype=bool)
        chosen = jnp.any(one_hot_nke & (assignment.weight > 0)[..., None], axis=1)
        served = jnp.any(one_hot_nke & kept[..., None], axis=1)
        return y_nd.reshape(x_btd.shape), Routing(gates, chosen, served)


class Block(nn.Module):
    """Self-attention, then a mixture of experts, each behind a norm and a residual connection."""

    num_heads: int
    moe_sizes: dict[str, Any]
    capacity_factor: float
    dtype: Any = None
    attention_fn: Any = reference_attention

    def setup(self):
        self.norm_attention = nn.LayerNorm(dtype=self.dtype)
        self.attention = nn.MultiHeadDotProductAttention(
            self.num_heads, dtype=self.dtype, attention_fn=self.attention_fn
        )
        self.norm_moe = nn.LayerNorm(dtype=self.dtype)
        self.moe = MixtureOfExperts(**self.moe_sizes)

    def attend(self, x_btd: Float[Array, "batch tokens model"], token_mask_bt: Bool[Array, "batch tokens"]):
        """Returns the residual stream after attention, and what the mixture of experts reads."""
        x_btd = x_btd + self.attention(self.norm_attention(x_btd), mask=token_mask_bt)
        return x_btd, self.norm_moe(x_btd)

    def __call__(self, x_btd, token_mask_bt, controls):
        """Returns (output, routing of this layer), the carry and the result of `nn.scan`."""
        x_btd, h_btd = self.attend(x_btd, token_mask_bt)
        y_btd, routing = self.moe(h_btd, token_mask_bt, controls, self.capacity_factor)
        return x_btd + y_btd, routing


class Head(nn.Module):
    """Mean over real tokens, then class logits."""

    num_classes: int

    @nn.compact
    def __call__(self, x_btd, token_mask_bt):
        """Returns logits [B, classes] in float32."""
        x_btd = nn.LayerNorm(name="norm", dtype=jnp.float32)(x_btd)
        real = token_mask_bt[..., None]
        pooled = jnp.sum(x_btd * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
        return nn.Dense(self.num_classes, name="classes", dtype=jnp.float32)(pooled)


class SwitchClassifier(nn.Module):
    """Text to class logits through L blocks with E experts each.

    Attributes:
      num_classes, vocab_size, seq_len: sizes of the task.
      num_layers, width, num_heads, hidden, num_experts, top_k: sizes of the model.
      dispatch: `dense` or `capacity`.
    """

    num_classes: int
    vocab_size: int
    seq_len: int
    num_layers: int
    width: int
    num_heads: int
    hidden: int
    num_experts: int
    top_k: int
    dispatch: str

    @nn.compact
    def __call__(
        self, tokens_bt: Int[Array, "batch tokens"], controls: ExpertControls, capacity_factor: float
    ) -> tuple[Float[Array, "batch classes"], Routing]:
        """Returns logits [B, classes] and the routing of every layer ([L, N, E] arrays).

        Args:
          tokens_bt: token ids, 0 is padding.
          controls: what each expert may do, [L, E] arrays.
          capacity_factor: slots of an expert over an even share of the tokens (`capacity` dispatch).
        """
        token_mask = tokens_bt != PAD_ID
        table = self.param("embed", EMBED_INIT, (self.vocab_size, self.width))
        position = self.param("position", EMBED_INIT, (self.seq_len, self.width))
        moe = dict(num_experts=self.num_experts, hidden=self.hidden, top_k=self.top_k, dispatch=self.dispatch)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=self.num_layers,
        )(self.num_heads, moe, capacity_factor, name="blocks")
        x_btd, routing = blocks(embed(table, position, tokens_bt), token_mask, controls)
        return Head(self.num_classes, name="head")(x_btd, token_mask), routing


def embed(table, position, tokens_bt):
    """Returns the vectors [B, T, D] of the tokens at their positions."""
    return table[tokens_bt] + position[: tokens_bt.shape[1]]


def switch_pieces(config: ConfigDict, num_classes: int, dtype: Any) -> Pieces:
    """Returns the parts of a `SwitchClassifier` as functions, computing in `dtype`."""
    moe = {name: config[name] for name in ("num_experts", "hidden", "top_k")} | {"dispatch": "capacity"}
    block = Block(config.num_heads, moe, 0.0, dtype, masked_attention)
    head = Head(num_classes)

    def attend(layer: dict, x_btd, token_mask_bt):
        x_btd, h_btd = block.apply({"params": layer}, x_btd, token_mask_bt, method="attend")
        return x_btd, h_btd.reshape(-1, h_btd.shape[-1])

    def matrices(expert: dict) -> tuple:
        weights = expert["blocks"]["moe"]["experts"]
        return weights["w_in_edf"].astype(dtype), weights["w_out_efd"].astype(dtype)

    def run_expert(expert: dict, x_sd):
        w_in, w_out = matrices(expert)
        hidden = jax.nn.relu(x_sd @ w_in)
        return hidden @ w_out, hidden

    def expert_gradient(expert: dict, x_sd, hidden_sf, dy_sd):
        w_in, w_out = matrices(expert)
        into = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dhidden = jnp.where(hidden_sf > 0, jnp.einsum("sd,fd->sf", dy_sd, w_out), 0)
        gradient = dict(
            w_in_edf=into("sd,sf->df", x_sd, dhidden), w_out_efd=into("sf,sd->fd", hidden_sf, dy_sd)
        )
        return {"blocks": {"moe": {"experts": gradient}}}, jnp.einsum("sf,df->sd", dhidden, w_in)

    return Pieces(
        embed=lambda part, tokens: embed(part["embed"], part["position"], tokens).astype(dtype),
        attend=attend,
        route=lambda router, h_nd: h_nd.astype(jnp.float32) @ router["moe"]["router"]["kernel"],
        expert=run_expert,
        expert_gradient=expert_gradient,
        head=lambda part, x_btd, token_mask_bt: head.apply({"params": part["head"]}, x_btd, token_mask_bt),
        embed_parts=("embed", "position"),
        head_parts=("head",),
        table="embed",
    )
