"""What a model answers and how it routes: sums over batches, through the population engine.

Axes: M batches, B batch, N tokens, L MoE layers, E experts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from hfedmoe_jax.client import ClientData
from hfedmoe_jax.experts import open_budget
from hfedmoe_jax.mesh import BY_CLIENT, CLIENTS, REPLICATED, Place, place_of, shapes_on_mesh
from hfedmoe_jax.models import NO_PARAMS, ModelOutput, MoeModel, Params, frozen_specs, params_specs
from hfedmoe_jax.models.frozen import add_to_frozen
from hfedmoe_jax.population import StateStore, map_members, put_members, stack_members, stream
from hfedmoe_jax.reports import gate_entropy
from hfedmoe_jax.schedule import Block, plan_blocks
from hfedmoe_jax.scores import flat_mask, units_of, usage, usage_over_batches
from hfedmoe_jax.tasks import Batch, Ratio, Task


class Snapshot(NamedTuple):
    """A model as it is used.

    Attributes:
      params: a leading axis C if every client has its own.
      router_bias: float32 [L, E], added to the routers' logits; None for nothing.
      added: to frozen parameters, a tree of some of them; None for nothing.
    """

    params: Params
    router_bias: Float[Array, "layers experts"] | None = None
    added: dict | None = None


class EvaluationBatches(NamedTuple):
    """Batches to evaluate a model on.

    Attributes:
      batch: a tree of [M, B, ...].
      weight: of the examples; 0 for padding.
      client: whose model is evaluated on a batch, for algorithms that keep a model a client.
    """

    batch: Batch
    weight: Float[Array, "batches batch"]
    client: Int[Array, " batches"]


class BatchScore(NamedTuple):
    """Sums over the examples of a batch (a leading axis M when stacked).

    Attributes:
      scores: of the task.
      load: tokens that each expert served, [L, E].
      entropy: of the gates in nats, mean over layers, over the real tokens.
      evidence: of the task, [B, ...]; () if it has none.
    """

    scores: dict[str, Ratio]
    load: Float[Array, "*batches layers experts"]
    entropy: Ratio
    evidence: Any


class Evaluator:
    """Evaluates models and describes their routing, batches and clients spread over the devices.

    Args:
      model, task, frozen: what is evaluated.
      personal: parameters have a leading axis C, and each batch or client has a model of its own.
      num_clients: C.
      mesh, chunk: where, and how many at once on a device.
      unit: `importance.unit`.

    Attributes:
      programs: the compiled functions by name.
    """

    def __init__(
        self,
        model: MoeModel,
        task: Task,
        frozen: Any,
        personal: bool,
        num_clients: int,
        mesh: Mesh,
        chunk: int,
        unit: str,
    ):
        self._model, self._task, self._unit, self._personal = model, task, unit, personal
        self._mesh, self._chunk, self._frozen = mesh, chunk, frozen
        self._place = place_of(mesh, chunk)
        self._store = StateStore(mesh, num_clients)
        specs = params_specs(jax.eval_shape(model.init, jax.random.key(0))[0])
        shared = (Snapshot(NO_PARAMS if personal else specs, REPLICATED), frozen_specs(frozen))
        self._specs = (shared, BY_CLIENT, BY_CLIENT)
        self.programs = {
            "evaluate": stream(self._score_batch, None, mesh, chunk, shared),
            "usage": stream(self._usage_of_client, None, mesh, chunk, shared),
        }

    def scores(
        self, model: Snapshot, batches: EvaluationBatches, hosts: Int[np.ndarray, " batches"] | None = None
    ) -> BatchScore:
        """Returns the scores of all batches, stacked, on the host.

        Args:
          hosts: the process that has each batch; others pass anything of its shape.
        """
        blocks = plan_blocks(np.zeros(len(batches.client), int), self._mesh, self._chunk, hosts)
        members = ((block, stack_members(batches, block.members)) for block in blocks)
        return self._over("evaluate", model, ((block, each, each.client) for block, each in members))

    def usage(
        self, model: Snapshot, blocks: Iterable[tuple[Block, ClientData]]
    ) -> Float[np.ndarray, "members layers experts"]:
        """Returns u_c (16) of each client under one model, on the host.

        Taken over the batches of a round by the same unit, so that it compares with what the clients
        reported from training on them, before aggregation moved their routers.

        Args:
          blocks: of a cohort, with its data on the host.
        """
        return self._over("usage", model, ((block, data, data.client) for block, data in blocks))

    def _over(self, name: str, model: Snapshot, members: Iterable[tuple[Block, Any, np.ndarray]]) -> Any:
        """Runs a program over blocks of members, each with the number of the client whose model is meant."""

        def placed():
            for block, each, owner in members:
                own = self._store.gather(model.params, owner) if self._personal else ()
                yield block, (put_members(self._mesh, each), own)

        return map_members(self.programs[name], self._mesh, self._shared(model, self._frozen), placed())

    def arguments(self, model: Snapshot, batches: EvaluationBatches, clients: ClientData) -> dict[str, tuple]:
        """Returns the shapes of the arguments of each program by name, with where they lie on the mesh.

        Args:
          model: shapes.
          batches, clients: shapes of a block of them, [D * B, ...].
        """
        common = jax.eval_shape(self._shared, model, self._frozen)

        def block(members: Any) -> tuple:
            rows = len(members.client)
            own = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), model.params)
            count = jax.ShapeDtypeStruct((self._mesh.shape[CLIENTS],), jnp.int32)
            whole = (common, (members, own if self._personal else ()), count)
            return (), *shapes_on_mesh(self._mesh, self._specs, whole)

        return {"evaluate": block(batches), "usage": block(clients)}

    def _shared(self, model: Snapshot, frozen: Any) -> tuple[Snapshot, Any]:
        """Returns what all members use alike: a model, and its frozen parameters."""
        frozen = add_to_frozen(frozen, model.added)
        return model._replace(params=NO_PARAMS if self._personal else model.params, added=None), frozen

    def _apply(self, broadcast: Any, own: Any, batch: Batch, training: bool) -> ModelOutput:
        shared, frozen = broadcast
        model = shared._replace(params=own) if self._personal else shared
        return predict(self._model, model, frozen, batch, training, self._place)

    def _score_batch(self, broadcast: Any, member: tuple[EvaluationBatches, Any]):
        (batch, weight, _), own = member
        asked = batch if self._task.asked is None else self._task.asked(batch)
        out = self._apply(broadcast, own, asked, False)
        token_mask = flat_mask(self._model.mask(asked))
        tokens = jnp.sum(token_mask, dtype=jnp.float32)
        entropy = Ratio(tokens * gate_entropy(out.routing.gates, token_mask), tokens)
        scores = self._task.score(out.output, batch, weight)
        evidence = () if self._task.evidence is None else self._task.evidence(out.output, batch)
        return (), BatchScore(scores, out.routing.kept.astype(jnp.float32), entropy, evidence)

    def _usage_of_client(self, broadcast: Any, member: tuple[ClientData, Any]):
        client, own = member

        def of_batch(batch):
            routing = self._apply(broadcast, own, batch, True).routing
            units = units_of(routing.gates, routing.own, self._model.mask(batch), self._unit)
            return usage(units.chosen_gates, units.mask), jnp.sum(units.mask, axis=-1, dtype=jnp.float32)

        return (), usage_over_batches(*jax.lax.map(of_batch, client.batch))


def predict(
    model: MoeModel, snapshot: Snapshot, frozen: Any, batch: Batch, training: bool, place: Place
) -> ModelOutput:
    """Returns what a model makes of a batch when all of its experts run.

    Args:
      snapshot: its experts [L, H, ...] of this device.
      frozen: with what the snapshot adds to them.
      training: see `MoeModel.apply`.
    """
    params, bias, _ = snapshot
    budget = open_budget(params.experts, model.num_experts, place, bias)
    return model.apply(params, frozen, batch, budget, training)
