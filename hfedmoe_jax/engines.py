"""The compiled programs of a round: one a tier, and what opens and ends it.

`SharedEngine` averages what the clients changed into one model; `PersonalEngine` keeps a model a client.

Axes: C clients in all, D devices along "clients", B members of a block on a device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import dominant_set
from hfedmoe_jax.bank import flat
from hfedmoe_jax.budgeted import here
from hfedmoe_jax.client import OK, ClientData, ClientUpdate
from hfedmoe_jax.models import MoeModel, Params
from hfedmoe_jax.optimizers import PerExpertOptimizer, PerExpertState
from hfedmoe_jax.population import (
    CLIENTS,
    EVERYWHERE,
    EXPERTS,
    collect,
    params_specs,
    place_of,
    stream,
)
from hfedmoe_jax.running_mean import (
    Contribution,
    RunningMean,
    Scale,
    literal_gating,
    mean_accumulate,
    mean_finalize,
    mean_init,
    mean_merge,
    mean_settle,
)
from hfedmoe_jax.sums import MOST_TERMS, from_fixed, largest_term, power_below

SPREAD = PartitionSpec(None, (EXPERTS, CLIENTS))


class Clients(NamedTuple):
    """The population as the programs need it.

    Attributes:
      budget: int [C], experts that each client can train, over all layers.
      table_rows: at least the distinct tokens of any client's round, padding included.
    """

    budget: Int[np.ndarray, " clients"]
    table_rows: int


class Weighing(NamedTuple):
    """What an update counts.

    Attributes:
      experts, router: an entry of `expert_rules`, and of `gating_rules`.
      aggregation: the config's section.
      members: clients of a round.
    """

    experts: Callable
    router: Callable
    aggregation: ConfigDict
    members: int


def told_of(client: ClientData, update: ClientUpdate, uploaded: Any) -> tuple:
    """Returns what the host reads of a client's round."""
    return client.client, update.upload, update.report, uploaded


