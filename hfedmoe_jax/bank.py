"""The experts that a client trains during its round: weights and optimizer state, a row each.

Experts that it only runs (`fl.forward=routed`) it reads from the global model. The rows are the tape of the
client's passes (see `experts`): an expert takes its step as soon as its gradient is there, so that gradients
take no memory of their own (the fused backward pass of LOMO, arXiv 2306.09782).

Axes: L layers, H experts of a layer on this device, U rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.experts import Rules, flat, for_each, put, row_of, visits
from hfedmoe_jax.mesh import Place


class Rows(NamedTuple):
    """What a client has of each expert that it trains, trees of [U, ...].

    Attributes:
      weights: of the experts.
      state: of their optimizers, counters as float32: a tape has cotangents, and integers have none.
    """

    weights: Any
    state: Any


class ExpertBank(NamedTuple):
    """A client's experts.

    Attributes:
      rows: see there.
      row: of each expert, U for none.
      count: rows in use.
    """

    rows: Rows
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


class Readable(NamedTuple):
    """What a forward pass reads experts from.

    Attributes:
      weights: tree of [U, ...].
      row: of each expert, U for none.
      start: the global experts, tree of [L * H, ...]; None where every expert that runs has a row.
    """

    weights: Any
    row: Int[Array, " experts"]
    start: Any


class BankLayout:
    """The static sizes of a bank, and what can be done with it.

    Args:
      num_layers, held: L, H.
      touched: experts that a round trains at most; U, or L * H where that is less.
      optimizer: of each expert.
      place: where the client runs.
    """

    def __init__(
        self, num_layers: int, held: int, touched: int, optimizer: optax.GradientTransformation, place: Place
    ):
        self.num_layers, self.held = num_layers, held
        self.num_experts = num_layers * held
        # Two at least: XLA drops an axis of one, compiles a step otherwise, and rounds otherwise.
        self.num_rows = min(max(2, touched), self.num_experts)
        self.every = self.num_rows == self.num_experts  # a row for each expert: nothing to look up
        self.optimizer, self.place = optimizer, place

    def open(self, start: Any) -> ExpertBank:
        """Returns a bank that has trained nothing yet.

        Args:
          start: the global experts, a tree of [L, H, ...].
        """
        rows = jax.tree.map(lambda x: jnp.zeros((self.num_rows, *x.shape[2:]), x.dtype), start)
        every = jnp.arange(self.num_experts, dtype=jnp.int32)
        return ExpertBank(
            Rows(flat(start) if self.every else rows, as_floats(jax.vmap(self.optimizer.init)(rows))),
            row=every if self.every else jnp.full_like(every, self.num_rows),
            count=jnp.int32(self.num_experts if self.every else 0),
        )

    def add(self, bank: ExpertBank, start: Any, active: Bool[Array, "layers held"] | None) -> ExpertBank:
        """Returns the bank with a row for each expert of `active`; None means all.

        Args:
          start: the global experts, a tree of [L, H, ...], whose weights new rows take.
        """
        if self.every or active is None:
            return bank
        new = active.reshape(-1) & (bank.row == self.num_rows)
        added = visits(new, self.num_experts)
        row = jnp.where(new, bank.count + added.place, bank.row)
        experts = flat(start)

        def copy(weights, _, expert, valid):
            place = jnp.minimum(row[expert], self.num_rows - 1)
            return jax.tree.map(lambda held, given: put(held, place, given[expert], valid), weights, experts)

        weights = for_each(added, self.place, copy, bank.rows.weights)
        return ExpertBank(bank.rows._replace(weights=weights), row, bank.count + added.count)

    def readable(self, bank: ExpertBank, start: Any, routed: bool) -> Readable:
        """Returns what a forward pass reads.

        Args:
          start: as in `add`.
          routed: the pass also runs experts that have no row, with the global weights.
        """
        return Readable(bank.rows.weights, bank.row, flat(start) if routed and not self.every else None)

    def tape(self, bank: ExpertBank) -> Rows:
        """Returns the zeros that are threaded through a forward pass."""
        return jax.tree.map(jnp.zeros_like, bank.rows)

    def rows_for(self, bank: ExpertBank, active: Bool[AnyArray, "layers held"] | None) -> Array:
        """Returns the cotangent of the permits [L, H] that trains these experts; None means all."""
        row = bank.row.reshape(self.num_layers, self.held).astype(jnp.float32)
        return row if active is None else jnp.where(active, row, -1.0)

    def rules(self, adjust: Callable[..., Any] | None, most: int, keep: bool) -> Rules:
        """Returns the rules of a training pass.

        Args:
          adjust: (gradient, weights, *anchor, expert) -> gradient, or None. The context of the pass is
            (rate, anchor), where `rate` multiplies the optimizer's updates.
          most, keep: see `Rules`.
        """

        def reread(tape: Rows, bank, row, expert):
            return row_of(tape.weights, row)

        def write(tape: Rows, context, row, expert, weights, gradient, reached):
            rate, anchor = context
            if adjust is not None:
                gradient = adjust(gradient, weights, *anchor, expert)
            state = row_of(tape.state, row)
            types = jax.eval_shape(self.optimizer.init, weights)
            updates, stepped = self.optimizer.update(gradient, restore_types(state, types), weights)
            new = Rows(optax.apply_updates(weights, optax.tree.scale(rate, updates)), as_floats(stepped))

            def keep_or_set(rows, new, old):
                return rows.at[row].set(jnp.where(reached, new, old))

            return jax.tree.map(keep_or_set, tape, new, Rows(weights, state))

        return Rules(read, reread, write, most, keep, self.place)

    def rows_of(self, bank: ExpertBank, trained: Bool[Array, "layers held"]) -> ExpertRows:
        """Returns where the weights of the trained experts lie, in `bank.rows.weights`."""
        which = visits(trained.reshape(-1), self.num_experts)
        expert = which.expert[: self.num_rows]
        expert = jnp.where(jnp.arange(self.num_rows) < which.count, expert, self.num_experts)
        row = bank.row[jnp.minimum(expert, self.num_experts - 1)]
        return ExpertRows(expert, jnp.minimum(row, self.num_rows - 1), which.count)


def read(bank: Readable, expert: Int[Array, ""]) -> Any:
    """Returns the weights of an expert: the client's own, or those of the global model."""
    row = bank.row[expert]
    if bank.start is None:
        return row_of(bank.weights, row)
    num_rows = jax.tree.leaves(bank.weights)[0].shape[0]
    return jax.lax.cond(row < num_rows, lambda: row_of(bank.weights, row), lambda: row_of(bank.start, expert))


def as_floats(state: Any) -> Any:
    """Returns a tree with its integers as float32, exact below 2^24."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.integer) else x, state)


def restore_types(state: Any, like: Any) -> Any:
    """Returns a tree with the types that `like` has, leaf by leaf."""
    types = [leaf.dtype for leaf in jax.tree.leaves(like)]
    return jax.tree.unflatten(
        jax.tree.structure(state), [x.astype(t) for x, t in zip(jax.tree.leaves(state), types, strict=True)]
    )
