"""The same bits however a round is computed, and what a program of a tier takes."""

import functools

import chex
import jax
import numpy as np
import pytest
from masked_oracle import bits
from test_algorithms import MODEL, build, step
from tiny import tiny_algorithm, tiny_cohort, tiny_config, tiny_model, tiny_params

from hfedmoe_jax.algorithms import Portion
from hfedmoe_jax.client import Broadcast
from hfedmoe_jax.mesh import make_mesh
from hfedmoe_jax.population import IN_FLIGHT, put_members, stack_members

BUDGETS = (1, 2, 3, 5, 6)  # of each client
ROUNDS = 2
ACTIVE = {"fl__forward": "active", "importance__refresh": "previous"}


@functools.cache
def rounds(chunk: int, tiers: int, **fields):
    """Returns the state after each round as host arrays, and each round's metrics."""
    config, _, algorithm = build(chunk, BUDGETS, budget__tiers=tiers, **fields)
    data = tiny_cohort(config, range(len(BUDGETS)), BUDGETS)
    state, results = algorithm.init(tiny_params(**MODEL)), []
    for number in range(ROUNDS):
        state, metrics = step(algorithm, state, data, jax.random.key(number))
        results.append((jax.tree.map(np.array, state), metrics))
    sizes = {name: program._cache_size() for name, program in algorithm.programs.items()}
    del sizes["settle"]  # not needed by so few clients
    assert set(sizes.values()) == {1} and len(sizes) == tiers + 2  # a program a tier, and two more
    return results


@pytest.mark.parametrize(("tiers", "fields"), [(2, ()), (2, tuple(ACTIVE.items()))])
def test_tiers_do_not_change_a_bit(tiers, fields):
    """Several programs against one for all."""
    one, many = rounds(1, 1, **dict(fields)), rounds(1, tiers, **dict(fields))
    assert bits(one) == bits(many)
    assert bits(one[0][0].params) != bits(one[1][0].params)


def test_clients_side_by_side_train_as_one_at_a_time():
    one, many = rounds(1, 1), rounds(3, 1)
    chex.assert_trees_all_close(one, many, rtol=1e-5, atol=1e-5)


def test_a_round_from_a_copy_of_the_state_gives_the_same_bits():
    """As after a restart: the second round from host arrays."""
    (first, _), (last, last_metrics) = rounds(3, 1)
    config, _, algorithm = build(3, BUDGETS, budget__tiers=1)
    data = tiny_cohort(config, range(len(BUDGETS)), BUDGETS)
    fresh = algorithm.init(first.params)._replace(records=first.records)
    state, metrics = step(algorithm, fresh, data, jax.random.key(1))
    assert bits((state.params, state.records, metrics)) == bits((last.params, last.records, last_metrics))


HEAVY = {
    "fl__forward": "active",
    "importance__refresh": "round",
    "model__num_layers": 1,
    "model__num_experts": 16,
    "model__hidden": 256,
    "model__width": 16,
    "budget__tiers": 2,
}


@functools.cache
def lowered(num_clients: int, tier: int):
    """Returns a tier's program, not yet compiled, for the first block of a cohort of all clients."""
    config = tiny_config(**HEAVY, fl__clients=num_clients, fl__clients_per_round=num_clients)
    budgets = np.where(np.arange(num_clients) % 2, 4, 16).astype(np.int32)
    algorithm = tiny_algorithm(config, budgets, table_rows=40)
    blocks = [block for block in algorithm.plan(np.arange(num_clients)) if block.tier == tier]
    assert sum(int(block.count.sum()) for block in blocks) == num_clients // 2
    (shape,) = {block.members.shape for block in blocks}
    data = tiny_cohort(config, [0] * shape[1], [tier])
    params, _ = jax.eval_shape(tiny_model(config).init, jax.random.key(0))
    sums = jax.eval_shape(algorithm.programs["open"])
    broadcast = Broadcast(params, {}, (), jax.random.key(0))
    return algorithm.programs[f"tier {tier}"].lower(sums, broadcast, data, blocks[0].count)


@functools.cache
def memory(tier: int, num_clients: int = 16):
    return lowered(num_clients, tier).compile().memory_analysis()


@pytest.mark.slow
def test_memory_is_that_of_a_block_whatever_the_cohort():
    """The program of 4,096 clients a round takes what that of 16 takes; its sums are updated in place."""
    one, other = memory(4), memory(4, 4096)
    for part in ("argument", "output", "temp", "alias"):
        assert getattr(one, f"{part}_size_in_bytes") == getattr(other, f"{part}_size_in_bytes") > 0, part
    sums = sum(4 * 2 * leaf.size for leaf in jax.tree.leaves(tiny_params(**HEAVY)))
    assert memory(4).alias_size_in_bytes >= sums


@pytest.mark.slow
def test_memory_falls_with_the_tier():
    """A client that runs a quarter of the experts: weights, optimizer state, activations, update."""
    quarter, full = memory(4), memory(16)
    assert quarter.temp_size_in_bytes < 0.4 * full.temp_size_in_bytes
    assert quarter.argument_size_in_bytes == full.argument_size_in_bytes


COHORT = 480  # clients; thirty blocks on one device


@pytest.fixture(scope="module")
def crowd():
    """An algorithm for many clients, with what their rounds hold on the device and how often they wait."""
    budgets = tuple(np.resize(BUDGETS[:3], COHORT).tolist())
    config, _, algorithm = build(1, budgets, budget__tiers=3, fl__local_steps=1)
    state = algorithm.init(tiny_params(**MODEL))
    waits, held, mesh = [], [], make_mesh(jax.devices()[:1])

    def portions(blocks, data):
        for block in blocks:
            held.append(sum(x.nbytes for x in jax.live_arrays()))
            clients = block.members.reshape(-1)
            yield Portion(block, clients, put_members(mesh, stack_members(data, block.members)))

    def run(size):
        nonlocal state
        waits.clear(), held.clear()
        data = tiny_cohort(config, [0] * size, budgets)
        data = data._replace(client=np.arange(size, dtype=np.int32), budget=np.int32(budgets[:size]))
        blocks = algorithm.plan(np.arange(size))
        with pytest.MonkeyPatch.context() as patch:
            fetch = jax.device_get
            patch.setattr(jax, "device_get", lambda tree: waits.append(1) or fetch(tree))
            state, _ = algorithm.round(state, portions(blocks, data), jax.random.key(0))
        return len(blocks), len(waits), max(held)

    run(3)  # compiles
    return run


@pytest.mark.slow
def test_a_round_of_few_blocks_does_not_wait_for_the_devices(crowd):
    """Three tiers are three blocks at least; a longer round waits, so that its outputs do not gather."""
    assert crowd(6)[:2] == (3, 0)
    blocks, waits, _ = crowd(COHORT)
    assert blocks == 30 and waits == blocks - IN_FLIGHT


def test_what_lies_on_the_device_does_not_follow_the_cohort(crowd):
    assert crowd(COHORT)[2] == crowd(COHORT // 2)[2]
