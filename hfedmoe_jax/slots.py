"""Slots: the places for tokens that each expert of a layer has.

An expert computes a buffer of S tokens, gathered by index. A token that finds no slot is dropped: it
passes by the residual connection alone.

Axes: N tokens, E experts, H experts of this device, K experts of a token, S slots of an expert, D model.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.mesh import Place, shard_of


class Slots(NamedTuple):
    """Which tokens the experts of this device serve, in one layer.

    Attributes:
      of_assignment: each assignment's slot, expert * S + position; H * S where it has none here.
      token, assignment: each slot's token, N where it is empty, and its assignment, k * N + token.
      kept: int32 [E], tokens that each expert of the layer serves, over all devices.
    """

    of_assignment: Int[Array, "k tokens"]
    token: Int[Array, "local_experts slots"]
    assignment: Int[Array, "local_experts slots"]
    kept: Int[Array, " experts"]


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Returns the slots of each expert: capacity_factor times an even share, at least 1, at most all.

    With a factor of 0, or the number of experts over top_k, there is room for all.
    """
    if not capacity_factor:
        return num_tokens
    even_share = num_tokens * top_k / num_experts
    return max(1, min(num_tokens, math.ceil(capacity_factor * even_share)))


def plan_slots(
    expert: Int[Array, "tokens k"],
    wanted: Bool[Array, "tokens k"],
    num_experts: int,
    capacity: int,
    place: Place,
) -> Slots:
    """Gives each expert's first `capacity` tokens a slot.

    First choices take slots before second choices, earlier tokens before later ones.

    Args:
      expert: of each assignment, in [0, E).
      wanted: False for an assignment that counts for nothing.
    """
    num_tokens, top_k = expert.shape
    expert_kn, wanted_kn = expert.T.reshape(-1), wanted.T.reshape(-1)
    # Position of each assignment in its expert's queue, first choices first.
    queue = jax.nn.one_hot(expert_kn, num_experts, dtype=jnp.int32) * wanted_kn[:, None]
    position = jnp.sum((jnp.cumsum(queue, axis=0) - queue) * queue, axis=-1)
    held, first = shard_of(num_experts, place)
    local = expert_kn - first
    has_slot = wanted_kn & (position < capacity) & (local >= 0) & (local < held)
    slot = jnp.where(has_slot, local * capacity + position, held * capacity)
    each = jnp.arange(top_k * num_tokens, dtype=jnp.int32)
    assignment = jnp.full(held * capacity, top_k * num_tokens).at[slot].set(each, mode="drop")
    token = jnp.where(assignment < top_k * num_tokens, assignment % num_tokens, num_tokens)
    return Slots(
        of_assignment=slot.reshape(top_k, num_tokens),
        token=token.reshape(held, capacity),
        assignment=assignment.reshape(held, capacity),
        kept=jnp.minimum(jnp.sum(queue, axis=0), capacity),
    )


def take_rows(array: Float[Array, "rows ..."], index: Int[AnyArray, "..."]) -> Float[Array, "..."]:
    """Returns rows by index, zeros where the index is beyond the last row."""
    return array.at[index].get(mode="fill", fill_value=0)
