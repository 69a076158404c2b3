"""A federated algorithm put together from a few pure functions: train, weigh, transform, sum, step.

A round streams the cohort through the compiled program of each tier; each client's update is weighed and
added to exact running sums on its device, and the server steps once at the end.

Axes: C clients in all, D devices along "clients", B clients of a block on a device, L MoE layers, E experts.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload, dominant_set, routing_consistency
from hfedmoe_jax.aggregation.running_mean import (
    Contribution,
    RunningMean,
    Scale,
    literal_gating,
    map_totals,
    mean_accumulate,
    mean_finalize,
    mean_init,
    mean_merge,
    mean_settle,
)
from hfedmoe_jax.aggregation.sums import (
    add_terms,
    fixed_zeros,
    from_fixed,
    largest_term,
    merge_over_devices,
    power_below,
    settle,
)
from hfedmoe_jax.algorithms.algorithm import FederatedAlgorithm, Portion, RoundMetrics, ServerState, Setting
from hfedmoe_jax.algorithms.cohort import ClientReports, client_trains, place_update, train_cohort
from hfedmoe_jax.algorithms.records import open_records, remember
from hfedmoe_jax.bank import ExpertRows
from hfedmoe_jax.client import Broadcast, ClientData, ClientUpdate, LocalRule
from hfedmoe_jax.devices import NO_SCORING
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import flat
from hfedmoe_jax.mesh import CLIENTS, EXPERTS, REPLICATED, local_experts, map_specs, place_of
from hfedmoe_jax.models import Params, params_specs, tree_bytes
from hfedmoe_jax.optimizers import PerExpertState, build_optimizer, per_expert
from hfedmoe_jax.population import StateStore, stream
from hfedmoe_jax.reports import OK
from hfedmoe_jax.schedule import default_tiers, plan_blocks, tier_of

SPREAD = PartitionSpec(None, (EXPERTS, CLIENTS))


class Weights(NamedTuple):
    """What a client's update counts: functions of its `Upload` and the config's section `aggregation`.

    Attributes:
      experts: -> float [L, E], an entry of `expert_rules`.
      router: -> float [], or [L, E]: one for each expert's row of the routers; an entry of `gating_rules`.
      shared: -> float [].
    """

    experts: Callable[[Upload, ConfigDict], Float[Array, "layers experts"]]
    router: Callable[[Upload, ConfigDict], Array]
    shared: Callable[[Upload, ConfigDict], Float[Array, ""]] = lambda upload, aggregation: upload.size


class Change(NamedTuple):
    """What a client changed, over all parameters, for an algorithm that transforms it.

    Attributes:
      change: after less before, zero where it trained nothing.
      sent: bool [L, E], the experts whose change counts.
      moved: Params of bool arrays that broadcast against `change`: what the client could move at all
        (experts that it trained, rows of its own tokens).
      upload: what it reports.
      extra, state: the algorithm's broadcast arrays, and what it keeps of this client.
      key: of the client and round.
    """

    change: Params
    sent: Bool[Array, "layers experts"]
    moved: Params
    upload: Upload
    extra: Any
    state: Any
    key: Array


class Transformed(NamedTuple):
    """What becomes of a client's update.

    Attributes:
      change: what is summed.
      state: what is kept of the client; as it was, if its update does not count.
      summed: further arrays that are summed over the clients, each below 2^14 in magnitude.
    """

    change: Params
    state: Any = ()
    summed: Any = ()


class Totals(NamedTuple):
    """What a round comes to, for the server.

    Attributes:
      change: the weighted mean of the clients' changes.
      count: float32 [], clients that count.
      summed: sums of `Transformed.summed`.
      key: of the server in this round.
    """

    change: Params
    count: Float[Array, ""]
    summed: Any
    key: Array


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
      literal_gating: equation (21) as printed.
      upload_bytes: (params, experts sent [M]) -> bytes [M]; None: parameters as they are.
      summary: rounds -> further entries of summary.json.
    """

    rule: LocalRule
    weights: Weights
    server: tuple[str, ConfigDict]
    extra: Callable[[Params], Any] = lambda params: ()
    state: Callable[[Params], Any] = lambda params: ()
    transform: Callable[[Change], Transformed] | None = None
    step: Callable[[Totals, Any], tuple[Params, Any]] = keep
    literal_gating: bool = False
    upload_bytes: Callable[[Params, np.ndarray], np.ndarray] | None = None
    summary: Callable[[int], dict[str, Any]] = lambda rounds: {}

    def __call__(self, setting: Setting) -> FederatedAlgorithm:
        """Returns the algorithm for a setting."""
        return federate(self, setting)