class SharedEngine:
    """One model for all, a server optimizer over the mean change.

    Args:
      model, mesh, chunk: what is trained, and where.
      train: the clients' function of each tier, see `make_client`.
      server: the server optimizer.
      weighing: of the clients' updates.
    """

    def __init__(
        self,
        model: MoeModel,
        mesh: Mesh,
        chunk: int,
        train: dict[int, Callable],
        server: PerExpertOptimizer,
        weighing: Weighing,
    ):
        self.mesh, self.server, self.collect = mesh, server, collect(mesh)
        place = place_of(mesh, chunk)
        scale = Scale(power_below(1 / model.num_layers), largest_term(weighing.members))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        specs = params_specs(shapes)
        sums_specs = with_devices(sums_specs_of(shapes))

        def contribute(tier: int) -> Callable:
            def visit(broadcast, client: ClientData):
                params, key = broadcast
                update = train[tier](params, client, jax.random.fold_in(key, client.client))
                contribution = weigh(update, weighing)
                uploaded = contribution.weights.experts > 0
                held = here(model, contribution.weights.experts, place)
                contribution = contribution._replace(weights=contribution.weights._replace(experts=held))
                return contribution, told_of(client, update, uploaded)

            return visit

        def merge(sums: RunningMean, broadcast, contributions: Contribution) -> RunningMean:
            return mean_accumulate(sums, broadcast[0], contributions, scale, model.pieces.table)

        def open_sums() -> RunningMean:
            empty = mean_init(shapes)
            return jax.tree.map(lambda x: jnp.zeros((mesh.shape[CLIENTS], *x.shape), x.dtype), empty)

        def share_out(tree: Any) -> Any:
            """Spreads [L, E, ...] over all devices: each then updates a part of the experts."""
            if model.num_experts % mesh.size:
                return tree
            return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, SPREAD))

        def finish(sums: RunningMean, params: Params, optimizer: Any):
            mean = mean_merge(sums)
            mean = mean._replace(total=mean.total._replace(experts=share_out(mean.total.experts)))
            change = mean_finalize(mean, params)
            if weighing.aggregation.literal_gating:
                change = change._replace(router=literal_change(mean, params.router, scale))
            pseudo_gradient = jax.tree.map(jnp.negative, change)
            anyone = from_fixed(mean.weight.shared) > 0
            trained = from_fixed(mean.weight.experts) > 0
            spread = params._replace(experts=share_out(params.experts))
            updated = server.update(pseudo_gradient, optimizer, spread, trained)
            # A round in which every client failed leaves the server as it was.
            updated = jax.tree.map(lambda new, old: jnp.where(anyone, new, old), updated, (params, optimizer))
            return updated, jax.tree.map(jnp.zeros_like, sums)

        def on_mesh(specs: Any) -> Any:
            return map_specs(lambda spec: NamedSharding(mesh, spec), specs)

        self._state = (on_mesh(specs), on_mesh(optimizer_specs(server, shapes)))
        sums = on_mesh(sums_specs)
        self._tiers = {
            tier: stream(contribute(tier), merge, mesh, chunk, (specs, EVERYWHERE), sums_specs)
            for tier in train
        }
        self._open = jax.jit(open_sums, out_shardings=sums)
        self._finish = jax.jit(finish, donate_argnums=(0, 1, 2), out_shardings=(self._state, sums))
        self._settle = jax.jit(mean_settle, donate_argnums=0, out_shardings=sums)
        self._spare = None  # the last round's sums, cleared: fresh memory costs a CPU its page faults
        self._terms = 0
        self.programs = {f"tier {tier}": run for tier, run in self._tiers.items()}
        self.programs |= {"open": self._open, "settle": self._settle, "finish": self._finish}

    def init(self, params: Params) -> tuple[Params, Any]:
        """Returns parameters and optimizer state on the mesh."""
        on_params, on_optimizer = self._state
        params = jax.device_put(params, on_params)
        return params, jax.jit(self.server.init, out_shardings=on_optimizer)(params)

    def open(self, state: Any) -> RunningMean:
        """Returns empty sums."""
        sums, self._spare = self._spare, None
        self._terms = 0
        return self._open() if sums is None else sums

    def run(self, tier: int, sums: RunningMean, state: Any, data: ClientData, count: Any, key: Any):
        """Returns the sums with a block's clients added, and what they told."""
        size = data.client.shape[0] // self.mesh.shape[CLIENTS]
        if self._terms + size > MOST_TERMS:
            sums, self._terms = self._settle(sums), 0
        self._terms += size
        sums, told = self._tiers[tier](sums, (state.params, key), data, count)
        return sums, self.collect(told)

    def finish(self, sums: RunningMean, state: Any) -> tuple[Params, Any]:
        """Returns the new parameters and optimizer state."""
        updated, self._spare = self._finish(sums, state.params, state.optimizer)
        return updated


