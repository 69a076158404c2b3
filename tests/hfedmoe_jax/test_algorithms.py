"""A whole round, every algorithm, against a loop over clients that keeps every model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_oracle import bits, whole
from tiny import (
    VOCABULARY,
    run_round,
    tiny_algorithm,
    tiny_cohort,
    tiny_config,
    tiny_frozen,
    tiny_model,
    tiny_params,
)

from hfedmoe_jax.algorithms import (
    COMPOSITIONS,
    Composition,
    Portion,
    algorithms,
    compose,
    parts_of,
)
from hfedmoe_jax.client import Broadcast, LocalRule, make_client
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.mesh import make_mesh
from hfedmoe_jax.models import tree_bytes
from hfedmoe_jax.optimizers import build_optimizer
from hfedmoe_jax.population import put_members, stack_members
from hfedmoe_jax.reports import DROPPED_OUT, NONFINITE, OK, OVER_BUDGET
from hfedmoe_jax.schedule import NOBODY
from hfedmoe_jax.tasks import classification

CLIENTS = 5
BUDGETS = np.int32([2 + c % 3 for c in range(CLIENTS)])
KEY = jax.random.key(7)
# One program for all budgets; test_reproducible has several.
MODEL = {"model__num_layers": 1, "model__num_experts": 6}  # one layer: less to compile
# With Adam's default epsilon, weights without any gradient follow the sign of rounding errors.
FIELDS = {"budget__tiers": 1, "client__epsilon": 1e-2} | MODEL


def cohort(config, members=(0, 2, 3), available=None):
    return tiny_cohort(config, members, BUDGETS, available)


@functools.cache
def build(chunk=1, budgets=tuple(BUDGETS), **fields):
    config = tiny_config(**(FIELDS | fields))
    return config, tiny_model(config), tiny_algorithm(config, budgets, chunk=chunk)


def step(algorithm, state, data, key=KEY):
    """Runs a round of a cohort."""
    return run_round(algorithm, state, data, key)


def run(algorithm, params, data, key=KEY):
    return step(algorithm, algorithm.init(jax.tree.map(jnp.copy, params)), data, key)


@functools.cache
def alone(name: str):
    """Returns the client function of an algorithm, compiled once."""
    config, model, _ = build(fl__algorithm=name)
    rule = LocalRule(None) if name == "local" else compose(config).rule
    optimizer = build_optimizer(config.client, config.client.optimizer, "client")
    train = make_client(model, classification, optimizer, rule, config, int(BUDGETS.max()), VOCABULARY)
    return jax.jit(lambda params, data: train(Broadcast(params, {}, (), KEY), data))


def one_by_one(name, params, data):
    """Returns every client's update, trained alone; parameters of full size."""
    members = (jax.tree.map(lambda x, i=i: x[i], data) for i in range(len(data.client)))
    updates = [alone(name)(params, member) for member in members]
    return [update._replace(params=whole(update, params)) for update in updates]


def weighted(values, weights):
    """Weighted mean over a list in float64, and the sum of the weights."""
    total = sum(weights)
    return sum(w * np.asarray(v, np.float64) for v, w in zip(values, weights, strict=True)) / total


@pytest.mark.parametrize("name", ["hfedmoe", "fedavg"])
def test_a_round_is_the_naive_aggregation_of_the_clients(name):
    config, model, algorithm = build(fl__algorithm=name)
    params = tiny_params(**MODEL)
    data = cohort(config)
    updates = one_by_one(name, params, data)
    state, metrics = run(algorithm, params, data)
    sizes = data.size.astype(np.float64)
    sparse = parts_of(config).expert_rule == "dominant"
    dominant = [np.asarray(u.upload.trained) & (np.asarray(u.upload.usage) >= 0.02) for u in updates]

    check = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)

    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params.shared):
        leaves = [dict(jax.tree_util.tree_leaves_with_path(u.params.shared))[path] for u in updates]
        check(leaf, weighted(leaves, sizes))
    alpha = sizes
    if sparse:
        alpha = [
            float(np.sum(np.where(d, np.asarray(u.upload.usage) * np.asarray(u.upload.importance), 0)))
            for d, u in zip(dominant, updates, strict=True)
        ]
    for index, leaf in enumerate(jax.tree.leaves(state.params.router)):
        check(leaf, weighted([jax.tree.leaves(u.params.router)[index] for u in updates], alpha))
    for index, leaf in enumerate(jax.tree.leaves(state.params.experts)):
        for layer, expert in np.ndindex(model.num_layers, model.num_experts):
            holders = [c for c in range(len(updates)) if not sparse or dominant[c][layer, expert]]
            values = [jax.tree.leaves(updates[c].params.experts)[index][layer, expert] for c in holders]
            old = jax.tree.leaves(params.experts)[index][layer, expert]
            if holders:
                check(leaf[layer, expert], weighted(values, sizes[holders]))
            else:
                np.testing.assert_array_equal(leaf[layer, expert], old)
    np.testing.assert_array_equal(metrics.report.status, OK)