class Sums(NamedTuple):
    """Running sums over clients; on a mesh with a leading axis D.

    Attributes:
      mean: of what they changed.
      count: int32 [], clients that count.
      summed: exact sums of `Transformed.summed`.
    """

    mean: RunningMean
    count: Int[Array, ""]
    summed: Any


def federate(method: Method, setting: Setting) -> FederatedAlgorithm:
    """Returns the algorithm of a method.

    Raises:
      InputError: it keeps a state of each client, and the experts of one client are spread over devices.
    """
    config, model, mesh, chunk = setting.config, setting.model, setting.mesh, setting.chunk
    params_shape, _ = jax.eval_shape(model.init, jax.random.key(0))
    programs = RoundPrograms(method, setting, params_shape)
    num_clients = len(setting.budget)
    store = StateStore(mesh, num_clients)
    tiers = list(programs.train)

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
        broadcast = Broadcast(state.params, setting.frozen, state.extra, key)
        sums, clients, told = train_cohort(
            programs.train, portions, programs.open(), programs.settle, broadcast, store, state.clients
        )
        params, optimizer, extra = programs.finish(sums, state.params, state.optimizer, state.extra, key)
        uploaded = told.uploaded
        records = remember(state.records, told, uploaded & told.upload.trained)
        dominant = dominant_set(told.upload.usage, told.upload.trained, config.aggregation.tau)
        consistency = np.asarray(routing_consistency(dominant, told.report.status == OK))
        return (
            ServerState(params, optimizer, extra, clients, records),
            RoundMetrics(told.report, uploaded, consistency),
        )

    upload_bytes = method.upload_bytes or plain_bytes
    scoring = NO_SCORING if method.rule.score is None else method.rule.score.passes(config.fl.local_steps)
    return FederatedAlgorithm(
        init, round_function, plan,
        personal=False,
        selects=method.rule.score is not None,
        scoring=scoring,
        upload_bytes=lambda sent: upload_bytes(params_shape, sent),
        summary=method.summary,
        programs={f"tier {tier}": program for tier, program in programs.train.items()}
        | {"open": programs.open, "settle": programs.settle, "finish": programs.finish},
    )  # fmt: skip


def plain_bytes(params: Params, sent: Int[np.ndarray, " members"]) -> Int[np.ndarray, " members"]:
    """Returns the bytes of parameters sent as they are.

    Args:
      params: shapes.
      sent: how many experts each client sends, beside routers and the shared part.
    """
    experts = jax.tree.leaves(params.experts)[0].shape[:2]
    one = tree_bytes(params.experts) // int(np.prod(experts))
    return tree_bytes((params.router, params.shared)) + np.asarray(sent, np.int64) * one


