"""Slots: the selected experts of all layers in one list, so that arrays need rows for those alone.

Axes: L layers, E experts, K slots.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Slots(NamedTuple):
    """Experts to run, by layer and then by expert.

    Attributes:
      first, count: of each layer, its first slot and how many.
      expert: the expert of each slot, layer * E + expert; the last rows are unused if fewer are selected.
      slot: the slot of each expert, K for none.
      most: a bound of `count`, known when compiling, for all experts of all layers; else None.
    """

    first: Int[Array, " layers"]
    count: Int[Array, " layers"]
    expert: Int[Array, " slots"]
    slot: Int[Array, "layers experts"]
    most: int | None = None


def all_slots(num_layers: int, num_experts: int) -> Slots:
    """Returns a slot for every expert."""
    layers = jnp.arange(num_layers, dtype=jnp.int32)
    everything = jnp.arange(num_layers * num_experts, dtype=jnp.int32)
    return Slots(
        first=layers * num_experts,
        count=jnp.full_like(layers, num_experts),
        expert=everything,
        slot=everything.reshape(num_layers, num_experts),
        most=num_experts,
    )


def slots_of(selected: Bool[Array, "layers experts"], size: int) -> Slots:
    """Returns slots for the selected experts.

    Args:
      selected: at most `size` of them.
      size: K, the rows that arrays over slots have.
    """
    flat = selected.reshape(-1)
    rank = jnp.cumsum(flat, dtype=jnp.int32) - 1
    count = jnp.sum(selected, axis=1, dtype=jnp.int32)
    place = jnp.where(flat, rank, size)
    experts = jnp.arange(flat.size, dtype=jnp.int32)
    return Slots(
        first=jnp.cumsum(count, dtype=jnp.int32) - count,
        count=count,
        expert=jnp.zeros(size, jnp.int32).at[place].set(experts, mode="drop"),
        slot=place.reshape(selected.shape),
    )