def test_the_order_of_a_cohort_does_not_matter():
    config, model, algorithm = build(fl__algorithm="hfedmoe")
    params = tiny_params(**MODEL)
    one, metrics = run(algorithm, params, cohort(config, (0, 2, 3)))
    other, moved = run(algorithm, params, cohort(config, (3, 0, 2)))
    assert bits(one) == bits(other)
    assert bits(jax.tree.map(lambda x: x[[2, 0, 1]], metrics)) == bits(moved)


def test_one_client_alone_gets_its_own_model_back():
    """All but the experts that it trained and hardly uses: their usage is below tau."""
    config, model, algorithm = build(fl__algorithm="hfedmoe")
    params = tiny_params(**MODEL)
    data = cohort(config, (2,))
    (update,) = one_by_one("hfedmoe", params, data)
    state, metrics = run(algorithm, params, data)
    sent = metrics.uploaded[0][..., None, None]
    experts = jax.tree.map(lambda new, old: np.where(sent, new, old), update.params.experts, params.experts)
    expected = update.params._replace(experts=experts)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)


def test_a_failing_client_changes_nothing():
    config, model, algorithm = build(fl__algorithm="hfedmoe")
    params = tiny_params(**MODEL)
    without, _ = run(algorithm, params, cohort(config, (0, 3)))
    with_dropout, metrics = run(algorithm, params, cohort(config, (0, 2, 3), available=[True, False, True]))
    assert metrics.report.status.tolist() == [OK, DROPPED_OUT, OK]
    chex.assert_trees_all_equal(with_dropout, without)


def test_a_round_without_any_update_leaves_everything():
    config, model, algorithm = build(fl__algorithm="fedadam")
    params = tiny_params(**MODEL)
    state, metrics = run(algorithm, params, cohort(config, available=[False] * 3))
    assert set(metrics.report.status.tolist()) == {DROPPED_OUT}
    assert bits(state) == bits(algorithm.init(tiny_params(**MODEL)))


def test_a_loss_that_is_not_finite_loses_its_client_alone():
    config, model, algorithm = build(fl__algorithm="hfedmoe")
    start = tiny_params(**MODEL)
    # A word that only client 2 uses has an embedding whose variance overflows; the others never read it.
    params = start._replace(shared={**start.shared, "embed": start.shared["embed"].at[49].set(1e20)})
    data = cohort(config)
    tokens = np.where(data.batch["tokens"] == 49, 48, data.batch["tokens"])
    calm = data._replace(batch=data.batch | {"tokens": tokens.copy()})
    tokens[1, 0, 0, 0] = 49
    state, metrics = run(algorithm, params, data._replace(batch=data.batch | {"tokens": tokens}))
    assert metrics.report.status.tolist() == [OK, NONFINITE, OK]
    without, _ = run(algorithm, params, calm._replace(available=np.array([True, False, True])))
    chex.assert_trees_all_equal(state, without)


