"""One client's part of a round: score, select, train, report. A pure function of arrays.

Axes: S local steps, B batch, T tokens, L MoE layers, E experts, H experts of a layer on this device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload
from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.bank import BankLayout, ExpertBank, ExpertRows
from hfedmoe_jax.experts import Budget, Experts, flat, open_budget, open_layers, put, row_of
from hfedmoe_jax.mesh import (
    ALONE,
    Place,
    all_gather_experts,
    chunk_max,
    local_experts,
    psum_experts,
    shard_of,
)
from hfedmoe_jax.models import MoeModel, Params, Routing
from hfedmoe_jax.reports import (
    ClientReport,
    StepReport,
    all_finite,
    client_status,
    mean_report,
    report_routing,
)
from hfedmoe_jax.scores import flat_mask, routing_importance, units_of, usage, usage_over_batches
from hfedmoe_jax.scoring import Scoring, SeenBatch
from hfedmoe_jax.tasks import Ratio, Task


class ClientData(NamedTuple):
    """One client's input to a round (a cohort stacks them on a leading axis).

    Attributes:
      client: its number.
      batch: a tree of [S, B, ...], one batch a local step.
      size: |D_c| over a power of two that no client's exceeds, so at most one.
      budget: experts it can train, over all layers.
      available: False for a client that drops out of the round.
      rate: its learning rate of the round over `client.learning_rate`.
      state: what the algorithm keeps of this client between rounds.
    """

    client: Int[Array, ""]
    batch: Any
    size: Float[Array, ""]
    budget: Int[Array, ""]
    available: Bool[Array, ""]
    rate: Float[Array, ""]
    state: Any = ()


class Broadcast(NamedTuple):
    """What the server sends to every client.

    Attributes:
      params: the global model.
      frozen: parameters that nobody trains; each device holds them once, whatever clients it runs.
      extra: arrays of the algorithm's own.
      key: of the round.
    """

    params: Params
    frozen: Any
    extra: Any
    key: Array


class ClientUpdate(NamedTuple):
    """A client's parameters after local training, with what it reports to the server.

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
    """How a client trains.

    Attributes:
      score: how experts are scored, or None: all of them are trained.
      fail_over_budget: the client fails if a batch activates more experts than it can train.
      proximal_mu: weight of FedProx's mu / 2 |w - w_global|^2, 0 for none.
      offset: (extra, state) -> Params that are added to every gradient of the round; None for nothing.
      start: (params, budget over all experts) -> what training starts from; None for the global model.
      router_bias: extra -> float [L, E] that is added to the routers' logits; None for nothing.
    """

    score: Scoring | None
    fail_over_budget: bool = False
    proximal_mu: float = 0.0
    offset: Callable[[Any, Any], Params] | None = None
    router_bias: Callable[[Any], Array] | None = None
    start: Callable[[Params, Array], Params] | None = None

    @property
    def uses_budgets(self) -> bool:
        """Says whether clients select experts by their budget, or fail by it."""
        return self.score is not None or self.fail_over_budget


class Carry(NamedTuple):
    """What a client takes from step to step; `importance` is an `Importance`, None if all experts train."""

    params: Params
    rest_state: Any
    bank: ExpertBank
    importance: Any