class PersonalEngine:
    """A model a client: no aggregation.

    Args:
      model, mesh, chunk: what is trained, and where.
      train: the clients' function, of the one tier there is.
      num_clients: C.
    """

    def __init__(self, model: MoeModel, mesh: Mesh, chunk: int, train: dict[int, Callable], num_clients: int):
        self.num_clients, self.collect = num_clients, collect(mesh)
        ((tier, train_client),) = train.items()

        def visit(broadcast, client: ClientData):
            everyone, key = broadcast
            own = jax.tree.map(lambda x: x[client.client], everyone)
            update = train_client(own, client, jax.random.fold_in(key, client.client))
            ok = update.report.status == OK
            after = place_update(own, update, model.pieces.table)
            kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), after, own)
            told = told_of(client, update, jnp.zeros_like(update.upload.trained))
            return (), (told, kept)

        everyone = NamedSharding(mesh, EVERYWHERE)
        self._run = stream(visit, None, mesh, chunk, EVERYWHERE)
        self._keep = jax.jit(self._write, donate_argnums=0, out_shardings=everyone)
        self._spread = jax.jit(
            lambda params: jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), params),
            out_shardings=everyone,
        )
        self.programs = {f"tier {tier}": self._run, "keep": self._keep}

    def _write(self, everyone: Params, client, kept: Params, count) -> Params:
        size = client.shape[0] // count.shape[0]
        real = jnp.arange(client.shape[0]) % size < jnp.repeat(count, size)
        row = jnp.where(real, client, self.num_clients)
        return jax.tree.map(lambda x, new: x.at[row].set(new, mode="drop"), everyone, kept)

    def init(self, params: Params) -> tuple[Params, Any]:
        """Returns a copy of the parameters for every client [C, ...]."""
        return self._spread(params), ()

    def open(self, state: Any) -> Params:
        """Returns the models."""
        return state.params

    def run(self, tier: int, everyone: Params, state: Any, data: ClientData, count: Any, key: Any):
        """Returns the models after a block's clients trained theirs, and what they told."""
        _, (told, kept) = self._run((), (everyone, key), data, count)
        return self._keep(everyone, data.client, kept, count), self.collect(told)

    def finish(self, everyone: Params, state: Any) -> tuple[Params, Any]:
        """Returns the models."""
        return everyone, ()


def weigh(update: ClientUpdate, weighing: Weighing) -> Contribution:
    """Returns what an update adds to the running mean; one that is not OK has weights of zero."""
    upload, ok = update.upload, update.report.status == OK
    weights = Params(
        experts=weighing.experts(upload, weighing.aggregation),
        router=weighing.router(upload, weighing.aggregation),
        shared=upload.size,
    )
    weights = jax.tree.map(lambda w: jnp.where(ok, w, 0.0), weights)
    dominant = dominant_set(upload.usage, upload.trained, weighing.aggregation.tau) & ok
    return Contribution(update.params, update.trained, update.token, weights, dominant)


def literal_change(mean: RunningMean, router: Any, scale: Scale) -> Any:
    """Returns the change of the routers by (21) as printed; none if no expert was dominant."""
    union_size = jnp.sum(mean.dominant > 0)
    literal = literal_gating(mean, router, scale, union_size)
    return jax.tree.map(lambda new, old: jnp.where(union_size > 0, new - old, 0.0), literal, router)


def place_update(params: Params, update: ClientUpdate, table: str) -> Params:
    """Returns a model with a client's rows put in their places."""

    def experts(whole, rows):
        placed = flat(whole).at[update.trained.expert].set(rows[update.trained.row], mode="drop")
        return placed.reshape(whole.shape)

    shared = dict(update.params.shared)
    if update.token is not None:
        shared[table] = params.shared[table].at[update.token].set(shared[table], mode="drop")
    return Params(jax.tree.map(experts, params.experts, update.params.experts), update.params.router, shared)


def sums_specs_of(params: Params) -> RunningMean:
    """Returns how running sums lie on a mesh: as the parameters do."""
    weight = Params(PartitionSpec(None, EXPERTS), EVERYWHERE, EVERYWHERE)
    return RunningMean(params_specs(params), weight, EVERYWHERE)


def map_specs(function: Callable[[PartitionSpec], Any], specs: Any) -> Any:
    """Maps over a tree of specs."""
    return jax.tree.map(function, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def with_devices(specs: Any) -> Any:
    """Returns specs of arrays with a leading axis D."""
    return map_specs(lambda spec: PartitionSpec(CLIENTS, *spec), specs)


def optimizer_specs(server: PerExpertOptimizer, params: Params) -> PerExpertState:
    """Returns how the server optimizer's state lies on a mesh."""
    state = jax.eval_shape(server.init, params)
    spread = PartitionSpec(None, EXPERTS)
    return PerExpertState(
        jax.tree.map(lambda _: spread, state.experts), jax.tree.map(lambda _: EVERYWHERE, state.rest)
    )
