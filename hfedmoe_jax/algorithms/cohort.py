"""A cohort's way through the compiled programs of its tiers.

Axes: C clients in all, M clients of a round's cohort, D devices along "clients", B clients of a block on a
device, L MoE layers, E experts.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Int

from hfedmoe_jax.aggregation import Upload
from hfedmoe_jax.aggregation.sums import MOST_TERMS
from hfedmoe_jax.algorithms.algorithm import Portion, Setting
from hfedmoe_jax.client import Broadcast, ClientUpdate, LocalRule, make_client
from hfedmoe_jax.experts import flat
from hfedmoe_jax.mesh import place_of
from hfedmoe_jax.models import Params
from hfedmoe_jax.optimizers import build_optimizer
from hfedmoe_jax.population import StateStore, collect, fetch_finished, put_members, unstack_members
from hfedmoe_jax.reports import ClientReport
from hfedmoe_jax.schedule import choose_tiers


class ClientReports(NamedTuple):
    """What the host reads of clients' rounds.

    Attributes:
      client: int, their numbers.
      upload, report: what they report.
      uploaded: bool [..., L, E], experts that they sent and the server counted.
    """

    client: Int[Array, "*members"]
    upload: Upload
    report: ClientReport
    uploaded: Bool[Array, "*members layers experts"]


def client_trains(setting: Setting, rule: LocalRule, most_tiers: int) -> dict[int, Callable]:
    """Returns `train` (see `make_client`) of each tier, of which there are at most `most_tiers`."""
    config, model = setting.config, setting.model
    optimizer = build_optimizer(config.client, config.client.optimizer, "client")
    tiers = [model.all_experts]
    if rule.score is not None:
        tiers = choose_tiers(setting.budget, most_tiers)
    place = place_of(setting.mesh, setting.chunk)
    return {
        tier: make_client(model, setting.task, optimizer, rule, config, tier, setting.table_rows, place)
        for tier in tiers
    }


def train_cohort(
    train: dict[int, Callable],
    portions: Iterable[Portion],
    sums: Any,
    settle: Callable[[Any], Any] | None,
    broadcast: Broadcast,
    store: StateStore,
    states: Any,
) -> tuple[Any, Any, ClientReports]:
    """Returns the sums, the clients' states and their reports, after a round of a cohort.

    Args:
      train: the program of each tier, (sums, broadcast, data, count) -> (sums, (reports, states of a block)).
      portions: the cohort's blocks; a client is in one of them at most.
      sums: open ones, consumed.
      settle: makes room in them, None where nothing is summed.
      broadcast: what every client receives.
      store, states: what is kept of every client [C, ...], consumed.

    Returns:
      Reports on the host, in the order of the cohort.
    """
    readable, terms = collect(store.mesh), 0
    blocks, outputs = [], []
    for block, clients, data in portions:
        size = block.members.shape[1]
        if settle is not None and terms + size > MOST_TERMS:
            sums, terms = settle(sums), 0
        terms += size
        data = data._replace(state=store.gather(states, clients))
        sums, (reports, after) = train[block.tier](
            sums, broadcast, data, put_members(store.mesh, block.count)
        )
        states = store.scatter(states, clients, after)
        blocks.append(block)
        outputs.append(readable(reports))
        fetch_finished(outputs)
    return sums, states, unstack_members(blocks, outputs, sum(int(block.count.sum()) for block in blocks))


def place_update(params: Params, update: ClientUpdate, table: str | None) -> Params:
    """Returns a model with a client's rows put in their places."""

    def experts(whole, rows):
        placed = flat(whole).at[update.trained.expert].set(rows[update.trained.row], mode="drop")
        return placed.reshape(whole.shape)

    shared = dict(update.params.shared)
    if update.token is not None:
        shared[table] = params.shared[table].at[update.token].set(shared[table], mode="drop")
    return Params(jax.tree.map(experts, params.experts, update.params.experts), update.params.router, shared)
