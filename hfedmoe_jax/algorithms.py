"""Federated algorithms as compositions of the same parts: score, selection, training, aggregation.

Axes: C clients in all, M clients of a round's cohort, L MoE layers, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import (
    dominant_set,
    expert_rules,
    gating_rules,
    literal_gating,
    mean_finalize,
    routing_consistency,
)
from hfedmoe_jax.client import (
    OK,
    OVER_BUDGET,
    ClientData,
    ClientReport,
    LocalRule,
    make_client,
    scoring_passes,
)
from hfedmoe_jax.devices import ScoringPasses
from hfedmoe_jax.models import MoeModel, Params
from hfedmoe_jax.optimizers import build_optimizer
from hfedmoe_jax.population import map_population
from hfedmoe_jax.registry import Registry


class Composition(NamedTuple):
    """An algorithm by its parts; the config may replace each part by name (see `compose`).

    Attributes:
      score: how experts are ranked for selection, a name in `score_rules`; "none" trains all.
      expert_rule: weight of a client's experts, a name in `expert_rules`.
      gating_rule: weight of a client's gating networks, a name in `gating_rules`.
      server_optimizer: a name in `optimizers`.
      fail_over_budget: clients that activate more experts than their budget fail.
      proximal: add FedProx's term to the local loss.
      personal: no aggregation, every client keeps a model of its own.
    """

    score: str = "none"
    expert_rule: str = "all"
    gating_rule: str = "mean"
    server_optimizer: str = "sgd"
    fail_over_budget: bool = False
    proximal: bool = False
    personal: bool = False


SERVER_LEARNING_RATES = {"sgd": 1.0, "sgdm": 1.0, "adam": 0.01, "yogi": 0.01}
"""A rate of 1 replaces the model by the mean; adaptive steps of 1 a parameter would diverge."""

algorithms = Registry("fl.algorithm")
"""Compositions by name."""

_SPARSE = Composition(score="information_bottleneck", expert_rule="dominant", gating_rule="importance")
for _name, _composition in {
    "hfedmoe": _SPARSE,
    "random": _SPARSE._replace(score="random"),
    "frequency": _SPARSE._replace(score="frequency"),
    "gradient_norm": _SPARSE._replace(score="gradient_norm"),
    "fedavg": Composition(),
    "fedavg_dropout": Composition(fail_over_budget=True),
    "fedprox": Composition(proximal=True),
    "fedavgm": Composition(server_optimizer="sgdm"),
    "fedadam": Composition(server_optimizer="adam"),
    "fedyogi": Composition(server_optimizer="yogi"),
    "local": Composition(personal=True),
}.items():
    algorithms.register(_name)(_composition)


class ClientRecords(NamedTuple):
    """What the server remembers of every client between rounds.

    Attributes:
      usage: float32 [C, L, E], u_c of the client's last round; NaN if its update did not count.
      times_trained: int32 [C, L, E], rounds in which an expert of the client was aggregated.
      rounds_measured: int32 [C], rounds in which its batches were routed to the end: those whose
        update counted, and those that failed for the size of their union.
      union_total: float32 [C], sum over those rounds of the mean union size.
    """

    usage: Float[Array, "clients layers experts"]
    times_trained: Int[Array, "clients layers experts"]
    rounds_measured: Int[Array, " clients"]
    union_total: Float[Array, " clients"]


class ServerState(NamedTuple):
    """Everything that a round changes.

    Attributes:
      params: the global model; for `personal` algorithms every client's, leading axis C.
      optimizer: state of the server optimizer.
      records: see `ClientRecords`.
    """

    params: Params
    optimizer: Any
    records: ClientRecords


class RoundMetrics(NamedTuple):
    """What a round measured, by member of the cohort [M, ...].

    Attributes:
      report: the clients' reports.
      uploaded: bool [M, L, E], the experts that each client sent and the server counted.
      consistency: float32 [M], routing consistency r(c) (18).
    """

    report: ClientReport
    uploaded: Bool[Array, "members layers experts"]
    consistency: Float[Array, " members"]


class FederatedAlgorithm(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: params -> ServerState.
      round: (state, cohort, key) -> (ServerState, RoundMetrics); jitted, the state is donated.
        `cohort` is a `ClientData` with a leading axis M, `key` the key of this round.
      composition: the parts it is made of.
      scoring: what scoring adds to a client's round.
    """

    init: Callable[[Params], ServerState]
    round: Callable[[ServerState, ClientData, jax.Array], tuple[ServerState, RoundMetrics]]
    composition: Composition
    scoring: ScoringPasses


def compose(config: ConfigDict) -> Composition:
    """Returns the composition of `fl.algorithm`, with the parts that the config names instead.

    `fl.score`, `fl.expert_rule`, `fl.gating_rule` and `server.optimizer` replace the algorithm's own
    part unless empty: ablations and new parts need no new algorithm.
    """
    composition = algorithms[config.fl.algorithm]
    chosen = dict(
        score=config.fl.score,
        expert_rule=config.fl.expert_rule,
        gating_rule=config.fl.gating_rule,
        server_optimizer=config.server.optimizer,
    )
    return composition._replace(**{part: name for part, name in chosen.items() if name})


def server_section(section: ConfigDict, optimizer: str) -> ConfigDict:
    """Returns the section `server`, with the rate of the optimizer itself where it gives 0."""
    rate = section.learning_rate or SERVER_LEARNING_RATES[optimizer]
    return ConfigDict({**section, "learning_rate": rate})


