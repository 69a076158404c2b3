"""The layers of decoders: those with a mixture of experts, and those without.

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
from hfedmoe_jax.models.decoder_attention import GroupedAttention, LatentAttention
from hfedmoe_jax.models.decoder_sizes import DecoderSizes
from hfedmoe_jax.models.precision import matmul
from hfedmoe_jax.models.routing import route

INIT = nn.initializers.normal(0.02)


@functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("gate", "up"), prevent_cse=False
)
def gated_expert(weights: dict[str, Any], x_sd: Float[Array, "slots model"]) -> Float[Array, "slots model"]:
    """silu(x gate) * (x up), then down; of the forward pass the two products are kept."""
    gate = checkpoint_name(matmul(x_sd, weights["gate_df"]), "gate")
    up = checkpoint_name(matmul(x_sd, weights["up_df"]), "up")
    return matmul(jax.nn.silu(gate) * up, weights["down_fd"])


def init_experts(key: Array, num_layers: int, num_experts: int, width: int, hidden: int) -> dict[str, Array]:
    """Returns the experts of all layers."""
    gate, up, down = jax.random.split(key, 3)
    inwards = (num_layers, num_experts, width, hidden)
    return dict(
        gate_df=INIT(gate, inwards), up_df=INIT(up, inwards),
        down_fd=INIT(down, (num_layers, num_experts, hidden, width)),
    )  # fmt: skip


class GatedNetwork(nn.Module):
    """Gated units that serve every token."""

    hidden: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "... model"]) -> Float[Array, "... model"]:
        """Returns an array like `h`."""
        gate, up = (
            nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name=name)(h) for name in ("gate", "up")
        )
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="down")(jax.nn.silu(gate) * up)


class Attend(nn.Module):
    """Attention behind a norm and a residual connection, then the norm before the network."""

    sizes: DecoderSizes
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns the residual stream, and what the network reads."""

        def norm(name):
            return nn.RMSNorm(self.sizes.epsilon, dtype=self.dtype, name=name)

        attention = GroupedAttention if self.sizes.latent is None else LatentAttention
        h_btd = norm("norm_attention")(x_btd)
        x_btd = x_btd + attention(self.sizes, self.dtype, name="attention")(h_btd, mask_bt)
        return x_btd, norm("norm_network")(x_btd)


class DenseBlock(nn.Module):
    """A layer without experts."""

    sizes: DecoderSizes
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns (x, what the network reads), the carry and the result of `nn.scan`."""
        attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
        x_btd, h_btd = attend(self.sizes, self.dtype, name="attend")(x_btd, mask_bt)
        network = GatedNetwork(self.sizes.hidden, self.sizes.width, self.dtype, name="network")
        return x_btd + network(h_btd), h_btd


class MixtureBlock(nn.Module):
    """A layer with experts."""

    sizes: DecoderSizes
    capacity_factor: float
    remat: bool
    dtype: Any
    expert: Expert

    @nn.compact
    def __call__(self, carry, mask_bt, experts, layer: LayerBudget):
        """Returns ((x, tape), (permit, routing)), the carry and the result of `nn.scan`."""
        s, (x_btd, tape) = self.sizes, carry
        attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
        x_btd, h_btd = attend(s, self.dtype, name="attend")(x_btd, mask_bt)
        h_nd, mask = h_btd.reshape(-1, s.width), mask_bt.reshape(-1)
        router = nn.Dense(s.num_experts, use_bias=s.router_bias, name="router", dtype=jnp.float32)
        y_nd, tape, permit, routing = route(
            router(h_nd),
            h_nd,
            mask,
            s.router,
            self.capacity_factor,
            self.expert,
            experts,
            layer,
            tape,
            x_btd.shape[1],
        )
        if s.shared_hidden:
            common = GatedNetwork(s.shared_hidden, s.width, self.dtype, name="shared")(h_nd)
            if s.shared_gate:
                scale = nn.Dense(1, use_bias=False, dtype=self.dtype, name="shared_gate")(h_nd)
                common = jax.nn.sigmoid(scale) * common
            y_nd = y_nd + common
        return (x_btd + y_nd.reshape(x_btd.shape), tape), (permit, routing)