def make_client(
    model: MoeModel,
    task: Task,
    optimizer: optax.GradientTransformation,
    rule: LocalRule,
    config: ConfigDict,
    tier: int,
    table_rows: int,
    place: Place = ALONE,
) -> Callable[[Broadcast, ClientData], ClientUpdate]:
    """Returns `train(broadcast, client) -> ClientUpdate`.

    Each step selects experts for its batch (15) and trains those, the routers and the shared
    parameters. Scores come from what the steps compute anyway, see `scoring`; the score `gradient_norm` alone
    costs passes of its own. With `fl.forward=active` the experts are chosen before the forward pass and the
    others do not run.

    Our decisions: usage (16) is over the round's batches, not over all of D_c, which would be a pass of
    its own; of an embedding table the client holds the rows of its own tokens, which changes nothing for
    optimizers that leave a weight alone as long as its gradient was always zero.

    Args:
      model, task: what is trained.
      optimizer: every expert, and everything else together, has one of its own.
      config: reads model, importance, fl.forward, fl.local_steps.
      tier: the most experts over all layers that a client of this program trains on a batch.
      table_rows: R, at least the distinct tokens of a client's round, padding included.
      place: where it runs.
    """
    score, steps = rule.score, config.fl.local_steps
    routed = score is None or score.routed
    touched = tier if config.importance.refresh == "round" else tier * config.fl.local_steps
    if score is None:
        tier = touched = model.all_experts
    keep, balance_weight = not config.model.remat, config.model.load_balance
    adjust = make_adjust(rule) if rule.proximal_mu or rule.offset else None

    def objective(rest, frozen, multiplier, tape, batch, budget: Budget):
        """Returns the loss and the two channels of `experts`; beside them what the pass has shown."""
        budget = budget._replace(tape=tape, layers=budget.layers._replace(multiplier=multiplier))
        out = model.apply(rest, frozen, batch, budget, True)
        loss, count = task.loss(out.output, batch)
        total = loss + balance_weight * jnp.mean(out.routing.balance)
        return (total, out.tape, out.permit), (Ratio(loss * count, count), out.output, out.routing)

    def train(broadcast: Broadcast, client: ClientData) -> ClientUpdate:
        start, frozen = broadcast.params, broadcast.frozen
        if rule.start is not None:
            start = rule.start(start, client.budget / model.all_experts)
        first_key, *keys = jax.random.split(jax.random.fold_in(broadcast.key, client.client), steps + 1)
        token, batches = own_tokens(model.table, start, client.batch, table_rows)

        def compact(params: Params) -> Params:
            """Returns all but the experts, and of the table the client's rows."""
            return Params(None, params.router, rows_of_table(model.table, params.shared, token))

        rest = compact(start)
        held, _ = shard_of(model.num_experts, place)
        layout = BankLayout(model.num_layers, held, touched, optimizer, place)
        rules = layout.rules(adjust, model.all_experts if routed else tier, keep)
        offset = rule.offset(broadcast.extra, client.state) if rule.offset else None
        anchor = (flat(start.experts), offset and flat(offset.experts)) if adjust else ()
        rest_anchor = (rest, offset and compact(offset))
        bias = rule.router_bias(broadcast.extra) if rule.router_bias else None
        layers = open_layers(model.num_layers, model.num_experts, bias)

        def step(carry: Carry, inputs):
            batch, key, first = inputs
            params, rest_state, bank, importance = carry
            token_mask = model.mask(batch)
            ran = None  # every expert
            if score is not None and not routed:
                ran = score.select(importance, client.budget)
                bank = layout.add(bank, start.experts, local_experts(ran, place))
            experts = Experts(layout.readable(bank, start.experts, routed), (client.rate, anchor), rules)
            budget = Budget(experts, layers._replace(forward=ran))
            (_, tape, permit), pull, (loss, output, routing) = jax.vjp(
                lambda rest, multiplier, tape: objective(rest, frozen, multiplier, tape, batch, budget),
                params, layers.multiplier, layout.tape(bank), has_aux=True,
            )  # fmt: skip
            active, seen = ran, SeenBatch(routing, token_mask, key, first)
            if score is not None and routed:

                def norms():
                    at = functools.partial(objective, params, frozen, layers.multiplier)
                    norm_of = gradient_norms(at, batch, budget, model.num_layers * held)
                    return all_gather_experts(norm_of.reshape(model.num_layers, held), place)

                importance = score.of_batch(importance, seen, norms)
                active = score.select(importance, client.budget)
                bank = layout.add(bank, start.experts, local_experts(active, place))
            rows = layout.rows_for(bank, local_experts(active, place))
            gradient, d_multiplier, rows = pull((jnp.float32(1), bank.rows, rows))
            bank = bank._replace(rows=rows)
            if adjust:
                gradient = adjust(gradient, params, *rest_anchor)
            updates, rest_state = optimizer.update(gradient, rest_state, params)
            params = cast(Params, optax.apply_updates(params, optax.tree.scale(client.rate, updates)))
            trained = routing.kept > 0 if active is None else active & (routing.kept > 0)
            if score is not None:
                importance = score.after_batch(importance, seen, -d_multiplier, ran)
            weight = jnp.ones(len(batch["tokens"]))
            scores = task.score(output, batch, weight) if task.train_scores else {}
            described = report_routing(routing, trained, flat_mask(token_mask))
            report = StepReport(loss, scores, described | {"padding": jnp.mean(batch["tokens"] == 0)})
            used = batch_usage(routing, token_mask, config.importance)
            return Carry(params, rest_state, bank, importance), (report, used, trained)

        importance = None
        if score is not None:
            importance = score.start(model.num_layers, model.num_experts)
            if not routed:
                first_batch = jax.tree.map(lambda x: x[0], batches)
                idle = open_budget(start.experts, model.num_experts, place)
                nobody = jnp.zeros((model.num_layers, model.num_experts), bool)
                idle = idle._replace(layers=layers._replace(forward=nobody))
                routing = model.apply(rest, frozen, first_batch, idle, True).routing
                before = SeenBatch(routing, model.mask(first_batch), first_key, jnp.bool_(True))
                importance = score.of_batch(importance, before)
        carry = Carry(rest, optimizer.init(rest), layout.open(start.experts), importance)
        inputs = (batches, jnp.stack(keys), jnp.arange(steps) == 0)
        carry, (reports, used, trained) = jax.lax.scan(step, carry, inputs)
        upload = Upload(
            usage=usage_over_batches(used.usage, used.units),
            importance=jnp.mean(used.importance, axis=0),
            trained=jnp.any(trained, axis=0),
            times=jnp.sum(trained, axis=0, dtype=jnp.int32),
            size=client.size,
        )
        rows = layout.rows_of(carry.bank, local_experts(upload.trained, place))
        params = carry.params._replace(experts=carry.bank.rows.weights)
        finite = jnp.isfinite(jnp.sum(reports.loss.total)) & all_finite(carry.params)
        finite &= rows_finite(params.experts, rows, place)
        if score is not None:  # a selection by NaN would be by the experts' numbers
            finite &= ~jnp.any(jnp.isnan(carry.importance.score) & carry.importance.eligible)
        # On every device that holds some of the experts.
        finite = psum_experts((~finite).astype(jnp.int32), place) == 0
        over_budget = rule.fail_over_budget & (jnp.max(reports.routing["union_size"]) > client.budget)
        status = client_status(client.available, finite, over_budget)
        return ClientUpdate(params, rows, token, upload, mean_report(status, reports))

    return train