class RoundPrograms:
    """The compiled programs of a round.

    Args:
      method, setting: what they compute, and where.
      shapes: of the parameters.

    Attributes:
      train: by tier, (sums, broadcast, data, count) -> (sums, (reports, states)); sums are donated.
      open: () -> sums.
      settle: sums -> sums with room for more clients.
      finish: (sums, params, optimizer, extra, key) -> (params, optimizer, extra), which are donated.
    """

    def __init__(self, method: Method, setting: Setting, shapes: Params):
        self._method, self._setting, self._shapes = method, setting, shapes
        mesh, config, model = setting.mesh, setting.config, setting.model
        self._place = place_of(mesh, setting.chunk)
        self._server = per_expert(build_optimizer(method.server[1], method.server[0], "server"))
        self._scale = Scale(power_below(1 / model.num_layers), largest_term(config.fl.clients_per_round))
        self._state = jax.eval_shape(method.state, shapes)
        if jax.tree.leaves(self._state) and mesh.shape[EXPERTS] > 1:
            problem = f"{config.fl.algorithm} keeps arrays of each client, whole on its device"
            raise InputError("mesh.experts", mesh.shape[EXPERTS], problem, "use 1")
        self._extra = jax.eval_shape(method.extra, shapes)
        specs = params_specs(shapes)
        sums_specs = with_devices(self._sums_specs(specs))
        broadcast = Broadcast(specs, REPLICATED, REPLICATED, REPLICATED)

        def on_mesh(specs: Any) -> Any:
            return map_specs(lambda spec: NamedSharding(mesh, spec), specs)

        self._placed = on_mesh((specs, optimizer_specs(self._server, shapes), REPLICATED))
        sums = on_mesh(sums_specs)
        trains = client_trains(setting, method.rule, default_tiers(setting.chunk))
        self.train = {
            tier: stream(self._visit(train), self._merge, mesh, setting.chunk, broadcast, sums_specs)
            for tier, train in trains.items()
        }
        self.open = jax.jit(self._empty, out_shardings=sums)
        self.settle = jax.jit(settle_sums, donate_argnums=0, out_shardings=sums)
        self.finish = jax.jit(self._finish, donate_argnums=(1, 2, 3), out_shardings=self._placed)

    def init(self, params: Params) -> tuple[Params, Any, Any]:
        """Returns parameters, optimizer state and the algorithm's arrays on the mesh."""
        on_params, on_optimizer, on_extra = self._placed
        params = jax.device_put(params, on_params)
        optimizer = jax.jit(self._server.init, out_shardings=on_optimizer)(params)
        return params, optimizer, jax.jit(self._method.extra, out_shardings=on_extra)(params)

    @property
    def _router_rows(self) -> bool:
        return bool(jax.eval_shape(self._weights, upload_shape(self._setting)).router.shape)

    def _weights(self, upload: Upload) -> Params:
        aggregation = self._setting.config.aggregation
        return Params(*(weight(upload, aggregation) for weight in self._method.weights))

    def _summed(self) -> Any:
        if self._method.transform is None:
            return ()
        shapes, upload = self._shapes, upload_shape(self._setting)
        moved = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), bool), shapes)
        key = jax.eval_shape(jax.random.key, 0)
        return jax.eval_shape(
            lambda *parts: self._method.transform(Change(*parts)).summed,
            shapes, upload.trained, moved, upload, self._extra, self._state, key,
        )  # fmt: skip

    def _empty_sums(self) -> Sums:
        summed = jax.tree.map(lambda x: fixed_zeros(x.shape), self._summed())
        return Sums(mean_init(self._shapes, self._router_rows), jnp.int32(0), summed)

    def _empty(self) -> Sums:
        devices = self._setting.mesh.shape[CLIENTS]
        return jax.tree.map(
            lambda x: jnp.zeros((devices, *x.shape), x.dtype), jax.eval_shape(self._empty_sums)
        )

    def _sums_specs(self, specs: Params) -> Sums:
        by_expert = PartitionSpec(None, EXPERTS)
        weight = Params(by_expert, REPLICATED, REPLICATED)
        return Sums(RunningMean(specs, weight, REPLICATED), REPLICATED, REPLICATED)

    def _visit(self, train: Callable[[Broadcast, ClientData], ClientUpdate]) -> Callable:
        method, aggregation, place = self._method, self._setting.config.aggregation, self._place

        def visit(broadcast: Broadcast, client: ClientData):
            update = train(broadcast, client)
            upload, ok = update.upload, update.report.status == OK
            weights = jax.tree.map(lambda w: jnp.where(ok, w, 0.0), self._weights(upload))
            uploaded = weights.experts > 0
            dominant = dominant_set(upload.usage, upload.trained, aggregation.tau) & ok
            local = weights._replace(experts=local_experts(weights.experts, place))
            contribution = Contribution(update.params, update.trained, update.token, local, dominant)
            state, summed = client.state, ()
            if method.transform is not None:
                change = self._change(broadcast, client, update, uploaded)
                change, new, summed = method.transform(change)
                state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
                contribution = contribution._replace(
                    params=change._replace(experts=flat(change.experts)),
                    trained=every_expert(change.experts),
                    token=None,
                )
                summed = jax.tree.map(lambda x: jnp.where(ok, x, 0), summed)
            return (contribution, ok, summed), (
                ClientReports(client.client, upload, update.report, uploaded),
                state,
            )

        return visit

    def _change(
        self, broadcast: Broadcast, client: ClientData, update: ClientUpdate, uploaded: Array
    ) -> Change:
        start = broadcast.params
        after = place_update(start, update, self._setting.model.table)
        key = jax.random.fold_in(jax.random.fold_in(broadcast.key, client.client), 1)
        change = optax.tree.sub(after, start)
        moved = what_moved(
            start, update, self._setting.model.table, local_experts(update.upload.trained, self._place)
        )
        return Change(change, uploaded, moved, update.upload, broadcast.extra, client.state, key)

    def _merge(self, sums: Sums, broadcast: Broadcast, contributions) -> Sums:
        clients, ok, summed = contributions
        start = broadcast.params if self._method.transform is None else None
        mean = mean_accumulate(sums.mean, start, clients, self._scale, self._setting.model.table)
        total = map_totals(lambda total, x: add_terms(total, x), sums.summed, summed)
        return Sums(mean, sums.count + jnp.sum(ok, dtype=jnp.int32), total)

    def _finish(self, sums: Sums, params: Params, optimizer: Any, extra: Any, key: Array):
        method, scale, mesh = self._method, self._scale, self._setting.mesh

        def share_out(tree: Any) -> Any:
            """Spreads [L, E, ...] over all devices: each then updates a part of the experts."""
            if self._setting.model.num_experts % mesh.size:
                return tree
            return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, SPREAD))

        mean = mean_merge(sums.mean)
        mean = mean._replace(total=mean.total._replace(experts=share_out(mean.total.experts)))
        change = mean_finalize(mean, params)
        if method.literal_gating:
            change = change._replace(router=literal_change(mean, params.router, scale))
        summed = map_totals(lambda total: from_fixed(merge_over_devices(total)), sums.summed)
        count = jnp.sum(sums.count).astype(jnp.float32)
        change, new_extra = method.step(Totals(change, count, summed, jax.random.fold_in(key, SERVER)), extra)
        anyone = from_fixed(mean.weight.shared) > 0
        trained = from_fixed(mean.weight.experts) > 0
        spread = params._replace(experts=share_out(params.experts))
        updated = self._server.update(jax.tree.map(jnp.negative, change), optimizer, spread, trained)
        # A round in which every client failed leaves the server as it was.
        return jax.tree.map(
            lambda new, old: jnp.where(anyone, new, old), (*updated, new_extra), (params, optimizer, extra)
        )


