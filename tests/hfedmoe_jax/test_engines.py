"""What an engine does between the blocks of a round; rounds of real clients are in test_algorithms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilations import compilations
from tiny import TOKENS, tiny_config, tiny_model

from hfedmoe_jax.aggregation import Upload, expert_rules, gating_rules
from hfedmoe_jax.bank import ExpertRows, flat
from hfedmoe_jax.client import OK, ClientData, ClientReport, ClientUpdate
from hfedmoe_jax.engines import SharedEngine, Weighing
from hfedmoe_jax.models import Params
from hfedmoe_jax.optimizers import per_expert
from hfedmoe_jax.population import make_mesh, plan_blocks, put_members, stack_members
from hfedmoe_jax.sums import MOST_TERMS

CLIENTS = 400
LAYERS, EXPERTS = 2, 3
TERM = 2.0**-16 - 2.0**-40
"""All ones in the lower part of an exact sum, which overflows with 128 of them that nothing carries."""


def train(params, client, key):
    """Returns an update in which every weight has grown by `LAYERS * TERM`."""
    grown = jax.tree.map(lambda x: x + jnp.float32(LAYERS * TERM), params)
    every = jnp.arange(LAYERS * EXPERTS, dtype=jnp.int32)
    ones = jnp.ones((LAYERS, EXPERTS))
    report = ClientReport(jnp.int32(OK), *[jnp.float32(0)] * (len(ClientReport._fields) - 1))
    return ClientUpdate(
        Params(flat(grown.experts), grown.router, grown.shared),
        ExpertRows(every, every, jnp.int32(LAYERS * EXPERTS)),
        None,
        Upload(ones, ones, ones > 0, client.size),
        report,
    )


def test_sums_of_more_clients_than_have_room_at_once_are_carried_in_time():
    config = tiny_config()
    model = tiny_model(config)
    mesh = make_mesh(jax.devices()[:1])
    weighing = Weighing(expert_rules["all"], gating_rules["mean"], config.aggregation, CLIENTS)
    engine = SharedEngine(model, mesh, 1, {1: train}, per_expert(optax.sgd(1.0)), weighing)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(model.init, jax.random.key(0)))
    state = SimpleNamespace(**dict(zip(("params", "optimizer"), engine.init(zeros), strict=True)))
    data = ClientData(
        np.arange(CLIENTS, dtype=np.int32),
        np.zeros((CLIENTS, 1, 1, TOKENS), np.int32),
        np.zeros((CLIENTS, 1, 1), np.int32),
        np.ones(CLIENTS, np.float32),
        np.ones(CLIENTS, np.int32),
        np.ones(CLIENTS, bool),
    )
    for number in range(2):
        compiled = compilations()
        begun = jax.tree.map(np.array, state.params)
        sums = engine.open(state)
        for block in plan_blocks(np.ones(CLIENTS, int), mesh, 1):
            members = put_members(mesh, stack_members(data, block.members))
            count = put_members(mesh, block.count)
            sums, _ = engine.run(1, sums, state, members, count, jax.random.key(0))
        state.params, state.optimizer = engine.finish(sums, state)
        for new, old in zip(*map(jax.tree.leaves, (state.params, begun)), strict=True):
            np.testing.assert_allclose(new, old + LAYERS * TERM, rtol=1e-6)
        if number:  # which began with the sums of the first, cleared
            assert compilations() == compiled
    assert MOST_TERMS < CLIENTS