class BatchUsage(NamedTuple):
    """What a batch adds to a client's `Upload`.

    Attributes:
      usage: float32 [L, E] (16), and over how many units, of all layers alike or of each.
      importance: float32 [L, E] (5).
    """

    usage: Float[Array, "*steps layers experts"]
    units: Float[Array, "..."]
    importance: Float[Array, "*steps layers experts"]


def batch_usage(
    routing: Routing, token_mask: Bool[Array, "... batch tokens"], importance: ConfigDict
) -> BatchUsage:
    """Returns usage (16) and importance (5) of a batch by `importance.unit`."""
    units = units_of(routing.gates, routing.own, token_mask, importance.unit)
    return BatchUsage(
        usage(units.chosen_gates, units.mask),
        jnp.sum(units.mask, axis=-1, dtype=jnp.float32),
        routing_importance(units.gates, units.mask, importance.lam),
    )


def make_adjust(rule: LocalRule) -> Callable[..., Any]:
    """Returns `adjust(gradient, weights, start, offset, expert=None) -> gradient` by a rule.

    All are trees like the weights; with `expert`, an index, `start` and `offset` hold all experts.
    """

    def adjust(gradient, weights, start, offset, expert=None):
        if expert is not None:
            start, offset = row_of(start, expert), row_of(offset, expert)
        if rule.proximal_mu:
            gradient = optax.tree.add_scale(gradient, rule.proximal_mu, optax.tree.sub(weights, start))
        return gradient if offset is None else optax.tree.add(gradient, offset)

    return adjust


def gradient_norms(
    objective: Callable[..., Any], batch: Any, budget: Budget, num_experts: int
) -> Float[Array, " experts"]:
    """Returns the L2 norm of the gradient of each expert of this device, by passes of its own.

    Args:
      objective: (tape, batch, budget) -> ((loss, tape, permits), aux).
      num_experts: L * H.
    """
    rules = budget.experts.rules

    def write(norms, context, row, expert, weights, gradient, reached):
        return put(norms, expert, optax.tree.norm(gradient), reached)

    rules = rules._replace(reread=lambda norms, bank, row, expert: rules.read(bank, expert), write=write)
    budget = budget._replace(experts=dataclasses.replace(budget.experts, rules=rules))
    zeros = jnp.zeros(num_experts)
    (_, _, permit), pull, _ = jax.vjp(lambda tape: objective(tape, batch, budget), zeros, has_aux=True)
    (norms,) = pull((jnp.float32(1), zeros, jnp.zeros_like(permit)))
    return norms


def own_tokens(
    table: str | None, start: Params, batch: Any, size: int
) -> tuple[Int[Array, " table_rows"] | None, Any]:
    """Returns which rows of the embedding table a client needs, and its batches with tokens as their indices.

    Args:
      table: its name, or None where all of it is needed.
      size: R.
    """
    if table is None:
        return None, batch
    used, tokens = distinct_tokens(batch["tokens"], start.shared[table].shape[0], size)
    return used, batch | {"tokens": tokens}


def rows_of_table(table: str | None, shared: dict, token: Int[Array, " table_rows"] | None) -> dict:
    """Returns the shared parameters with these rows of the embedding table; None leaves it whole."""
    return (
        shared if token is None else shared | {table: shared[table].at[token].get(mode="fill", fill_value=0)}
    )


def distinct_tokens(
    tokens: Int[AnyArray, "*batch"], vocab_size: int, size: int
) -> tuple[Int[Array, " size"] | None, Int[AnyArray, "*batch"]]:
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


def rows_finite(weights: Any, rows: ExpertRows, place: Place) -> Bool[Array, ""]:
    """Says whether the rows of a tree of arrays are finite, see `all_finite`."""

    def look(index, finite):
        row = rows.row[jnp.minimum(index, rows.row.shape[0] - 1)]
        return finite & all_finite(row_of(weights, row))

    return jax.lax.fori_loop(0, chunk_max(rows.count, place), look, jnp.bool_(True))