SERVER = 2**31 - 1
"""Folded into a round's key for the server; no client has this number."""


def settle_sums(sums: Sums) -> Sums:
    """Makes room for `MOST_TERMS` more clients a device."""
    return sums._replace(mean=mean_settle(sums.mean), summed=map_totals(settle, sums.summed))


def upload_shape(setting: Setting) -> Upload:
    """Returns the shapes of what a client tells."""
    experts = (setting.model.num_layers, setting.model.num_experts)
    number, truth, times = (jax.ShapeDtypeStruct(experts, dtype) for dtype in (jnp.float32, bool, jnp.int32))
    return Upload(number, number, truth, times, jax.ShapeDtypeStruct((), jnp.float32))


def every_expert(experts: Any) -> ExpertRows:
    """Returns that a tree of [L, H, ...] has a row for each expert."""
    num_layers, held = jax.tree.leaves(experts)[0].shape[:2]
    every = jnp.arange(num_layers * held, dtype=jnp.int32)
    return ExpertRows(every, every, jnp.int32(num_layers * held))


def literal_change(mean: RunningMean, router: Any, scale: Scale) -> Any:
    """Returns the change of the routers by (21) as printed; none if no expert was dominant."""
    union_size = jnp.sum(mean.dominant > 0)
    literal = literal_gating(mean, router, scale, union_size)
    return jax.tree.map(lambda new, old: jnp.where(union_size > 0, new - old, 0.0), literal, router)


def what_moved(params: Params, update: ClientUpdate, table: str | None, trained: Array) -> Params:
    """Returns `Change.moved` of an update."""

    def of_expert(x):
        return trained.reshape(trained.shape + (1,) * (x.ndim - 2))

    shared = jax.tree.map(lambda x: jnp.bool_(True), params.shared)
    if update.token is not None:
        rows = params.shared[table].shape[0]
        shared[table] = jnp.zeros((rows, 1), bool).at[update.token].set(True, mode="drop")
    return Params(
        jax.tree.map(of_expert, params.experts),
        jax.tree.map(lambda x: jnp.bool_(True), params.router),
        shared,
    )


def with_devices(specs: Any) -> Any:
    """Returns specs of arrays with a leading axis D."""
    return map_specs(lambda spec: PartitionSpec(CLIENTS, *spec), specs)


def optimizer_specs(server: Any, params: Params) -> PerExpertState:
    """Returns how the server optimizer's state lies on a mesh."""
    state = jax.eval_shape(server.init, params)
    spread = PartitionSpec(None, EXPERTS)
    return PerExpertState(
        jax.tree.map(lambda _: spread, state.experts), jax.tree.map(lambda _: REPLICATED, state.rest)
    )
