"""One client's part of a round: score, select, train, report. A pure function of arrays.

Axes: S local steps, B batch, T tokens, L MoE layers, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload
from hfedmoe_jax.bank import BankLayout, ExpertBank, ExpertRows, flat, row_of
from hfedmoe_jax.budgeted import (
    ALONE,
    Place,
    Seen,
    backward_pass,
    everywhere,
    experts_here,
    forward_pass,
    here,
    most_turns,
    total,
)
from hfedmoe_jax.models import MoeModel, Params, slots_of
from hfedmoe_jax.scores import routing_importance, union, units_of, usage, usage_over_batches
from hfedmoe_jax.scoring import Batch, Importance, Scoring

OK, DROPPED_OUT, OVER_BUDGET, NONFINITE = range(4)
STATUS_NAMES = ("ok", "dropped_out", "over_budget", "nonfinite")


class ClientData(NamedTuple):
    """One client's input to a round (a cohort stacks them on a leading axis).

    Attributes:
      client: its number.
      tokens, labels: one batch a local step.
      size: |D_c| over a power of two that no client's exceeds, so at most one.
      budget: experts it can train, over all layers.
      available: False for a client that drops out of the round.
    """

    client: Int[Array, ""]
    tokens: Int[Array, "steps batch tokens"]
    labels: Int[Array, "steps batch"]
    size: Float[Array, ""]
    budget: Int[Array, ""]
    available: Bool[Array, ""]


class ClientReport(NamedTuple):
    """What a client measured, means over its steps unless said otherwise.

    Attributes:
      status: OK, DROPPED_OUT, OVER_BUDGET or NONFINITE (an index into STATUS_NAMES).
      loss: cross-entropy in nats.
      accuracy: share of training examples predicted right.
      union_size: experts that the batch's tokens were routed to.
      max_union_size: the largest of these.
      trained_size: experts that were trained.
      assignments, trained_assignments: token-expert pairs computed a step over all layers, and those
        whose expert was trained.
      dropped: share of assignments that found no room.
      router_entropy: mean entropy of the gates in nats.
      padding: share of the batches' tokens that are padding.
      empty_slots: share of the places for tokens that the experts which ran had and no token took.
    """

    status: Int[Array, ""]
    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    union_size: Float[Array, ""]
    max_union_size: Float[Array, ""]
    trained_size: Float[Array, ""]
    assignments: Float[Array, ""]
    trained_assignments: Float[Array, ""]
    dropped: Float[Array, ""]
    router_entropy: Float[Array, ""]
    padding: Float[Array, ""]
    empty_slots: Float[Array, ""]


class ClientUpdate(NamedTuple):
    """A client's parameters after local training, with what it tells the server.

    Attributes:
      params: the router, the shared parameters with the rows of the embedding table that the client's
        tokens use, and the weights of its `ExpertBank`.
      trained: where the experts that it trained lie in them.
      token: int32 [R], which row of the table each is, the vocabulary's size for an unused one; None if
        it is the whole table.
      upload, report: see there.
    """

    params: Params
    trained: ExpertRows
    token: Int[Array, " table_rows"] | None
    upload: Upload
    report: ClientReport


class LocalRule(NamedTuple):
    """How a client treats its experts.

    Attributes:
      score: how experts are scored, or None: all of them are trained.
      fail_over_budget: the client fails if a batch activates more experts than it can train.
      proximal_mu: weight of FedProx's mu / 2 |w - w_global|^2, 0 for none.
    """

    score: Scoring | None
    fail_over_budget: bool
    proximal_mu: float


class Carry(NamedTuple):
    """What a client takes from step to step."""

    params: Params
    rest_state: Any
    bank: ExpertBank
    importance: Importance


def make_client(
    model: MoeModel,
    optimizer: optax.GradientTransformation,
    rule: LocalRule,
    config: ConfigDict,
    tier: int,
    table_rows: int,
    place: Place = ALONE,
) -> Callable[[Params, ClientData, Array], ClientUpdate]:
    """Returns `train(params, client, key) -> ClientUpdate`.

    Each step selects experts for its batch (15) and trains those, the routers and the shared
    parameters. Scores come from what the steps compute anyway, see `scoring`. With
    `fl.forward=active` the experts are chosen before the forward pass and the others do not run.

    Our decisions: usage (16) is over the samples of the round's batches, not over all of D_c, which would
    be a pass of its own; of an embedding table the client holds the rows of its own tokens, which
    changes nothing for optimizers that leave a weight alone as long as its gradient was always zero.

    Args:
      optimizer: every expert, and everything else together, has one of its own.
      config: reads model, importance, fl.forward, fl.local_steps.
      tier: the most experts over all layers that a client of this program trains on a batch.
      table_rows: R, at least the distinct tokens of a client's round, padding included.
      place: where it runs.
    """
    score = rule.score
    routed = score is None or score.routed
    remat, factor, balance = config.model.remat, config.model.capacity_factor, config.model.load_balance
    touched = tier if config.importance.refresh == "round" else tier * config.fl.local_steps
    if score is None:
        tier = touched = model.num_layers * model.num_experts

    def cross_entropy(head: dict, x: Array, tokens: Array, labels: Array):
        logits = model.pieces.head(head, x, model.real(tokens))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), logits

    def by_routers(start: Params, rest: Params, tokens: Array) -> tuple[Seen, Array]:
        """What the routers say of a batch when no expert runs, and which of its tokens are real."""
        nobody = slots_of(jnp.zeros((model.num_layers, 1), bool), 1)
        read = functools.partial(row_of, flat(start.experts))
        _, seen, _, _ = forward_pass(model, rest, read, nobody, None, tokens, factor)
        return seen, model.real(tokens)

    def train(start: Params, client: ClientData, key: Array) -> ClientUpdate:
        table = start.shared[model.pieces.table]
        used, tokens = distinct_tokens(client.tokens, table.shape[0], table_rows)
        shared = start.shared if used is None else start.shared | {model.pieces.table: table[used]}
        rest = Params(None, start.router, shared)
        held, _ = experts_here(model, place)
        layout = BankLayout(model.num_layers, held, tier, touched)

        def step(carry: Carry, batch):
            tokens, labels, step_key, first = batch
            params, rest_state, bank, importance = carry
            token_mask_bt = model.real(tokens)
            ran = None  # every expert
            if not routed:
                ran = score.select(importance, client.budget)
                bank = layout.enter(bank, start.experts, here(model, ran, place))
            run_slots = layout.slots(here(model, ran, place))
            read = functools.partial(layout.read_any, bank, start.experts)
            if not routed:
                read = functools.partial(layout.read, bank)
            x, seen, _, residuals = forward_pass(
                model, params, read, run_slots, ran, tokens, factor, place, remat
            )
            head = {name: params.shared[name] for name in model.pieces.head_parts}
            (loss, logits), (d_head, dx) = jax.value_and_grad(cross_entropy, (0, 1), has_aux=True)(
                head, x, tokens, labels
            )

            def backward(slots, read, consume, carry):
                return backward_pass(
                    model, params, tokens, residuals, run_slots, ran, dx, balance, slots, read, consume,
                    carry, place,
                )  # fmt: skip

            active, scored = ran, Batch(seen, token_mask_bt, step_key, first)
            if score is not None and routed:
                norms = functools.partial(gradient_norms, layout, read, backward, place)
                importance = score.of_batch(importance, scored, norms)
                active = score.select(importance, client.budget)
                bank = layout.enter(bank, start.experts, here(model, active, place))

            def consume(bank, expert, weights, gradient, reached):
                if rule.proximal_mu:
                    away = jax.tree.map(lambda w, x: w - flat(x)[expert], weights, start.experts)
                    gradient = optax.tree.add_scale(gradient, rule.proximal_mu, away)
                return layout.update(bank, expert, weights, gradient, reached, optimizer)

            gradient, multiplier, bank = backward(
                layout.slots(here(model, active, place)), layout.read, consume, bank
            )
            gradient = gradient._replace(shared=gradient.shared | d_head)
            if rule.proximal_mu:
                away = optax.tree.sub(params, rest)
                gradient = optax.tree.add_scale(gradient, rule.proximal_mu, away)
            updates, rest_state = optimizer.update(gradient, rest_state, params)
            params = optax.apply_updates(params, updates)
            trained = seen.kept > 0 if active is None else active & (seen.kept > 0)
            if score is not None:
                importance = score.after_batch(importance, scored, -multiplier, ran)
            measured = measure(loss, logits, labels, seen, trained, token_mask_bt.reshape(-1))
            places = residuals.y.shape[1] * (seen.kept.size if ran is None else jnp.sum(ran))
            measured["empty_slots"] = 1 - jnp.sum(seen.kept) / jnp.maximum(places, 1)
            units = units_of(seen.gates, seen.own, token_mask_bt, config.importance.unit)
            told = (
                usage(units.chosen_gates, units.mask),
                routing_importance(units.gates, units.mask, config.importance.lam),
                jnp.sum(units.mask, dtype=jnp.float32),
            )
            return Carry(params, rest_state, bank, importance), (measured, told, trained)

        num_steps = client.tokens.shape[0]
        first_key, *keys = jax.random.split(key, num_steps + 1)
        importance = None
        if score is not None:
            importance = score.start()
            if not routed:
                before = Batch(*by_routers(start, rest, tokens[0]), first_key, jnp.bool_(True))
                importance = score.of_batch(importance, before)
        bank = layout.open(start.experts, optimizer)
        carry = Carry(rest, optimizer.init(rest), bank, importance)
        batches = (tokens, client.labels, jnp.stack(keys), jnp.arange(num_steps) == 0)
        carry, (measured, told, trained) = jax.lax.scan(step, carry, batches)
        usages, importances, num_units = told
        upload = Upload(
            usage=usage_over_batches(usages, num_units),
            importance=jnp.mean(importances, axis=0),
            trained=jnp.any(trained, axis=0),
            size=client.size,
        )
        params = carry.params._replace(experts=carry.bank.weights)
        rows = layout.rows_of(carry.bank, here(model, upload.trained, place))
        max_union_size = jnp.max(measured["union_size"])
        over_budget = rule.fail_over_budget & (max_union_size > client.budget)
        finite = jnp.isfinite(jnp.sum(measured["loss"])) & all_finite(carry.params)
        finite &= rows_finite(carry.bank.weights, rows, place)
        # On every device that holds some of the experts.
        finite = total((~finite).astype(jnp.int32), place) == 0
        status = jnp.select(
            [~client.available, ~finite, over_budget], [DROPPED_OUT, NONFINITE, OVER_BUDGET], OK
        )
        means = {name: jnp.mean(values, axis=0) for name, values in measured.items()}
        report = ClientReport(status=status, max_union_size=max_union_size, **means)
        return ClientUpdate(params, rows, used, upload, report)

    return train


def gradient_norms(layout: BankLayout, read: Callable, backward: Callable, place: Place) -> Array:
    """Returns the L2 norm of each expert's gradient [L, E], by a backward pass of its own."""

    def note(norms, expert, weights, gradient, reached):
        square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))
        return norms.at[expert].set(jnp.where(reached, jnp.sqrt(square), norms[expert]))

    _, _, norms = backward(
        layout.slots(None), lambda _, expert: read(expert), note, jnp.zeros(layout.num_experts)
    )
    return everywhere(norms.reshape(layout.num_layers, layout.held), place)


