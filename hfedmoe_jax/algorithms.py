"""Federated algorithms as compositions of the same parts: score, selection, training, aggregation.

Axes: C clients in all, M clients of a round's cohort, L MoE layers, E experts.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import dominant_set, expert_rules, gating_rules, routing_consistency
from hfedmoe_jax.client import OK, OVER_BUDGET, ClientData, ClientReport, LocalRule, make_client
from hfedmoe_jax.devices import NO_SCORING, ScoringPasses
from hfedmoe_jax.engines import Clients, PersonalEngine, SharedEngine, Weighing
from hfedmoe_jax.models import MoeModel, Params
from hfedmoe_jax.optimizers import build_optimizer, per_expert
from hfedmoe_jax.population import (
    NOBODY,
    Block,
    fetch_finished,
    place_of,
    plan_blocks,
    put_members,
    unstack_members,
)
from hfedmoe_jax.registry import Registry
from hfedmoe_jax.scoring import build_scoring
from hfedmoe_jax.tiers import choose_tiers, default_tiers, tier_of


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
      times_trained: int32 [C, L, E], rounds in which an expert of the client was aggregated, or
        trained if the model is the client's own.
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


class Portion(NamedTuple):
    """A block of a cohort with its data on the devices."""

    block: Block
    data: ClientData


class FederatedAlgorithm(NamedTuple):
    """Two functions of the state, and what they are made of.

    One round at a time: between blocks the engine keeps the running sums.

    Attributes:
      init: params -> ServerState.
      round: (state, portions, key) -> (ServerState, RoundMetrics of the cohort on the host); the state is
        donated, `key` is the key of this round. Portions are taken as they are needed.
      plan: (clients, hosts or None) -> blocks of a cohort, see `plan_blocks`.
      portion: (block, ClientData [D * B, ...] as host arrays) -> Portion.
      composition: the parts it is made of.
      scoring: what scoring adds to a client's round.
      programs: the compiled functions by name: `tier K` for each tier, and the engine's own.
    """

    init: Callable[[Params], ServerState]
    round: Callable[[ServerState, Iterable[Portion], jax.Array], tuple[ServerState, RoundMetrics]]
    plan: Callable[..., list[Block]]
    portion: Callable[[Block, ClientData], Portion]
    composition: Composition
    scoring: ScoringPasses
    programs: dict[str, Callable]


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
    config: ConfigDict, model: MoeModel, clients: Clients, mesh: Mesh, chunk: int
) -> FederatedAlgorithm:
    """Returns the algorithm that a config describes.

    Args:
      config: reads fl, client, server, importance, aggregation, budget, model.
      model: what is trained.
      clients: the population.
      mesh, chunk: where, and how many clients at once on a device.
    """
    parts = compose(config)
    server = per_expert(
        build_optimizer(
            server_section(config.server, parts.server_optimizer), parts.server_optimizer, "server"
        )
    )
    optimizer = build_optimizer(config.client, config.client.optimizer, "client")
    rule = LocalRule(
        score=build_scoring(config, parts.score),
        fail_over_budget=parts.fail_over_budget,
        proximal_mu=config.client.proximal_mu if parts.proximal else 0.0,
    )
    num_experts, num_clients = model.num_layers * model.num_experts, len(clients.budget)
    place = place_of(mesh, chunk)
    tiers = [num_experts]
    if rule.score is not None:
        most = config.budget.tiers or default_tiers(chunk)
        tiers = choose_tiers(clients.budget, 1 if parts.personal else most)
    train = {
        tier: make_client(model, optimizer, rule, config, tier, clients.table_rows, place) for tier in tiers
    }
    if parts.personal:
        engine = PersonalEngine(model, mesh, chunk, train, num_clients)
    else:
        expert_rule, gating_rule = expert_rules[parts.expert_rule], gating_rules[parts.gating_rule]
        weighing = Weighing(expert_rule, gating_rule, config.aggregation, config.fl.clients_per_round)
        engine = SharedEngine(model, mesh, chunk, train, server, weighing)

    def init(params: Params) -> ServerState:
        per_expert = (num_clients, model.num_layers, model.num_experts)
        records = ClientRecords(
            usage=np.full(per_expert, np.nan, np.float32),
            times_trained=np.zeros(per_expert, np.int32),
            rounds_measured=np.zeros(num_clients, np.int32),
            union_total=np.zeros(num_clients, np.float32),
        )
        return ServerState(*engine.init(params), records)

    def plan(cohort: np.ndarray, hosts: np.ndarray | None = None) -> list[Block]:
        budgets = clients.budget[cohort] if rule.score is not None else np.full(len(cohort), num_experts)
        return plan_blocks(tier_of(budgets, tiers), mesh, chunk, hosts)

    def portion(block: Block, data: ClientData) -> Portion:
        data = data._replace(available=data.available & (block.members.reshape(-1) != NOBODY))
        return Portion(block, put_members(mesh, data))

    def round_function(state: ServerState, portions: Iterable[Portion], key: jax.Array):
        blocks, outputs = [], []
        running = engine.open(state)
        for block, data in portions:
            count = put_members(mesh, block.count)
            running, told = engine.run(block.tier, running, state, data, count, key)
            blocks.append(block)
            outputs.append(told)
            fetch_finished(outputs)
        params, optimizer_state = engine.finish(running, state)
        size = sum(int(block.count.sum()) for block in blocks)
        client, upload, report, uploaded = unstack_members(blocks, outputs, size)
        trained = upload.trained if parts.personal else uploaded & upload.trained
        records = remember(state.records, client, upload, report, trained)
        dominant = dominant_set(upload.usage, upload.trained, config.aggregation.tau)
        consistency = np.full(size, np.nan, np.float32)  # of personal models, of which nothing is shared
        if not parts.personal:
            consistency = np.asarray(routing_consistency(dominant, report.status == OK))
        return ServerState(params, optimizer_state, records), RoundMetrics(report, uploaded, consistency)

    scoring = NO_SCORING if rule.score is None else rule.score.passes(config.fl.local_steps)
    return FederatedAlgorithm(init, round_function, plan, portion, parts, scoring, engine.programs)


def remember(records: ClientRecords, client, upload, report, trained) -> ClientRecords:
    """Returns the records after a round of these clients, on the host."""
    ok = report.status == OK
    measured = ok | (report.status == OVER_BUDGET)
    records = ClientRecords(*(np.array(x) for x in records))
    records.usage[client] = np.where(ok[:, None, None], upload.usage, np.nan)
    records.times_trained[client] += trained & ok[:, None, None]
    records.rounds_measured[client] += measured
    records.union_total[client] += np.where(measured, report.union_size, 0)
    return records
