"""The same bits however a round is computed, and what a program of a tier takes."""

import functools

import jax
import numpy as np
import pytest
from masked_oracle import bits
from test_algorithms import CALM, MODEL, build, cohort, step
from tiny import tiny_config, tiny_model, tiny_params

from hfedmoe_jax.algorithms import build_algorithm
from hfedmoe_jax.client import ClientData
from hfedmoe_jax.engines import Clients
from hfedmoe_jax.population import make_mesh, put_members, stack_members

BUDGETS = (1, 2, 3, 5, 6)  # of each client, five tiers at most
ROUNDS = 2
ACTIVE = {"fl__forward": "active", "importance__refresh": "previous"}


@functools.cache
def rounds(chunk: int, tiers: int, **fields):
    """Returns the state after each round as host arrays, and each round's metrics."""
    config, _, algorithm = build(chunk, BUDGETS, budget__tiers=tiers, **CALM, **fields)
    data = cohort(config, range(len(BUDGETS)))._replace(budget=np.int32(BUDGETS))
    state, results = algorithm.init(tiny_params(**MODEL)), []
    for number in range(ROUNDS):
        state, metrics = step(algorithm, state, data, jax.random.key(number))
        results.append((jax.tree.map(np.array, state), metrics))
    sizes = {name: program._cache_size() for name, program in algorithm.programs.items()}
    assert set(sizes.values()) == {1} and len(sizes) == tiers + 2  # a program a tier, and two more
    return results


@pytest.mark.parametrize(("tiers", "fields"), [(5, ()), (2, tuple(ACTIVE.items()))])
def test_tiers_do_not_change_a_bit(tiers, fields):
    """A program for each budget against one program for all."""
    one, many = rounds(1, 1, **dict(fields)), rounds(1, tiers, **dict(fields))
    assert bits(one) == bits(many)
    assert bits(one[0][0].params) != bits(one[1][0].params)


def test_clients_side_by_side_train_as_one_at_a_time():
    one, many = rounds(1, 1), rounds(3, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, many)


def test_a_round_from_a_copy_of_the_state_gives_the_same_bits():
    """As after a restart: the second round from host arrays."""
    (first, _), (last, last_metrics) = rounds(3, 1)
    config, _, algorithm = build(3, BUDGETS, budget__tiers=1, **CALM)
    data = cohort(config, range(len(BUDGETS)))._replace(budget=np.int32(BUDGETS))
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
def memory(num_clients: int, tier: int):
    """Returns the sizes of a compiled tier program and the shape of the blocks of a whole cohort."""
    config = tiny_config(**HEAVY)
    model = tiny_model(config)
    budgets = np.where(np.arange(num_clients) % 2, 4, 16).astype(np.int32)
    algorithm = build_algorithm(config, model, Clients(budgets, 10, 40), make_mesh(jax.devices()[:1]), 1)
    blocks = [block for block in algorithm.plan(np.arange(num_clients)) if block.tier == tier]
    assert sum(int(block.count.sum()) for block in blocks) == num_clients // 2
    fl, (block, *_) = config.fl, blocks
    everyone = ClientData(
        np.arange(num_clients, dtype=np.int32),
        np.zeros((num_clients, fl.local_steps, fl.batch_size, 8), np.int32),
        np.zeros((num_clients, fl.local_steps, fl.batch_size), np.int32),
        np.ones(num_clients, np.float32),
        budgets,
        np.ones(num_clients, bool),
    )
    mesh = make_mesh(jax.devices()[:1])
    portion = algorithm.portion(block, stack_members(everyone, block.members))
    params = jax.eval_shape(model.init, jax.random.key(0))
    sums = jax.eval_shape(algorithm.programs["open"])
    lowered = algorithm.programs[f"tier {tier}"].lower(
        sums, (params, jax.random.key(0)), portion.data, put_members(mesh, block.count)
    )
    return lowered.compile().memory_analysis(), {block.members.shape for block in blocks}


def test_memory_is_that_of_a_block_whatever_the_cohort():
    """16 and 4,096 clients a round."""
    (few, few_shapes), (many, many_shapes) = memory(16, 4), memory(4096, 4)
    assert few_shapes == many_shapes
    for name in ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes"):
        assert getattr(few, name) == getattr(many, name) > 0
    sums = sum(4 * 2 * leaf.size for leaf in jax.tree.leaves(tiny_params(**HEAVY)))
    assert few.alias_size_in_bytes >= sums  # the sums are added to where they are


def test_memory_falls_with_the_tier():
    """A client that runs a quarter of the experts: weights, optimizer state, activations, update."""
    (quarter, _), (full, _) = memory(16, 4), memory(16, 16)
    assert quarter.temp_size_in_bytes < 0.4 * full.temp_size_in_bytes
    assert quarter.argument_size_in_bytes == full.argument_size_in_bytes