def test_clients_over_budget_fail_and_the_others_are_averaged():
    everything = 6
    config, model, algorithm = build(
        fl__algorithm="fedavg_dropout", budgets=(everything, everything, 1, everything, 1)
    )
    params = tiny_params(**MODEL)
    data = cohort(config)._replace(budget=np.int32([everything, 1, everything]))
    mixed, metrics = run(algorithm, params, data)
    assert metrics.report.status.tolist() == [OK, OVER_BUDGET, OK]
    kept = jax.tree.map(lambda x: x[[0, 2]], data)
    alone, _ = run(algorithm, tiny_params(**MODEL), kept)
    assert bits(mixed.params) == bits(alone.params)
    # The one that failed is remembered with the union it failed for.
    assert mixed.records.rounds_measured[2] == 1 and mixed.records.union_total[2] > 1
    assert np.isnan(mixed.records.usage[2]).all()


def test_places_without_a_member_leave_no_trace():
    """Three members: a chunk of two has one place too many, whatever lies in it."""
    config, model, algorithm = build(chunk=2)
    data = cohort(config)
    (block,) = algorithm.plan(data.client)
    empty = block.members.reshape(-1) == NOBODY
    assert empty.sum() == len(empty) - 3
    placed = stack_members(data, block.members)
    heavy = np.where(empty, 1e6, placed.size).astype(np.float32)
    clients = np.where(empty, NOBODY, data.client[np.maximum(block.members.reshape(-1), 0)])
    mesh = make_mesh(jax.devices()[:1])

    def round_of(filled):
        portion = Portion(block, clients, put_members(mesh, filled._replace(available=~empty)))
        return algorithm.round(algorithm.init(tiny_params(**MODEL)), [portion], KEY)

    results = [round_of(placed), round_of(placed._replace(size=heavy))]
    assert bits(results[0]) == bits(results[1])
    expected = run(build(fl__algorithm="hfedmoe")[2], tiny_params(**MODEL), data)
    chex.assert_trees_all_close(results[0], expected, rtol=1e-5, atol=1e-5)


def test_literal_gating_shrinks_the_router():
    """(20)-(21) as printed: the weights u * s / |S| are far below one."""
    norms = {}
    for literal in (False, True):
        config, model, algorithm = build(aggregation__literal_gating=literal)
        params = tiny_params(**MODEL)
        state, _ = run(algorithm, params, cohort(config))
        norms[literal] = float(jnp.linalg.norm(jax.tree.leaves(state.params.router)[0]))
    assert norms[True] < 0.5 * norms[False]


def test_untrained_experts_are_left_alone_by_server_momentum():
    config, model, algorithm = build(
        server__optimizer="adam", server__learning_rate=0.1, aggregation__tau=0.0
    )
    params = tiny_params(**MODEL)
    state = algorithm.init(jax.tree.map(jnp.copy, params))
    for number in range(3):
        before = jax.tree.map(np.asarray, state.params.experts)
        state, metrics = step(algorithm, state, cohort(config, (number,)), jax.random.key(number))
        uploaded = np.asarray(metrics.uploaded)[0]
        assert 0 < uploaded.sum() < uploaded.size
        for new, old in zip(*map(jax.tree.leaves, (state.params.experts, before)), strict=True):
            changed = np.any(np.asarray(new) != old, axis=(-1, -2))
            np.testing.assert_array_equal(changed, uploaded)


def test_local_keeps_a_model_a_client():
    config, model, algorithm = build(fl__algorithm="local")
    params = tiny_params(**MODEL)
    data = cohort(config, (0, 3))
    updates = one_by_one("local", params, data)
    state, _ = run(algorithm, params, data)
    for client, update in zip((0, 3), updates, strict=True):
        mine = jax.tree.map(lambda x, c=client: x[c], state.params)
        chex.assert_trees_all_close(mine, update.params, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.records.times_trained[client], update.upload.trained)
    for client in (1, 2, 4):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, c=client: x[c], state.params), params)


def test_local_runs_every_budget_in_one_program():
    config, _, algorithm = build(fl__algorithm="local", fl__score="random", budget__tiers=3)
    assert len(set(BUDGETS.tolist())) == 3
    assert [block.tier for block in algorithm.plan(np.arange(CLIENTS))] == [BUDGETS.max()]


