"""The experts that a client trains during its round: weights and optimizer state, a row each.

Experts that it only runs (`fl.forward=routed`) it reads from the global model.

Axes: L layers, H experts of a layer on this device, U rows, K slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from hfedmoe_jax.models import Slots, all_slots, slots_of


class ExpertBank(NamedTuple):
    """A client's experts.

    Attributes:
      weights: tree of [U, ...].
      state: tree of [U, ...], an optimizer state a row.
      row: of each expert, U for none.
      count: rows in use.
    """

    weights: Any
    state: Any
    row: Int[Array, " experts"]
    count: Int[Array, ""]


class ExpertRows(NamedTuple):
    """Which rows of an array hold which experts.

    Attributes:
      expert: int32 [U], layer * H + expert; L * H for none, after all others.
      row: int32 [U], of each.
      count: how many experts.
    """

    expert: Int[Array, " rows"]
    row: Int[Array, " rows"]
    count: Int[Array, ""]


def flat(experts: Any) -> Any:
    """Returns a tree of arrays [L, H, ...] as [L * H, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), experts)


def row_of(rows: Any, row: Int[Array, ""]) -> Any:
    """Returns a row of a tree of arrays."""
    return jax.tree.map(lambda x: x[row], rows)


class BankLayout:
    """The static sizes of a bank, and what can be done with it.

    Args:
      num_layers, held: L, H.
      tier: experts that a batch trains at most, over all layers.
      touched: experts that a round trains at most; U, or L * H where that is less.
    """

    def __init__(self, num_layers: int, held: int, tier: int, touched: int):
        self.num_layers, self.held = num_layers, held
        self.num_experts = num_layers * held
        # Two at least: XLA drops an axis of one, compiles a step otherwise, and rounds otherwise.
        self.num_slots = max(2, min(tier, self.num_experts))
        self.num_rows = min(max(2, touched), self.num_experts)
        self.every = self.num_rows == self.num_experts  # a row for each expert: nothing to look up

    def open(self, start: Any, optimizer: optax.GradientTransformation) -> ExpertBank:
        """Returns a bank that has trained nothing yet.

        Args:
          start: the global experts, a tree of [L, H, ...].
          optimizer: of each expert.
        """
        rows = jax.tree.map(lambda x: jnp.zeros((self.num_rows, *x.shape[2:]), x.dtype), start)
        every = jnp.arange(self.num_experts, dtype=jnp.int32)
        return ExpertBank(
            weights=flat(start) if self.every else rows,
            state=jax.vmap(optimizer.init)(rows),
            row=every if self.every else jnp.full_like(every, self.num_rows),
            count=jnp.int32(self.num_experts if self.every else 0),
        )

    def slots(self, active: Bool[Array, "layers held"] | None) -> Slots:
        """Returns the slots of the experts that a batch runs or trains; None means all."""
        if active is None:
            return all_slots(self.num_layers, self.held)
        return slots_of(active, self.num_slots)

    def enter(self, bank: ExpertBank, start: Any, active: Bool[Array, "layers held"] | None) -> ExpertBank:
        """Returns the bank with a row for each expert of `active`."""
        if self.every or active is None:
            return bank
        new = active.reshape(-1) & (bank.row == self.num_rows)
        rank = jnp.cumsum(new, dtype=jnp.int32)
        row = jnp.where(new, bank.count + rank - 1, bank.row)
        wanted, experts = self.slots(active).expert, flat(start)

        def bring(index, weights):
            expert = wanted[index]
            place = jnp.minimum(row[expert], self.num_rows - 1)

            def choose(held, given):
                return held.at[place].set(jnp.where(new[expert], given[expert], held[place]))

            return jax.tree.map(choose, weights, experts)

        weights = jax.lax.fori_loop(0, self.num_slots, bring, bank.weights)
        return ExpertBank(weights, bank.state, row, bank.count + rank[-1])

    def read(self, bank: ExpertBank, expert: Int[Array, ""]) -> Any:
        """Returns the weights of an expert (layer * H + expert) that the bank holds."""
        return row_of(bank.weights, bank.row[expert])

    def read_any(self, bank: ExpertBank, start: Any, expert: Int[Array, ""]) -> Any:
        """Returns the weights of any expert: the bank's, or those of the global model."""
        if self.every:
            return self.read(bank, expert)
        return jax.lax.cond(
            bank.row[expert] < self.num_rows,
            lambda: self.read(bank, expert),
            lambda: row_of(flat(start), expert),
        )

    def update(
        self,
        bank: ExpertBank,
        expert: Int[Array, ""],
        weights: Any,
        gradient: Any,
        trained: Bool[Array, ""],
        optimizer: optax.GradientTransformation,
    ) -> ExpertBank:
        """Returns the bank after a step of an expert's optimizer, or as it was if not `trained`.

        `weights` are those of the expert, as `read` gives them.
        """
        row = bank.row[expert]
        state = row_of(bank.state, row)
        updates, stepped = optimizer.update(gradient, state, weights)

        def keep(rows, new, old):
            return rows.at[row].set(jnp.where(trained, new, old))

        return bank._replace(
            weights=jax.tree.map(keep, bank.weights, optax.apply_updates(weights, updates), weights),
            state=jax.tree.map(keep, bank.state, stepped, state),
        )

    def rows_of(self, bank: ExpertBank, trained: Bool[Array, "layers held"]) -> ExpertRows:
        """Returns where the weights of the trained experts lie, in `bank.weights`."""
        which = slots_of(trained, self.num_rows)
        number = jnp.sum(which.count)
        expert = jnp.where(jnp.arange(self.num_rows) < number, which.expert, self.num_experts)
        row = bank.row[jnp.minimum(expert, self.num_experts - 1)]
        return ExpertRows(expert, jnp.minimum(row, self.num_rows - 1), number)
