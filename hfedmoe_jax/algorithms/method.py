"""A federated algorithm put together from a few pure functions: train, weigh, transform, sum, step.

A round streams the cohort through the compiled program of each tier; each client's update is weighed and
added to exact running sums on its device, and the server steps once at the end (see `programs`).

Axes: C clients in all, M clients of a round's cohort.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import dominant_set, routing_consistency
from hfedmoe_jax.algorithms.algorithm import FederatedAlgorithm, Portion, RoundMetrics, ServerState, Setting
from hfedmoe_jax.algorithms.cohort import train_cohort
from hfedmoe_jax.algorithms.parts import Change, Totals, Transformed, Weights
from hfedmoe_jax.algorithms.programs import RoundPrograms
from hfedmoe_jax.algorithms.records import open_records, remember
from hfedmoe_jax.algorithms.traffic import traffic_of
from hfedmoe_jax.client import Broadcast, LocalRule
from hfedmoe_jax.devices import NO_SCORING
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.mesh import EXPERTS
from hfedmoe_jax.models import NO_PARAMS, Params, tree_bytes
from hfedmoe_jax.models.frozen import add_to_frozen
from hfedmoe_jax.population import StateStore
from hfedmoe_jax.reports import OK
from hfedmoe_jax.schedule import plan_blocks, tier_of


def keep(totals: Totals, extra: Any) -> tuple[Params, Any]:
    """Returns the mean change, and the algorithm's arrays, as they are."""
    return totals.change, extra


class Method(NamedTuple):
    """An algorithm by its parts. A method is a `build`: called with a `Setting` it returns the algorithm.

    Attributes:
      rule: how clients train.
      weights: what their updates count.
      server: name of the server optimizer, and the config's section with its rates.
      extra: params -> arrays of the algorithm's own, which every client receives.
      state: params -> what is kept of each client, at the start.
      transform: Change -> Transformed, of each client's update before it is summed; None: as it is.
      step: (Totals, extra) -> (change that the server optimizer takes, extra), at the end of a round.
      steps_always: the server steps, for every expert, even in a round in which no client counts.
      literal_gating: equation (21) as printed.
      added: extra -> the part of it that is added to frozen parameters, by their names; None for nothing.
      part: (shapes of the model, budget over all experts) -> shapes of what a client of that budget receives
        and trains.
      terms: shapes of a client's part -> of those, what the server does not average but adds up in `extra`.
        A client then receives what was sent of them since it last took part, or `extra` if that is smaller.
      tensor_bytes: shape and type of a tensor of the model -> its bytes in an upload.
      summary: (rounds, C) -> further entries of summary.json.
    """

    rule: LocalRule
    weights: Weights
    server: tuple[str, ConfigDict]
    extra: Callable[[Params], Any] = lambda params: ()
    state: Callable[[Params], Any] = lambda params: ()
    transform: Callable[[Change], Transformed] | None = None
    step: Callable[[Totals, Any], tuple[Params, Any]] = keep
    steps_always: bool = False
    literal_gating: bool = False
    added: Callable[[Any], dict | None] = lambda extra: None
    part: Callable[[Params, np.ndarray], Params] = lambda shapes, share: shapes
    terms: Callable[[Params], Params] = lambda shapes: NO_PARAMS
    tensor_bytes: Callable[[jax.ShapeDtypeStruct], int] = tree_bytes
    summary: Callable[[int, int], dict[str, Any]] = lambda rounds, population: {}

    @property
    def uses_budgets(self) -> bool:
        """Says whether the clients' budgets matter."""
        return self.rule.uses_budgets or self.rule.start is not None

    def __call__(self, setting: Setting) -> FederatedAlgorithm:
        """Returns the algorithm for a setting."""
        return federate(self, setting)


def federate(method: Method, setting: Setting) -> FederatedAlgorithm:
    """Returns the algorithm of a method (see `refuse_spread_experts`)."""
    config, model, mesh, chunk = setting.config, setting.model, setting.mesh, setting.chunk
    refuse_spread_experts(method, config.fl.algorithm, mesh.shape[EXPERTS])
    params_shape, _ = jax.eval_shape(model.init, jax.random.key(0))
    programs = RoundPrograms(method, setting, params_shape)
    num_clients = len(setting.budget)
    traffic = traffic_of(method, params_shape, setting.budget, model.all_experts)
    store = StateStore(mesh, num_clients)
    tiers, state = list(programs.train), jax.eval_shape(method.state, params_shape)

    def init(params: Params) -> ServerState:
        records = open_records(num_clients, model.num_layers, model.num_experts)
        params, optimizer, extra = programs.init(params)
        return ServerState(params, optimizer, extra, store.open(method.state(params)), records)

    def plan(clients: np.ndarray, hosts: np.ndarray | None = None) -> list:
        budgets = (
            np.full(len(clients), model.all_experts) if method.rule.score is None else setting.budget[clients]
        )
        return plan_blocks(tier_of(budgets, tiers), mesh, chunk, hosts)

    def round_function(state: ServerState, portions: Iterable[Portion], key: jax.Array):
        frozen = add_to_frozen(setting.frozen, method.added(state.extra))
        broadcast = Broadcast(state.params, frozen, state.extra, key)
        sums, clients, reports = train_cohort(
            programs.train, portions, programs.open(), programs.settle, broadcast, store, state.clients
        )
        params, optimizer, extra = programs.finish(sums, state.params, state.optimizer, state.extra, key)
        uploaded = reports.uploaded
        counts, cohort, missed = reports.report.status == OK, reports.client, state.records.missed
        sent = uploaded.sum(axis=(1, 2))
        down = traffic.down(missed[cohort], cohort)
        up, terms = (np.where(counts, of(sent, cohort), 0) for of in (traffic.up, traffic.terms))
        records = remember(state.records, reports, uploaded & reports.upload.trained, int(terms.sum()))
        dominant = dominant_set(reports.upload.usage, reports.upload.trained, config.aggregation.tau)
        consistency = np.asarray(routing_consistency(dominant, counts))
        return (
            ServerState(params, optimizer, extra, clients, records),
            RoundMetrics(reports.report, uploaded, consistency, down, up),
        )

    def snapshot(state: ServerState) -> Snapshot:
        return Snapshot(state.params, bias(state.extra), method.added(state.extra))

    bias = jax.jit(method.rule.router_bias or (lambda extra: None))
    scoring = NO_SCORING if method.rule.score is None else method.rule.score.passes(config.fl.local_steps)
    return FederatedAlgorithm(
        init, round_function, snapshot, plan,
        personal=False,
        selects=method.rule.score is not None,
        scoring=scoring,
        traffic=traffic,
        summary=lambda rounds: method.summary(rounds, num_clients),
        programs=programs.named() | (store.programs if jax.tree.leaves(state) else {}),
        arguments=lambda data: programs.arguments(data) | store.arguments(state, len(data.client)),
    )  # fmt: skip


def refuse_spread_experts(method: Method, name: str, experts: int) -> None:
    """Raises InputError if a method looks at whole updates, and a client's experts are spread over devices.

    Args:
      name: of the algorithm.
      experts: devices that they are spread over.
    """
    if experts > 1 and (method.transform or method.rule.offset):
        problem = f"{name} transforms a client's update, which must be whole on its device"
        raise InputError("mesh.experts", experts, problem, "use 1")
