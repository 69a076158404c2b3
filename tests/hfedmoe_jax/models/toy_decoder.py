"""A family in one file: a causal decoder, tied head, GLU experts beside a shared one, a dense first layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from hfedmoe_jax.experts import mix_experts, open_budget
from hfedmoe_jax.models import ModelOutput, ModelSizes, Routing, families, load_balancing_loss, own_choice
from hfedmoe_jax.models.routing import RouterRule, assign
from hfedmoe_jax.slots import expert_capacity


def glu(weights, x_sd):
    return (jax.nn.silu(x_sd @ weights["gate_df"]) * (x_sd @ weights["up_df"])) @ weights["down_fd"]


def init_glu(key, leading, width, hidden):
    shapes = {"gate_df": (width, hidden), "up_df": (width, hidden), "down_fd": (hidden, width)}
    init = nn.initializers.normal(0.2)
    return {n: init(jax.random.fold_in(key, i), leading + shapes[n]) for i, n in enumerate(shapes)}


class Layer(nn.Module):
    """Causal attention, a dense expert, and beside it, but in the first layer, a mixture of others."""

    config: FrozenConfigDict
    factor: float | None = None

    @nn.compact
    def __call__(self, carry, mask_bt, experts=None, layer=None):
        (x_btd, tape), c = carry, self.config
        mask = nn.combine_masks(nn.make_causal_mask(mask_bt), mask_bt[:, None, None])
        x_btd += nn.MultiHeadDotProductAttention(c.num_heads)(nn.RMSNorm()(x_btd), mask=mask)
        h_nd, real = nn.RMSNorm()(x_btd).reshape(-1, c.width), mask_bt.reshape(-1)
        x_btd += glu(self.param("dense", init_glu, (), c.width, c.hidden), h_nd).reshape(x_btd.shape)
        if self.factor is None:
            return x_btd
        gates, (index, weight) = assign(
            nn.Dense(c.num_experts, name="router")(h_nd), layer, real, RouterRule(c.top_k)
        )
        weight /= jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-9)
        capacity = expert_capacity(len(h_nd), c.num_experts, c.top_k, self.factor)
        y_nd, tape, served = mix_experts(glu, capacity, experts, layer, tape, h_nd, index, weight)
        own = own_choice(gates, real, RouterRule(c.top_k))
        balance = load_balancing_loss(gates, own, real)
        routing = Routing(gates, own, served.sent, served.kept, served.slots, balance)
        return (x_btd + y_nd.reshape(x_btd.shape), tape), (served.permit, routing)


class Decoder(nn.Module):
    sizes: ModelSizes
    num_layers: int
    num_experts: int
    top_k: int
    config: FrozenConfigDict
    expert = staticmethod(glu)
    table, output = None, "token"  # the head reads the table too

    def mask(self, batch):
        return batch["tokens"] != 0

    @nn.compact
    def __call__(self, batch, budget=None, training=True):
        c, mask_bt, experts = self.config, self.mask(batch), (self.num_layers, self.num_experts)
        if budget is None:
            budget = open_budget(self.param("experts", init_glu, experts, c.width, c.hidden), c.num_experts)
        embed = nn.Embed(self.sizes.vocab_size, c.width, name="embed")
        x_btd = Layer(c, name="first")((embed(batch["tokens"]), ()), mask_bt)
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=self.num_layers)
        layers = nn.scan(Layer, in_axes=(nn.broadcast, nn.broadcast, 0), **axes)
        layers = layers(c, c.capacity_factor if training else c.eval_capacity_factor, name="layers")
        (x_btd, tape), outputs = layers((x_btd, budget.tape), mask_bt, budget.experts, budget.layers)
        return ModelOutput(embed.attend(nn.RMSNorm()(x_btd)), tape, *outputs)


@families.register("toy_decoder")
def build(config, sizes):
    return Decoder(sizes, config.num_layers, config.num_experts, config.top_k, FrozenConfigDict(config))
