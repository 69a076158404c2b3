"""Two ways to run the experts of a layer on their tokens, behind one signature.

`dense` computes every expert on every token and is the oracle; `capacity` gathers each
expert's tokens into a buffer of fixed size by index and drops what does not fit. The two
agree wherever nothing is dropped.

Axes: N tokens, E experts, K experts of a token, S slots of an expert (its capacity), D model, F hidden.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hfedmoe_jax.models.routing import Assignment


class ExpertWeights(NamedTuple):
    """The two matrices of every expert of a layer: [E, D, F] and [E, F, D]."""

    w_in_edf: Float[Array, "experts model hidden"]
    w_out_efd: Float[Array, "experts hidden model"]


class SlotPlan(NamedTuple):
    """Which slot serves which token, in one layer.

    Attributes:
      slot: each assignment's slot, expert * S + position; E * S where it has none.
      token: each slot's token; N where it is empty.
    """

    slot: Int[Array, "k tokens"]
    token: Int[Array, "experts slots"]


def feed_forward(
    x_esd: Float[Array, "experts slots model"],
    weights: ExpertWeights,
    backward: Bool[Array, " experts"],
    multiplier: Float[Array, " experts"],
) -> Float[Array, "experts slots model"]:
    """Returns each expert's output on its own slots, under the client's controls."""
    hidden_esf = jax.nn.relu(jnp.einsum("esd,edf->esf", x_esd, weights.w_in_edf))
    y_esd = jnp.einsum("esf,efd->esd", hidden_esf, weights.w_out_efd)
    y_esd = jnp.where(backward[:, None, None], y_esd, jax.lax.stop_gradient(y_esd))
    return y_esd * multiplier[:, None, None]


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Returns the slots of each expert: capacity_factor times an even share, at least 1, at most all."""
    even_share = num_tokens * top_k / num_experts
    return max(1, min(num_tokens, math.ceil(capacity_factor * even_share)))


def dense(
    x_nd: Float[Array, "tokens model"],
    assignment: Assignment,
    weights: ExpertWeights,
    backward: Bool[Array, " experts"],
    multiplier: Float[Array, " experts"],
    capacity: int,
) -> tuple[Float[Array, "tokens model"], Bool[Array, "tokens k"]]:
    """Computes every expert on every token and adds them by weight; nothing is dropped."""
    del capacity
    num_experts = weights.w_in_edf.shape[0]
    x_end = jnp.broadcast_to(x_nd, (num_experts, *x_nd.shape))
    y_end = feed_forward(x_end, weights, backward, multiplier)
    weight_nke = jax.nn.one_hot(assignment.expert, num_experts) * assignment.weight[..., None]
    return jnp.einsum("nke,end->nd", weight_nke, y_end), assignment.weight > 0


def plan_slots(assignment: Assignment, num_experts: int, capacity: int) -> SlotPlan:
    """Gives each expert's first `capacity` tokens a slot.

    First choices take slots before second choices, earlier tokens before later ones.
    """
    num_tokens, top_k = assignment.expert.shape
    wanted_kn = assignment.weight.T > 0
    expert_kn = assignment.expert.T
    # Position of each assignment in its expert's queue, first choices first.
    queue = jax.nn.one_hot(expert_kn.reshape(-1), num_experts, dtype=jnp.int32) * wanted_kn.reshape(-1, 1)
    position = jnp.sum((jnp.cumsum(queue, axis=0) - queue) * queue, axis=-1).reshape(top_k, num_tokens)
    nowhere = num_experts * capacity
    slot_kn = jnp.where(wanted_kn & (position < capacity), expert_kn * capacity + position, nowhere)
    token_kn = jnp.broadcast_to(jnp.arange(num_tokens), (top_k, num_tokens))
    token = jnp.full(nowhere, num_tokens).at[slot_kn].set(token_kn, mode="drop")
    return SlotPlan(slot_kn, token.reshape(num_experts, capacity))


def take_rows(array: Float[Array, "rows width"], index: Int[Array, "*shape"]) -> Float[Array, "*shape width"]:
    """Returns rows by index, zeros where the index is beyond the last row."""
    return array.at[index].get(mode="fill", fill_value=0)


def capacity_gather(
    x_nd: Float[Array, "tokens model"],
    assignment: Assignment,
    weights: ExpertWeights,
    backward: Bool[Array, " experts"],
    multiplier: Float[Array, " experts"],
    capacity: int,
) -> tuple[Float[Array, "tokens model"], Bool[Array, "tokens k"]]:
    """Gathers each expert's first `capacity` tokens by index, computes those, scatters back.

    A token without a slot (see `plan_slots`) passes by the residual connection alone.
    Returns the output [N, D] and which assignments [N, K] had a slot.
    """
    num_experts = weights.w_in_edf.shape[0]
    plan = plan_slots(assignment, num_experts, capacity)
    y_esd = feed_forward(take_rows(x_nd, plan.token), weights, backward, multiplier)
    kept_kn = plan.slot < num_experts * capacity
    weight_kn = jnp.where(kept_kn, assignment.weight.T, 0.0)
    y_knd = take_rows(y_esd.reshape(num_experts * capacity, -1), plan.slot)
    return jnp.einsum("kn,knd->nd", weight_kn, y_knd), kept_kn.T


DISPATCHERS = {"dense": dense, "capacity": capacity_gather}
"""What the reference model may run its experts by; training has `hfedmoe_jax.budgeted`."""