def build_algorithm(
    config: ConfigDict, model: MoeModel, num_clients: int, mesh: Mesh, chunk: int
) -> FederatedAlgorithm:
    """Returns the algorithm that a config describes.

    Args:
      config: reads fl, client, server, importance, aggregation, model.load_balance.
      model: what is trained.
      num_clients: C.
      mesh, chunk: see `map_population`.
    """
    parts = compose(config)
    expert_rule, gating_rule = expert_rules[parts.expert_rule], gating_rules[parts.gating_rule]
    server = build_optimizer(
        server_section(config.server, parts.server_optimizer), parts.server_optimizer, "server"
    )
    rule = LocalRule(
        score=None if parts.score == "none" else parts.score,
        fail_over_budget=parts.fail_over_budget,
        proximal_mu=config.client.proximal_mu if parts.proximal else 0.0,
    )
    train = make_client(
        model, build_optimizer(config.client, config.client.optimizer, "client"), rule, config
    )

    def init(params: Params) -> ServerState:
        per_expert = (num_clients, model.num_layers, model.num_experts)
        records = ClientRecords(
            usage=jnp.full(per_expert, jnp.nan, jnp.float32),
            times_trained=jnp.zeros(per_expert, jnp.int32),
            rounds_measured=jnp.zeros(num_clients, jnp.int32),
            union_total=jnp.zeros(num_clients, jnp.float32),
        )
        if parts.personal:
            params = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), params)
            return ServerState(params, (), records)
        return ServerState(params, server.init(params), records)

    def visit(broadcast, client: ClientData):
        """A client's round, as the population engine wants it: values, weights, output."""
        params, key = broadcast
        update = train(params, client, jax.random.fold_in(key, client.client))
        ok = update.report.status == OK
        weights = Params(
            experts=expert_rule(update.upload, config.aggregation),
            router=gating_rule(update.upload, config.aggregation),
            shared=client.num_examples,
        )
        weights = jax.tree.map(lambda w: jnp.where(ok, w, 0.0), weights)
        return update.params, weights, (update.upload, update.report, weights.experts > 0)

    def visit_personal(key, member):
        """The same without aggregation: the client's own parameters go in and come out."""
        client, params = member
        update = train(params, client, jax.random.fold_in(key, client.client))
        ok = update.report.status == OK
        kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), update.params, params)
        uploaded = jnp.zeros_like(update.upload.trained)
        return (), (), (update.upload, update.report, uploaded, kept)

    def remember(records: ClientRecords, cohort: ClientData, upload, report, trained) -> ClientRecords:
        # Padding members have the number C: they write out of bounds, which `drop` ignores.
        row, ok = cohort.client, report.status == OK
        measured = ok | (report.status == OVER_BUDGET)
        trained = jnp.where(ok[:, None, None], trained, False).astype(jnp.int32)
        return ClientRecords(
            usage=records.usage.at[row].set(jnp.where(ok[:, None, None], upload.usage, jnp.nan), mode="drop"),
            times_trained=records.times_trained.at[row].add(trained, mode="drop"),
            rounds_measured=records.rounds_measured.at[row].add(measured.astype(jnp.int32), mode="drop"),
            union_total=records.union_total.at[row].add(
                jnp.where(measured, report.union_size, 0.0), mode="drop"
            ),
        )

    def aggregate_round(state: ServerState, cohort: ClientData, key):
        run = map_population(visit, mesh, chunk)
        mean, (upload, report, uploaded) = run((state.params, key), cohort)
        target = mean_finalize(mean, state.params)
        ok = report.status == OK
        dominant = dominant_set(upload.usage, upload.trained, config.aggregation.tau) & ok[:, None, None]
        if config.aggregation.literal_gating:
            union_size = jnp.sum(jnp.any(dominant, axis=0))
            literal = literal_gating(mean._replace(total=mean.total.router), union_size)
            target = target._replace(
                router=jax.tree.map(
                    lambda new, old: jnp.where(union_size > 0, new, old), literal, state.params.router
                )
            )
        pseudo_gradient = jax.tree.map(jnp.subtract, state.params, target)
        anyone = mean.weight.shared > 0
        params, optimizer = server.update(
            pseudo_gradient, state.optimizer, state.params, mean.weight.experts > 0
        )
        # A round in which every client failed leaves the server as it was.
        params, optimizer = jax.tree.map(
            lambda new, old: jnp.where(anyone, new, old), (params, optimizer), (state.params, state.optimizer)
        )
        records = remember(state.records, cohort, upload, report, uploaded & upload.trained)
        consistency = routing_consistency(dominant, ok)
        return ServerState(params, optimizer, records), RoundMetrics(report, uploaded, consistency)

    def personal_round(state: ServerState, cohort: ClientData, key):
        own = jax.tree.map(lambda x: x[cohort.client], state.params)
        run = map_population(visit_personal, mesh, chunk)
        _, (upload, report, uploaded, kept) = run(key, (cohort, own))
        row = jnp.where(report.status == OK, cohort.client, num_clients)
        params = jax.tree.map(lambda x, new: x.at[row].set(new, mode="drop"), state.params, kept)
        records = remember(state.records, cohort, upload, report, upload.trained)
        consistency = jnp.full(report.status.shape, jnp.nan)  # nothing is shared
        return ServerState(params, (), records), RoundMetrics(report, uploaded, consistency)

    round_function = personal_round if parts.personal else aggregate_round
    scoring = scoring_passes(rule, model, config.fl.local_steps, config.importance)
    return FederatedAlgorithm(init, jax.jit(round_function, donate_argnums=0), parts, scoring)
