"""The layers of BERT-like encoders: dense ones, and those with a mixture of experts.

Axes: B batch, T tokens, N = B * T, L layers with experts, E experts, D model, F hidden, S slots of an expert.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from hfedmoe_jax.experts import Expert, LayerBudget
from hfedmoe_jax.models.attention import masked_attention
from hfedmoe_jax.models.encoder_sizes import EncoderSizes
from hfedmoe_jax.models.lora import Dense
from hfedmoe_jax.models.precision import matmul
from hfedmoe_jax.models.routing import RouterRule, route

INIT = nn.initializers.normal(0.02)


@functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("hidden"), prevent_cse=False
)
def gelu_expert(weights: dict[str, Any], x_sd: Float[Array, "slots model"]) -> Float[Array, "slots model"]:
    """Two matrices with a GELU between them; of the forward pass the hidden units are kept."""
    hidden = checkpoint_name(matmul(x_sd, weights["in_df"]) + weights["bias_f"].astype(x_sd.dtype), "hidden")
    return matmul(jax.nn.gelu(hidden, approximate=False), weights["out_fd"])


def init_experts(key: Array, num_layers: int, num_experts: int, width: int, hidden: int) -> dict[str, Array]:
    """Returns the experts of all layers."""
    first, second = jax.random.split(key)
    lead = (num_layers, num_experts)
    return dict(
        in_df=INIT(first, (*lead, width, hidden)), bias_f=jnp.zeros((*lead, hidden)),
        out_fd=INIT(second, (*lead, hidden, width)),
    )  # fmt: skip


class Attend(nn.Module):
    """Self-attention with a residual connection, then a norm."""

    sizes: EncoderSizes
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns [B, T, D], which the network reads and which is added to its output."""
        s = self.sizes

        def dense(name):
            return Dense(s.width, dtype=self.dtype, lora=s.lora, name=name)

        heads = (*x_btd.shape[:2], s.heads, s.width // s.heads)
        q, k, v = (dense(name)(x_btd).reshape(heads) for name in ("query", "key", "value"))
        y_btd = masked_attention(q, k, v, mask_bt).reshape(x_btd.shape)
        return norm(self, "norm_attention")(x_btd + dense("out")(y_btd))


def norm(block: Any, name: str) -> nn.LayerNorm:
    """Returns a norm of a block."""
    return nn.LayerNorm(block.sizes.epsilon, dtype=block.dtype, use_fast_variance=False, name=name)


class DenseBlock(nn.Module):
    """A layer as the checkpoint has it."""

    sizes: EncoderSizes
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns (x, what the network reads), the carry and the result of `nn.scan`."""
        attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
        h_btd = attend(self.sizes, self.dtype, name="attend")(x_btd, mask_bt)
        hidden = nn.Dense(self.sizes.hidden, dtype=self.dtype, name="network_in")(h_btd)
        y_btd = nn.Dense(self.sizes.width, dtype=self.dtype, name="network_out")(
            jax.nn.gelu(hidden, approximate=False)
        )
        return norm(self, "norm_network")(h_btd + y_btd), h_btd


class MixtureBlock(nn.Module):
    """A layer with experts."""

    sizes: EncoderSizes
    num_experts: int
    rule: RouterRule
    capacity_factor: float
    remat: bool
    dtype: Any
    expert: Expert
    attended: bool = False

    @nn.compact
    def __call__(self, carry, mask_bt, experts, layer: LayerBudget):
        """Returns ((x, tape), (permit, routing)), the carry and the result of `nn.scan`.

        With `attended` the x that it is given has passed its attention.
        """
        h_btd, tape = carry
        if not self.attended:
            attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
            h_btd = attend(self.sizes, self.dtype, name="attend")(h_btd, mask_bt)
        h_btd = jax.lax.optimization_barrier(h_btd)  # cached or not, what follows is compiled alike
        h_nd, mask = h_btd.reshape(-1, self.sizes.width), mask_bt.reshape(-1)
        router = nn.Dense(self.num_experts, name="router", dtype=jnp.float32)
        y_nd, tape, permit, routing = route(
            router(h_nd), h_nd, mask, self.rule, self.capacity_factor, self.expert, experts, layer, tape
        )
        bias = self.param("network_bias", nn.initializers.zeros, (self.sizes.width,))
        x_btd = norm(self, "norm_network")(h_btd + (y_nd + bias.astype(y_nd.dtype)).reshape(h_btd.shape))
        return (x_btd, tape), (permit, routing)


class Mixtures(nn.Module):
    """The layers with experts, the first one apart: behind its attention features may be cached.

    Attributes:
      block: arguments of every `MixtureBlock`.
      attended: of the first one.
    """

    block: tuple
    attended: bool

    @nn.compact
    def __call__(self, carry, mask_bt, experts, layers: LayerBudget):
        """Returns ((x, tape), (permit, routing)) of all layers."""

        def part(rows: Any) -> LayerBudget:
            return jax.tree.map(lambda x: x[rows], layers)

        first = MixtureBlock(*self.block, attended=self.attended, name="first")
        carry, reports = first(carry, mask_bt, experts, part(0))
        reports, length = jax.tree.map(lambda x: x[None], reports), len(layers.layer) - 1
        if length:
            rest = nn.scan(
                MixtureBlock, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=length,
            )  # fmt: skip
            carry, others = rest(*self.block, name="rest")(carry, mask_bt, experts, part(slice(1, None)))
            reports = jax.tree.map(lambda *x: jnp.concatenate(x), reports, others)
        return carry, reports


def cut_first(variables: dict) -> dict:
    """Returns the parameters of `Mixtures` of stacked ones [L, ...]."""
    stack = variables["params"]
    first, rest = (jax.tree.map(part, stack) for part in (lambda x: x[0], lambda x: x[1:]))
    return {"params": {"first": first, "rest": rest}}


def stack_first(variables: dict) -> dict:
    """Returns stacked parameters [L, ...] of those of `Mixtures`."""
    first = jax.tree.map(lambda x: x[None], variables["params"]["first"])
    rest = variables["params"].get("rest")
    return {"params": first if rest is None else jax.tree.map(lambda *x: jnp.concatenate(x), first, rest)}


class Trunk(nn.Module):
    """Embeddings and the layers without experts: of a checkpoint as it is, all of them."""

    shape: EncoderSizes
    layers: int
    rows: int
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, tokens_bt, mask_bt):
        """Returns the output [B, T, D], and what each layer's network reads [layers, B, T, D]."""
        s = self.shape
        table = self.param("embed", INIT, (self.rows, s.width))
        position = self.param("position", INIT, (s.positions, s.width))
        kind = self.param("kind", INIT, (s.kinds, s.width))
        parts = table[tokens_bt], position[: tokens_bt.shape[1]], kind[0]
        x_btd = sum(part.astype(jnp.float32) for part in parts)
        x_btd = nn.LayerNorm(s.epsilon, use_fast_variance=False, name="norm_embed")(x_btd).astype(self.dtype)
        if not self.layers:
            return x_btd, None
        stack = nn.scan(
            DenseBlock, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=nn.broadcast, length=self.layers,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return stack(s, self.remat, self.dtype, name="dense")(x_btd, mask_bt)
