"""Local training: every client keeps a model of its own, nothing is sent or aggregated.

Axes: C clients, M clients of a round's cohort.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax.algorithms.algorithm import (
    FederatedAlgorithm,
    Portion,
    RoundMetrics,
    ServerState,
    Setting,
    algorithms,
)
from hfedmoe_jax.algorithms.cohort import ClientReports, client_trains, place_update, train_cohort
from hfedmoe_jax.algorithms.records import open_records, remember
from hfedmoe_jax.algorithms.traffic import NO_TRAFFIC
from hfedmoe_jax.client import Broadcast, ClientData, LocalRule
from hfedmoe_jax.devices import NO_SCORING
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.mesh import BY_CLIENT, CLIENTS, REPLICATED, shapes_on_mesh
from hfedmoe_jax.models import NO_PARAMS, Params, frozen_specs
from hfedmoe_jax.population import StateStore, stream
from hfedmoe_jax.reports import OK
from hfedmoe_jax.schedule import plan_blocks
from hfedmoe_jax.scoring import build_scoring


@algorithms.register("local")
def local(config: ConfigDict):
    """Every client trains all experts of its own model, or by `fl.score` those that fit its budget."""
    if config.mesh.experts > 1:
        problem = "local keeps a whole model a client on every device"
        raise InputError("mesh.experts", config.mesh.experts, problem, "use 1")
    for field, value in (
        ("fl.expert_rule", config.fl.expert_rule),
        ("fl.gating_rule", config.fl.gating_rule),
        ("server.optimizer", config.server.optimizer),
    ):
        if value:
            raise InputError(field, value, "local aggregates nothing", "leave it empty")
    score = config.fl.score or "none"
    return Local(LocalRule(build_scoring(config, score)), score)


class Local(NamedTuple):
    """Builds the algorithm.

    Attributes:
      rule: how clients train.
      score: the name of its score.
    """

    rule: LocalRule
    score: str

    @property
    def uses_budgets(self) -> bool:
        """Says whether the clients' budgets matter."""
        return self.rule.uses_budgets

    def __call__(self, setting: Setting) -> FederatedAlgorithm:
        """Returns the algorithm for a setting."""
        return train_alone(self.rule, self.score, setting)


def train_alone(rule: LocalRule, score: str, setting: Setting) -> FederatedAlgorithm:
    """Returns the algorithm for a setting; a tier for all clients."""
    model, mesh, num_clients = setting.model, setting.mesh, len(setting.budget)
    store = StateStore(mesh, num_clients)
    ((tier, train),) = client_trains(setting, rule, 1).items()

    def visit(broadcast: Broadcast, client: ClientData):
        own = client.state
        update = train(broadcast._replace(params=own), client)
        ok = update.report.status == OK
        after = place_update(own, update, model.table)
        after = jax.tree.map(lambda new, old: jnp.where(ok, new, old), after, own)
        nothing = jnp.zeros_like(update.upload.trained)
        return (), (ClientReports(client.client, update.upload, update.report, nothing), after)

    specs = Broadcast(REPLICATED, frozen_specs(setting.frozen), REPLICATED, REPLICATED)  # pyright: ignore
    program = stream(visit, None, mesh, setting.chunk, specs)

    def init(params: Params) -> ServerState:
        records = open_records(num_clients, model.num_layers, model.num_experts)
        return ServerState(store.open(params), (), (), (), records)

    def plan(clients: np.ndarray, hosts: np.ndarray | None = None) -> list:
        return plan_blocks(np.full(len(clients), tier), mesh, setting.chunk, hosts)

    def round_function(state: ServerState, portions: Iterable[Portion], key: jax.Array):
        broadcast = Broadcast(NO_PARAMS, setting.frozen, (), key)
        _, params, reports = train_cohort({tier: program}, portions, (), None, broadcast, store, state.params)
        records = remember(state.records, reports, reports.upload.trained)
        # Routing consistency compares what is shared, and nothing is.
        consistency = np.full(len(reports.client), np.nan, np.float32)
        nothing = np.zeros(len(reports.client), np.int64)
        return state._replace(params=params, records=records), RoundMetrics(
            reports.report, reports.uploaded, consistency, nothing, nothing
        )

    def arguments(data: ClientData) -> dict[str, tuple]:
        params, _ = jax.eval_shape(model.init, jax.random.key(0))
        (rows,) = data.client.shape
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), params)
        count = jax.ShapeDtypeStruct((mesh.shape[CLIENTS],), jnp.int32)
        block = shapes_on_mesh(mesh, BY_CLIENT, (data._replace(state=state), count))
        shared = Broadcast(NO_PARAMS, setting.frozen, (), jax.eval_shape(jax.random.key, 0))
        broadcast = shapes_on_mesh(mesh, specs, shared)
        return {f"tier {tier}": ((), broadcast, *block)} | store.arguments(params, rows)

    scoring = NO_SCORING if rule.score is None else rule.score.passes(setting.config.fl.local_steps)
    return FederatedAlgorithm(
        init, round_function, lambda state: Snapshot(state.params), plan,
        personal=True,
        selects=rule.score is not None,
        scoring=scoring,
        traffic=NO_TRAFFIC,
        summary=lambda rounds: {"parts": {"score": score}},
        programs={f"tier {tier}": program} | store.programs,
        arguments=arguments,
    )  # fmt: skip
