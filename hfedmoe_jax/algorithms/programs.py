"""The compiled programs of a `Method`'s round.

Axes: D devices along "clients", L MoE layers, E experts, H experts of a layer on this device.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from hfedmoe_jax.aggregation import Upload, dominant_set
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
    widen,
    widen_rows,
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
from hfedmoe_jax.algorithms.algorithm import Setting
from hfedmoe_jax.algorithms.cohort import ClientReports, client_trains, place_update
from hfedmoe_jax.algorithms.parts import Change, Totals
from hfedmoe_jax.bank import ExpertRows
from hfedmoe_jax.client import Broadcast, ClientData, ClientUpdate
from hfedmoe_jax.experts import flat
from hfedmoe_jax.mesh import (
    BY_CLIENT,
    CLIENTS,
    EXPERTS,
    REPLICATED,
    local_experts,
    map_specs,
    place_of,
    shapes_on_mesh,
)
from hfedmoe_jax.models import Params, frozen_specs, params_specs
from hfedmoe_jax.models.frozen import add_each, addends
from hfedmoe_jax.optimizers import PerExpertState, build_optimizer, per_expert
from hfedmoe_jax.population import stream
from hfedmoe_jax.reports import OK
from hfedmoe_jax.schedule import default_tiers

if TYPE_CHECKING:
    from hfedmoe_jax.algorithms.method import Method

SPREAD = PartitionSpec(None, (EXPERTS, CLIENTS))


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

    def __init__(self, method: "Method", setting: Setting, shapes: Params):
        self._method, self._setting, self._shapes = method, setting, shapes
        mesh, config, model = setting.mesh, setting.config, setting.model
        self._place = place_of(mesh, setting.chunk)
        self._server = per_expert(build_optimizer(method.server[1], method.server[0], "server"))
        self._scale = Scale(power_below(1 / model.num_layers), largest_term(config.fl.clients_per_round))
        self._state = jax.eval_shape(method.state, shapes)
        self._extra = jax.eval_shape(method.extra, shapes)
        specs = params_specs(shapes)
        sums_specs = with_devices(self._sums_specs(specs))
        broadcast = Broadcast(specs, frozen_specs(setting.frozen), REPLICATED, REPLICATED)

        def on_mesh(specs: Any) -> Any:
            return map_specs(lambda spec: NamedSharding(mesh, spec), specs)

        self._specs = (specs, optimizer_specs(self._server, shapes), REPLICATED)
        self._on_sums = sums_specs
        self._placed = on_mesh(self._specs)
        sums = on_mesh(sums_specs)
        trains = client_trains(setting, method.rule, config.budget.tiers or default_tiers(setting.chunk))
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

    def named(self) -> dict[str, Callable]:
        """Returns the programs by name."""
        tiers = {f"tier {tier}": program for tier, program in self.train.items()}
        add = {} if self._method.added(self._extra) is None else {"add": add_each}
        return tiers | add | {"open": self.open, "settle": self.settle, "finish": self.finish}

    def arguments(self, data: ClientData) -> dict[str, tuple]:
        """Returns the shapes of the arguments of each program by name, with where they lie on the mesh.

        Args:
          data: shapes of a block [D * B, ...], without states.
        """
        mesh, (on_params, on_optimizer, on_extra) = self._setting.mesh, self._specs
        params = shapes_on_mesh(mesh, on_params, self._shapes)
        optimizer = shapes_on_mesh(mesh, on_optimizer, jax.eval_shape(self._server.init, self._shapes))
        extra = shapes_on_mesh(mesh, on_extra, self._extra)
        key = shapes_on_mesh(mesh, REPLICATED, jax.eval_shape(jax.random.key, 0))
        sums = shapes_on_mesh(mesh, self._on_sums, jax.eval_shape(self._empty))
        count = jax.ShapeDtypeStruct((mesh.shape[CLIENTS],), jnp.int32)
        (rows,) = data.client.shape
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), self._state)
        block = shapes_on_mesh(mesh, BY_CLIENT, (data._replace(state=state), count))
        frozen = self._setting.frozen
        frozen = shapes_on_mesh(mesh, frozen_specs(frozen), frozen)
        added = self._method.added(extra)
        train = (sums, Broadcast(params, frozen, extra, key), *block)
        add = {} if added is None else {"add": addends(frozen, added)}
        tiers = {f"tier {tier}": train for tier in self.train}
        return tiers | add | {
            "open": (),
            "settle": (sums,),
            "finish": (sums, params, optimizer, extra, key),
        }  # fmt: skip

    @property
    def _router_rows(self) -> bool:
        return bool(jax.eval_shape(self._weights, upload_shape(self._setting)).router.shape)

    def _weights(self, upload: Upload) -> Params:
        aggregation = self._setting.config.aggregation
        return Params(*(weight(upload, aggregation) for weight in self._method.weights))

    def _summed(self) -> Any:
        transform = self._method.transform
        if transform is None:
            return ()
        shapes, upload = self._shapes, upload_shape(self._setting)
        key = jax.eval_shape(jax.random.key, 0)
        sent = jax.eval_shape(lambda *of: what_counts(self._weights(of[0]), of[1]), upload, shapes)
        return jax.eval_shape(
            lambda *parts: transform(Change(*parts)).summed,
            shapes, shapes, sent, sent, upload, upload.size, self._extra, self._state, key,
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
                change = self._change(broadcast, client, update, local)
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
        self, broadcast: Broadcast, client: ClientData, update: ClientUpdate, weights: Params
    ) -> Change:
        start, table = broadcast.params, self._setting.model.table
        change = optax.tree.sub(place_update(start, update, table), start)
        key = jax.random.fold_in(jax.random.fold_in(broadcast.key, client.client), 1)
        moved = what_moved(change, update, table)
        sent = what_counts(weights, change)
        return Change(
            start, change, sent, moved, update.upload, client.rate, broadcast.extra, client.state, key
        )

    def _merge(self, sums: Sums, broadcast: Broadcast, contributions) -> Sums:
        clients, ok, summed = contributions
        start = broadcast.params if self._method.transform is None else None
        mean = mean_accumulate(sums.mean, start, clients, self._scale, self._setting.model.table)
        largest = self._scale.largest
        summed = jax.tree.map(lambda x: jnp.clip(x, -largest, largest), summed)
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
        totals = Totals(
            params, change, count, len(self._setting.budget), summed, jax.random.fold_in(key, SERVER)
        )
        change, new_extra = method.step(totals, extra)
        anyone = (from_fixed(mean.weight.shared) > 0) | method.steps_always
        trained = (from_fixed(mean.weight.experts) > 0) | method.steps_always
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
    """Returns the shapes of what a client reports."""
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


def what_counts(weights: Params, change: Params) -> Params:
    """Returns `Change.sent` of an update with these weights."""
    return Params(
        jax.tree.map(lambda x: widen(weights.experts, x) > 0, change.experts),
        jax.tree.map(lambda x: widen_rows(weights.router, x) > 0, change.router),
        jax.tree.map(lambda x: widen(weights.shared, x) > 0, change.shared),
    )


def what_moved(change: Params, update: ClientUpdate, table: str | None) -> Params:
    """Returns `Change.moved` of an update."""
    trained = update.upload.trained
    moved = what_counts(Params(trained, jnp.bool_(True), jnp.bool_(True)), change)
    if update.token is not None:
        rows = jnp.zeros_like(change.shared[table][:, :1], bool)
        moved.shared[table] = rows.at[update.token].set(True, mode="drop")
    return moved


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