def distinct_tokens(
    tokens: Int[Array, "*batch"], vocab_size: int, size: int
) -> tuple[Int[Array, " size"] | None, Int[Array, "*batch"]]:
    """Returns the distinct tokens in ascending order and `tokens` as indices into them.

    Padding, 0, is always the first; where there are fewer than `size`, `vocab_size` follows. With room for
    the whole vocabulary nothing is looked up: None and `tokens` as they are.

    Args:
      size: at least their number.
    """
    if size >= vocab_size:
        return None, tokens
    used = jnp.zeros(vocab_size, bool).at[tokens].set(True).at[0].set(True)
    rank = jnp.cumsum(used, dtype=jnp.int32) - 1
    rows = jnp.where(used, rank, size)
    every = jnp.arange(vocab_size, dtype=jnp.int32)
    return jnp.full(size, vocab_size, jnp.int32).at[rows].set(every, mode="drop"), rank[tokens]


def measure(
    cross_entropy: Float[Array, ""],
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    seen: Seen,
    trained: Bool[Array, "layers experts"],
    token_mask: Bool[Array, " tokens"],
) -> dict[str, Float[Array, ""]]:
    """Returns one step's part of the `ClientReport`, by field, without `empty_slots`.

    Args:
      seen: by the training pass.
      trained: experts that this step trained.
    """
    kept = jnp.sum(seen.kept, dtype=jnp.float32)
    return dict(
        loss=cross_entropy,
        accuracy=jnp.mean(jnp.argmax(logits, axis=-1) == labels),
        union_size=jnp.sum(union(seen.own), dtype=jnp.float32),
        trained_size=jnp.sum(trained, dtype=jnp.float32),
        assignments=kept,
        trained_assignments=jnp.sum(jnp.where(trained, seen.kept, 0), dtype=jnp.float32),
        dropped=1 - kept / jnp.maximum(jnp.sum(seen.sent), 1),
        router_entropy=gate_entropy(seen.gates, token_mask),
        padding=1 - jnp.mean(token_mask),
    )


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Says whether no number of a tree is NaN or infinite, nor their sum too large for float32."""
    # A sum runs several times as fast on a CPU as a test of every number.
    return jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)))


def rows_finite(weights: Any, rows: ExpertRows, place: Place) -> Bool[Array, ""]:
    """Says the same of the rows of a tree of arrays."""

    def look(index, finite):
        row = rows.row[jnp.minimum(index, rows.row.shape[0] - 1)]
        return finite & all_finite(jax.tree.map(lambda x: x[row], weights))

    return jax.lax.fori_loop(0, most_turns(rows.count, place), look, jnp.bool_(True))


def gate_entropy(
    gates: Float[Array, "layers tokens experts"], token_mask: Bool[Array, " tokens"]
) -> Float[Array, ""]:
    """Returns the entropy of the gates in nats, mean over real tokens and layers."""
    entropy = -jnp.sum(jax.scipy.special.xlogy(gates, gates), axis=-1)
    real = jnp.sum(token_mask)
    return jnp.sum(jnp.where(token_mask, entropy, 0.0)) / jnp.maximum(real, 1) / gates.shape[0]
