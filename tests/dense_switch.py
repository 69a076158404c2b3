"""The Switch encoder by the plain road: every expert computes every token, masks decide what counts.

Nothing of the package computes here but Flax's layers; `jax.grad` differentiates it.

Axes: B batch, T tokens, N = B * T, L layers, E experts, K experts of a token, D model.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hfedmoe_jax.models import Params, merge_params
from hfedmoe_jax.slots import expert_capacity


class Controls(NamedTuple):
    """What each expert may do: arrays [L, E].

    Attributes:
      forward: tokens may be sent to it.
      backward: it is no constant.
      multiplier: factor of its output.
    """

    forward: jax.Array
    backward: jax.Array
    multiplier: jax.Array


class Mixed(NamedTuple):
    """A layer's mixture.

    Attributes:
      y: [N, D].
      gates: [N, E], softmax over all experts.
      own: bool [N, E], the experts that real tokens would choose of all.
      sent, kept: int [E], tokens sent to it, and those it had room for.
    """

    y: jax.Array
    gates: jax.Array
    own: jax.Array
    sent: jax.Array
    kept: jax.Array


def choose(gates_ne, real_n, top_k: int):
    """Returns bool [K, N, E], each real token's first to K-th choice."""
    rank_ne = jnp.argsort(jnp.argsort(-gates_ne, axis=-1, stable=True), axis=-1)
    return (rank_ne == jnp.arange(top_k)[:, None, None]) & real_n[:, None]


def with_room(chosen_kne, capacity: int):
    """Returns which choices find a place: an expert takes first choices first, and early tokens."""
    queue = chosen_kne.reshape(-1, chosen_kne.shape[-1])
    return (queue & (jnp.cumsum(queue, axis=0) <= capacity)).reshape(chosen_kne.shape)


def mixture(h_nd, logits_ne, weights, expert, controls: Controls, real_n, top_k: int, capacity: int) -> Mixed:
    """Returns the mixture of one layer; `expert` computes one, `weights` are those of all."""
    gates = jax.nn.softmax(logits_ne)
    own = jnp.any(choose(gates, real_n, top_k), axis=0)
    weight_ne = jax.nn.softmax(jnp.where(controls.forward, logits_ne, -1e30))
    chosen = choose(jnp.where(controls.forward, weight_ne, -1), real_n, top_k) & controls.forward
    kept = with_room(chosen, capacity)
    y_end = jax.vmap(expert, (0, None))(weights, h_nd)
    y_end = jnp.where(controls.backward[:, None, None], y_end, jax.lax.stop_gradient(y_end))
    factor_ne = jnp.where(jnp.any(kept, axis=0), weight_ne, 0) * controls.multiplier
    y_nd = jnp.einsum("ne,end->nd", factor_ne, y_end)
    return Mixed(y_nd, gates, own, jnp.sum(chosen, axis=(0, 1)), jnp.sum(kept, axis=(0, 1)))


def relu_expert(weights, x_nd):
    """Two matrices with a ReLU between them."""
    return jax.nn.relu(x_nd @ weights["w_in_df"]) @ weights["w_out_fd"]


def dense_switch(
    params: Params, frozen: dict, tokens_bt, controls: Controls, config: ConfigDict, factor: float
) -> tuple[jax.Array, Mixed]:
    """Returns logits [B, classes] and what each layer did, stacked.

    Args:
      config: the section `model`.
      factor: the capacity factor.
    """
    variables, mask_bt = merge_params(params.router, params.shared, frozen), tokens_bt != 0
    attention, norm = nn.MultiHeadDotProductAttention(config.num_heads), nn.LayerNorm()

    def layer(index, x_btd):
        weights, of_experts = (
            jax.tree.map(lambda w: w[index], t) for t in (variables["blocks"], params.experts)
        )
        attend = weights["attend"]
        h_btd = norm.apply({"params": attend["norm_attention"]}, x_btd)
        x_btd += attention.apply({"params": attend["attention"]}, h_btd, mask=mask_bt[:, None, None])
        h_nd = norm.apply({"params": attend["norm_moe"]}, x_btd).reshape(-1, config.width)
        mixed = mixture(
            h_nd, h_nd @ weights["router"]["kernel"], of_experts, relu_expert,
            Controls(*(x[index] for x in controls)), mask_bt.reshape(-1), config.top_k,
            expert_capacity(len(h_nd), config.num_experts, config.top_k, factor),
        )  # fmt: skip
        return x_btd + mixed.y.reshape(x_btd.shape), mixed

    x_btd = variables["embed"][tokens_bt] + variables["position"][: tokens_bt.shape[1]]
    layers = []
    for index in range(config.num_layers):
        x_btd, mixed = layer(index, x_btd)
        layers.append(mixed)
    x_btd = norm.apply({"params": variables["head"]["norm"]}, x_btd)
    pooled = jnp.sum(jnp.where(mask_bt[..., None], x_btd, 0), axis=1)
    pooled /= jnp.maximum(jnp.sum(mask_bt, axis=1, keepdims=True), 1)
    head = variables["head"]["classes"]
    return pooled @ head["kernel"] + head["bias"], jax.tree.map(lambda *x: jnp.stack(x), *layers)
