"""A Switch-style Transformer encoder that classifies texts, trained from scratch.

Pre-norm blocks of self-attention and a mixture of experts (arXiv 2101.03961), mean pooling
over real tokens, a linear head. The blocks run in one `nn.scan`; the experts of all layers are one array
[L, E, ...] a matrix.

Axes: B batch, T tokens, N = B * T, L layers, E experts, D model, F hidden, S slots of an expert.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import Budget, Expert, LayerBudget, open_budget
from hfedmoe_jax.models.attention import masked_attention
from hfedmoe_jax.models.family import ModelOutput, ModelSizes, families
from hfedmoe_jax.models.precision import PRECISIONS, matmul
from hfedmoe_jax.models.routing import RouterRule, route

PAD_ID = 0
EMBED_INIT = nn.initializers.normal(0.02)
UNROLL = 2  # layers a turn of the scan: fewer residuals to stack


@functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("hidden"), prevent_cse=False
)
def relu_expert(weights: dict[str, Any], x_sd: Float[Array, "slots model"]) -> Float[Array, "slots model"]:
    """Two matrices with a ReLU between them; of the forward pass the hidden units are kept."""
    hidden = checkpoint_name(matmul(x_sd, weights["w_in_df"]), "hidden")
    return matmul(jax.nn.relu(hidden), weights["w_out_fd"])


def init_experts(key: Array, num_layers: int, num_experts: int, width: int, hidden: int) -> dict[str, Array]:
    """Returns the experts of all layers."""
    init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0, 1))
    key_in, key_out = jax.random.split(key)
    return dict(
        w_in_df=init(key_in, (num_layers, num_experts, width, hidden)),
        w_out_fd=init(key_out, (num_layers, num_experts, hidden, width)),
    )


class Attention(nn.Module):
    """Self-attention behind a norm and a residual connection, then the norm before the experts."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], token_mask_bt: Bool[Array, "batch tokens"]):
        """Returns the residual stream, and what the router and the experts read."""
        attention = nn.MultiHeadDotProductAttention(
            self.num_heads, dtype=self.dtype, attention_fn=masked_attention, name="attention"
        )
        h_btd = nn.LayerNorm(dtype=self.dtype, name="norm_attention")(x_btd)
        x_btd = x_btd + attention(h_btd, mask=token_mask_bt)
        return x_btd, nn.LayerNorm(dtype=self.dtype, name="norm_moe")(x_btd)


class Block(nn.Module):
    """Self-attention, then a mixture of experts, each behind a norm and a residual connection."""

    num_heads: int
    num_experts: int
    top_k: int
    capacity_factor: float
    remat: bool
    dtype: Any
    expert: Expert

    @nn.compact
    def __call__(self, carry, token_mask_bt, experts, layer: LayerBudget):
        """Returns ((x, tape), (permit, routing)), the carry and the result of `nn.scan`."""
        x_btd, tape = carry
        attention = nn.remat(Attention, prevent_cse=False) if self.remat else Attention
        x_btd, h_btd = attention(self.num_heads, self.dtype, name="attend")(x_btd, token_mask_bt)
        h_nd, token_mask = h_btd.reshape(-1, h_btd.shape[-1]), token_mask_bt.reshape(-1)
        router = nn.Dense(self.num_experts, use_bias=False, name="router", dtype=jnp.float32)
        rule = RouterRule(self.top_k)
        y_nd, tape, permit, routing = route(
            router(h_nd), h_nd, token_mask, rule, self.capacity_factor, self.expert, experts, layer, tape
        )
        return (x_btd + y_nd.reshape(x_btd.shape), tape), (permit, routing)


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
      sizes: of the task.
      num_layers, width, num_heads, hidden, num_experts, top_k: sizes of the model.
      capacity_factor, eval_capacity_factor: slots of an expert over an even share of the tokens.
      dtype: that products are computed in.
      remat: compute attention again in the backward pass.
      expert: of all layers.
    """

    sizes: ModelSizes
    num_layers: int
    width: int
    num_heads: int
    hidden: int
    num_experts: int
    top_k: int
    capacity_factor: float
    eval_capacity_factor: float
    dtype: Any = jnp.float32
    remat: bool = False
    expert: Expert = relu_expert

    table, output = "embed", "text"

    def mask(self, batch: dict[str, Array]) -> Bool[Array, "batch tokens"]:
        """Says which tokens of a batch are real."""
        return batch["tokens"] != PAD_ID

    @nn.compact
    def __call__(
        self, batch: dict[str, Array], budget: Budget | None = None, training: bool = True
    ) -> ModelOutput:
        """Returns logits [B, classes], the tape, the permits and the routing."""
        tokens_bt, token_mask_bt = batch["tokens"], self.mask(batch)
        table = self.param("embed", EMBED_INIT, (self.sizes.vocab_size, self.width))
        position = self.param("position", EMBED_INIT, (self.sizes.seq_len, self.width))
        if budget is None:
            sizes = (self.num_layers, self.num_experts, self.width, self.hidden)
            budget = open_budget(self.param("experts", init_experts, *sizes), self.num_experts)
        x_btd = (table[tokens_bt] + position[: tokens_bt.shape[1]]).astype(self.dtype)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=self.num_layers,
            unroll=UNROLL,
        )(
            self.num_heads, self.num_experts, self.top_k,
            self.capacity_factor if training else self.eval_capacity_factor,
            self.remat, self.dtype, self.expert, name="blocks",
        )  # fmt: skip
        carry, (permit, routing) = blocks((x_btd, budget.tape), token_mask_bt, budget.experts, budget.layers)
        logits = Head(self.sizes.num_outputs, name="head")(carry[0], token_mask_bt)
        return ModelOutput(logits, carry[1], permit, routing)


@families.register("switch")
def switch(config: ConfigDict, sizes: ModelSizes) -> SwitchClassifier:
    """Returns the encoder of a config's section `model`.

    Raises:
      InputError: heads that do not divide the width.
    """
    if config.width % config.num_heads:
        raise InputError("model.num_heads", config.num_heads, f"does not divide model.width={config.width}",
                         "choose a divisor of the width")  # fmt: skip
    names = ("num_layers", "width", "num_heads", "hidden", "num_experts", "top_k", "remat")
    factors = ("capacity_factor", "eval_capacity_factor")
    fields = {name: config[name] for name in names + factors}
    return SwitchClassifier(sizes, dtype=PRECISIONS[config.precision], **fields)
