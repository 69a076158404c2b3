"""What a federated algorithm is: a pair of pure functions, `init` and `round`, and the table of them.

    @algorithms.register("mine")
    def mine(config):
        ...refuse what does not fit, before any data are read...
        return build                  # (setting: Setting) -> FederatedAlgorithm

A `build` may have an attribute `uses_budgets`; if it is False, every client's budget is all experts. Most
algorithms are a `Method`, a few functions that the round of `method` puts together; `Method(...)` is
such a `build`.

Axes: C clients in all, M clients of a round's cohort, L MoE layers, E experts.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.algorithms.traffic import Traffic
from hfedmoe_jax.client import ClientData
from hfedmoe_jax.devices import ScoringPasses
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models import MoeModel, Params
from hfedmoe_jax.registry import Registry
from hfedmoe_jax.reports import ClientReport
from hfedmoe_jax.schedule import Block
from hfedmoe_jax.tasks import Task

algorithms = Registry("fl.algorithm")
"""Functions `(config: ConfigDict) -> build` by name; they raise InputError for a config that does not fit."""


class Setting(NamedTuple):
    """What an algorithm is built for.

    Attributes:
      config: of the run.
      model, task: what is trained.
      frozen: parameters that nobody trains, on the mesh.
      budget: int [C], experts that each client can train, over all layers.
      table_rows: at least the distinct tokens of any client's round, padding included.
      mesh, chunk: where clients run, and how many at once on a device.
    """

    config: ConfigDict
    model: MoeModel
    task: Task
    frozen: Any
    budget: Int[np.ndarray, " clients"]
    table_rows: int
    mesh: Mesh
    chunk: int


class ClientRecords(NamedTuple):
    """What the server remembers of every client between rounds, for figures and for what it sends.

    Attributes:
      usage: float32 [C, L, E], u_c of the client's last round; NaN if its update did not count.
      times_trained: int32 [C, L, E], rounds in which an expert of the client was aggregated, or
        trained if the model is the client's own.
      rounds_measured: int32 [C], rounds in which its batches were routed to the end: those whose
        update counted, and those that failed for the size of their union.
      union_total: float32 [C], sum over those rounds of the mean union size.
      missed: int64 [C], bytes of `Traffic.terms` that were sent since the client last took part.
    """

    usage: Float[np.ndarray, "clients layers experts"]
    times_trained: Int[np.ndarray, "clients layers experts"]
    rounds_measured: Int[np.ndarray, " clients"]
    union_total: Float[np.ndarray, " clients"]
    missed: Int[np.ndarray, " clients"]


class ServerState(NamedTuple):
    """Everything that a round changes.

    Attributes:
      params: the global model; of a personal algorithm every client's, leading axis C.
      optimizer: state of the server optimizer.
      extra: arrays of the algorithm's own.
      clients: what it keeps of every client, leading axis C, spread over the devices.
      records: see `ClientRecords`.
    """

    params: Params
    optimizer: Any
    extra: Any
    clients: Any
    records: ClientRecords


class RoundMetrics(NamedTuple):
    """What a round measured, by member of the cohort [M, ...], on the host.

    Attributes:
      report: the clients' reports.
      uploaded: bool [M, L, E], the experts that each client sent and the server counted.
      consistency: float32 [M], routing consistency r(c) (18).
      bytes_down, bytes_up: int64 [M], what each client received, and sent: 0 where its update does not count.
    """

    report: ClientReport
    uploaded: Bool[np.ndarray, "members layers experts"]
    consistency: Float[np.ndarray, " members"]
    bytes_down: Int[np.ndarray, " members"]
    bytes_up: Int[np.ndarray, " members"]


class Portion(NamedTuple):
    """A block of a cohort with its data.

    Attributes:
      block: which members.
      clients: int [D * B], their numbers, NOBODY where there is none; host.
      data: on the devices.
    """

    block: Block
    clients: Int[np.ndarray, " rows"]
    data: ClientData


class FederatedAlgorithm(NamedTuple):
    """Two functions of the state, and what a run needs to know of them.

    Attributes:
      init: params -> ServerState.
      round: (state, portions, key) -> (ServerState, RoundMetrics); the state is donated, `key` is the
        key of this round, portions are taken as they are needed.
      snapshot: ServerState -> the model that is evaluated and kept as the best.
      plan: (clients, hosts or None) -> blocks of a cohort, see `plan_blocks`.
      personal: every client keeps a model of its own, and nothing is sent.
      selects: clients train the experts that fit their budget.
      scoring: what scoring adds to a client's round.
      traffic: bytes that clients send and receive.
      summary: rounds done -> further entries of summary.json, e.g. the privacy spent.
      programs: the compiled functions by name: `tier K` for each tier, and those that open and end a round.
      arguments: shapes of a block's data [D * B, ...], without states -> shapes of the programs' arguments by
        name; a program that the algorithm does not use has none.
    """

    init: Callable[[Params], ServerState]
    round: Callable[[ServerState, Iterable[Portion], jax.Array], tuple[ServerState, RoundMetrics]]
    snapshot: Callable[[ServerState], Snapshot]
    plan: Callable[..., list[Block]]
    personal: bool
    selects: bool
    scoring: ScoringPasses
    traffic: Traffic
    summary: Callable[[int], dict[str, Any]]
    programs: dict[str, Callable]
    arguments: Callable[[ClientData], dict[str, tuple]]
