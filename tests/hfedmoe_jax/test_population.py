"""The population engine against Python loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_oracle import bits

from hfedmoe_jax import population as p
from hfedmoe_jax.aggregation.sums import Fixed, add_terms, fixed_zeros, from_fixed, merge_over_devices, settle
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.mesh import BY_CLIENT, REPLICATED, make_mesh
from hfedmoe_jax.schedule import BLOCK, NOBODY, plan_blocks

WIDTH = 4
ONE_DEVICE = make_mesh(jax.devices()[:1])


def visit(offset, member):
    value, weight = member
    return weight * (value + offset), jnp.sum(value)


def add(sums, offset, contributions):
    return add_terms(sums, contributions)


def members_of(size):
    rng = np.random.default_rng(size)
    return rng.standard_normal((size, WIDTH)).astype(np.float32), rng.random(size).astype(np.float32)


def members_at(population, members):
    """Returns a block's members; a place without one has weight zero, as in a round."""
    values, weights = p.stack_members(population, members)
    return values, weights * (members.reshape(-1) != NOBODY)


def run(program, population, chunk, tiers=None, mesh=ONE_DEVICE):
    """Streams a population through a program; returns the sum, the outputs and the blocks."""
    size = len(population[0])
    blocks = plan_blocks(np.zeros(size, int) if tiers is None else tiers, mesh, chunk)
    sums, outputs = no_sums(), []
    for block in blocks:
        data = p.put_members(mesh, members_at(population, block.members))
        sums, output = program(sums, jnp.float32(0.5), data, p.put_members(mesh, block.count))
        outputs.append(output)
        sums = p.put_members(mesh, settle(sums))
    return merge_over_devices(sums), p.unstack_members(blocks, outputs, size), blocks


def no_sums():
    return p.put_members(ONE_DEVICE, Fixed(*(part[None] for part in fixed_zeros((WIDTH,)))))


@pytest.fixture(scope="module")
def programs():
    """Streaming sums by chunk, compiled once."""
    return {chunk: p.stream(visit, add, ONE_DEVICE, chunk, REPLICATED, BY_CLIENT) for chunk in (1, 3, 24)}


@pytest.mark.parametrize("size", [1, 5, 16, 41])
def test_every_chunk_gives_the_same_sum_and_the_outputs_in_order(programs, size):
    values, weights = population = members_of(size)
    results = [run(program, population, chunk) for chunk, program in programs.items()]
    expected = np.sum(weights[:, None] * (values.astype(np.float64) + 0.5), axis=0)
    for total, outputs, _ in results:
        np.testing.assert_allclose(from_fixed(total), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs, values.astype(np.float64).sum(axis=1), rtol=1e-5, atol=1e-6)
        assert bits(total) == bits(results[0][0])


def test_tiers_do_not_change_a_sum_nor_the_order_of_outputs(programs):
    population = members_of(41)
    tiers = np.random.default_rng(0).integers(1, 4, 41)
    one, other = run(programs[1], population, 1), run(programs[1], population, 1, tiers)
    assert bits(one[:2]) == bits(other[:2])
    assert [block.tier for block in other[2]] == sorted((block.tier for block in other[2]), reverse=True)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_without_a_member_are_not_computed(programs, chunk):
    """What lies in the places beyond the last chunk of members is never looked at."""
    population = members_of(5)
    total, _, (block,) = run(programs[chunk], population, chunk)
    computed = -(-5 // chunk) * chunk
    values, weights = members_at(population, block.members)
    values[computed:], weights[computed:] = np.nan, np.nan
    sums, outputs = programs[chunk](no_sums(), jnp.float32(0.5), (values, weights), block.count)
    assert bits(merge_over_devices(sums)) == bits(total)
    np.testing.assert_array_equal(outputs[computed:], 0)


def test_one_program_of_one_size_serves_any_population(programs):
    """16 and 4,096 members: the same block, so the same program and the same memory."""
    before = programs[1]._cache_size()
    for size in (16, 4096):
        total, outputs, blocks = run(programs[1], population := members_of(size), 1)
        assert {block.members.shape for block in blocks} == {(1, BLOCK)}
        assert outputs.shape == (size,)
        exact = np.sum(population[1][:, None] * (population[0].astype(np.float64) + 0.5), axis=0)
        np.testing.assert_allclose(from_fixed(total), exact, rtol=1e-5)
    assert programs[1]._cache_size() == max(before, 1)
    shapes = (
        jax.ShapeDtypeStruct((BLOCK, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((BLOCK,), jnp.float32),
    )
    lowered = programs[1].lower(no_sums(), jnp.float32(0), shapes, jax.ShapeDtypeStruct((1,), jnp.int32))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 4 * WIDTH  # the sums are updated where they are


def test_members_are_mapped_without_sums():
    program = p.stream(lambda offset, x: ((), x**2 + offset), None, ONE_DEVICE, 2, REPLICATED)
    values = np.arange(21.0, dtype=np.float32)
    blocks = plan_blocks(np.zeros(21, int), ONE_DEVICE, 2)
    members = ((block, p.stack_members(values, block.members)) for block in blocks)
    outputs = p.map_members(program, ONE_DEVICE, jnp.float32(1), members)
    np.testing.assert_array_equal(outputs, values**2 + 1)


def test_experts_have_to_divide_the_devices():
    for experts in (0, 2):
        with pytest.raises(InputError, match=rf"mesh\.experts={experts}: does not divide the 1 devices"):
            make_mesh(jax.devices()[:1], experts)


def store_of(size):
    """Returns a store, and its states as a dictionary of arrays by member."""
    store = p.StateStore(ONE_DEVICE, size)
    state = {"a": jnp.arange(2.0), "b": jnp.int32(7)}
    return store, store.open(state), {member: state for member in range(size)}


@given(st.lists(st.lists(st.integers(0, 4), unique=True, max_size=4), max_size=4))
@settings(max_examples=20)
def test_a_store_is_a_dictionary_of_the_members_states(blocks):
    """Rounds of any members, in blocks of four; NOBODY in the places that are left."""
    store, states, expected = store_of(5)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(states)} == {8}  # one shape for most numbers of devices
    for number, members in enumerate(blocks):
        places = np.array(members + [NOBODY] * (4 - len(members)))
        rows = jax.tree.map(np.asarray, store.gather(states, places))
        for place, member in enumerate(members):
            found = jax.tree.map(lambda x, i=place: x[i], rows)
            chex.assert_trees_all_equal(found, jax.tree.map(np.asarray, expected[member]))
        fresh = jax.tree.map(lambda x, n=number: np.asarray(x + 100 * n + 1, x.dtype), rows)
        expected |= {m: jax.tree.map(lambda x, i=i: x[i], fresh) for i, m in enumerate(members)}
        states = store.scatter(states, places, p.put_members(ONE_DEVICE, fresh))
    for member, state in expected.items():
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x, m=member: np.asarray(x[m]), states), jax.tree.map(np.asarray, state)
        )


def test_a_store_of_nothing_is_nothing():
    store = p.StateStore(ONE_DEVICE, 5)
    assert store.open(()) == store.gather((), np.arange(4)) == store.scatter((), np.arange(4), ()) == ()