def test_the_server_remembers_its_clients():
    config, model, algorithm = build(fl__algorithm="hfedmoe")
    state = algorithm.init(tiny_params(**MODEL))
    state, first = step(algorithm, state, cohort(config, (1, 4)), jax.random.key(1))
    state, second = step(algorithm, state, cohort(config, (4, 2)), jax.random.key(2))
    assert np.asarray(state.records.rounds_measured).tolist() == [0, 1, 1, 0, 2]
    assert np.isnan(np.asarray(state.records.usage)).all(axis=(1, 2)).tolist() == [
        True,
        False,
        False,
        True,
        False,
    ]
    trained = np.asarray(state.records.times_trained)
    np.testing.assert_array_equal(trained[4], first.uploaded[1].astype(int) + second.uploaded[0].astype(int))
    assert trained[[0, 3]].sum() == 0


# One of each kind of program: the others differ by a score or an optimizer, tested where those are.
@pytest.mark.parametrize("name", ["hfedmoe", "fedavg", "fedprox", "fedadam", "local"])
def test_algorithms_learn(name):
    """After a few rounds on the same batches the loss is lower, with the algorithm's default settings."""
    config, model, algorithm = build(fl__algorithm=name)
    state = algorithm.init(tiny_params(**MODEL))
    losses = []
    for number in range(6):
        state, metrics = step(algorithm, state, cohort(config), jax.random.key(number))
        losses.append(float(np.mean(metrics.report.loss)))
    assert losses[-1] < losses[0] - 0.02


def test_frozen_parameters_are_nobodys():
    """The trunk of the encoder: it computes, and is neither in the state nor in what clients send."""
    fields = {"model__train": "experts_router_head"} | MODEL
    config, model, algorithm = build(**fields)
    frozen, everything = tiny_frozen(**fields), tiny_params(**MODEL)
    before, start = bits(frozen), tiny_params(**fields)
    assert set(start.shared) == {"head"} and tree_bytes(frozen) > tree_bytes(start.shared)
    assert tree_bytes(start) + tree_bytes(frozen) == tree_bytes(everything)
    state, metrics = run(algorithm, start, cohort(config))
    chex.assert_trees_all_equal_structs(state.params, start)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, start)), strict=True))
    assert bits(frozen) == before
    _, _, whole_model = build()
    sent, client = np.array([2]), np.array([1])
    spared = whole_model.traffic.up(sent, client) - algorithm.traffic.up(sent, client)
    assert spared.tolist() == [tree_bytes(frozen)]


def test_a_client_sends_routers_the_shared_part_and_its_experts():
    config, model, algorithm = build()
    params, one = tiny_params(**MODEL), 4 * 2 * 8 * 6  # an expert: two matrices of 8 x 6 numbers
    rest = 4 * sum(leaf.size for leaf in jax.tree.leaves((params.router, params.shared)))
    sent, clients = np.array([0, 3]), np.array([2, 0])
    assert algorithm.traffic.up(sent, clients).tolist() == [rest, rest + 3 * one]
    assert algorithm.traffic.down(np.zeros(2, int), clients).tolist() == [tree_bytes(params)] * 2
    _, _, local = build(fl__algorithm="local")
    assert all(travels(sent, clients).tolist() == [0, 0] for travels in local.traffic)


def test_parts_named_in_the_config_replace_those_of_the_algorithm():
    config = tiny_config(fl__score="frequency", fl__gating_rule="mean", server__optimizer="adam")
    assert parts_of(config) == Composition("frequency", "dominant", "mean", "adam")
    assert parts_of(tiny_config()) == COMPOSITIONS["hfedmoe"]
    assert parts_of(tiny_config(fl__algorithm="local", fl__base="fedprox")) == COMPOSITIONS["fedprox"]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"fl\.algorithm='hfedmo': unknown name; did you mean 'hfedmoe'\?"):
        algorithms["hfedmo"]
    with pytest.raises(InputError, match=r"fl\.base='fedprx': unknown name; did you mean 'fedprox'\?"):
        parts_of(tiny_config(fl__algorithm="local", fl__base="fedprx"))
    with pytest.raises(InputError, match=r"fl\.base='local': is no composition"):
        parts_of(tiny_config(fl__algorithm="local", fl__base="local"))
