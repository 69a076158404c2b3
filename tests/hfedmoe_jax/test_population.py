"""The population engine against Python loops."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from masked_oracle import bits

from hfedmoe_jax import population as p
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelCost
from hfedmoe_jax.sums import Fixed, add_terms, fixed_zeros, from_fixed, merge_over_devices, settle

WIDTH = 4
ONE_DEVICE = p.make_mesh(jax.devices()[:1])


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
    return values, weights * (members.reshape(-1) != p.NOBODY)


def run(program, population, chunk, tiers=None, mesh=ONE_DEVICE):
    """Streams a population through a program; returns the sum, the outputs and the blocks."""
    size = len(population[0])
    blocks = p.plan_blocks(np.zeros(size, int) if tiers is None else tiers, mesh, chunk)
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
    return {chunk: p.stream(visit, add, ONE_DEVICE, chunk, p.EVERYWHERE, p.BY_CLIENT) for chunk in (1, 3, 24)}


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
        assert {block.members.shape for block in blocks} == {(1, p.BLOCK)}
        assert outputs.shape == (size,)
        exact = np.sum(population[1][:, None] * (population[0].astype(np.float64) + 0.5), axis=0)
        np.testing.assert_allclose(from_fixed(total), exact, rtol=1e-5)
    assert programs[1]._cache_size() == max(before, 1)
    shapes = (
        jax.ShapeDtypeStruct((p.BLOCK, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((p.BLOCK,), jnp.float32),
    )
    lowered = programs[1].lower(no_sums(), jnp.float32(0), shapes, jax.ShapeDtypeStruct((1,), jnp.int32))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 4 * WIDTH  # the sums are updated where they are


def test_members_are_mapped_without_sums():
    mapped = p.map_members(lambda offset, x: ((), x**2 + offset), ONE_DEVICE, 2, p.EVERYWHERE)
    values = np.arange(21.0, dtype=np.float32)
    blocks = p.plan_blocks(np.zeros(21, int), ONE_DEVICE, 2)
    outputs = mapped(jnp.float32(1), ((block, p.stack_members(values, block.members)) for block in blocks))
    np.testing.assert_array_equal(outputs, values**2 + 1)


def mesh_of(processes):
    """A stand-in for a mesh with one device along "clients" for each process named."""
    devices = [[SimpleNamespace(process_index=index)] for index in processes]
    return SimpleNamespace(devices=np.array(devices, dtype=object))


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=60),
    st.sampled_from([(0,), (0, 0, 0), (0, 0, 1, 1), (0, 1, 2)]),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_every_member_has_one_place_in_a_block_of_its_tier(tiers, processes, chunk, random, by_host):
    tiers, mesh = np.array(tiers), mesh_of(processes)
    hosts = np.array([random.choice(processes) for _ in tiers])
    blocks = p.plan_blocks(tiers, mesh, chunk, hosts if by_host else None)
    size = p.block_size(chunk)
    assert size % chunk == 0 and size >= p.BLOCK
    seen = []
    for block in blocks:
        assert block.members.shape == (len(processes), size)
        for device, (row, count) in enumerate(zip(block.members, block.count, strict=True)):
            assert (row[:count] != p.NOBODY).all() and (row[count:] == p.NOBODY).all()
            assert set(tiers[row[:count]].tolist()) <= {block.tier}
            if by_host:
                assert set(hosts[row[:count]].tolist()) <= {processes[device]}
            seen += row[:count].tolist()
        assert block.count.sum() > 0
    assert sorted(seen) == list(range(len(tiers)))
    assert [block.tier for block in blocks] == sorted((block.tier for block in blocks), reverse=True)
    if not by_host and len(set(processes)) == 1:  # dealt out evenly
        on_device = sum(block.count for block in blocks)
        assert on_device.max() - on_device.min() <= 1


def test_empty_places_are_those_of_chunks_that_run():
    """Five members on two devices: chunks of two and one on the first, of two on the second."""
    blocks = p.plan_blocks(np.zeros(5, int), mesh_of((0, 0)), 2)
    assert p.empty_places(blocks, 2) == pytest.approx(1 / 6)
    assert p.empty_places(blocks, 1) == 0


def test_experts_have_to_divide_the_devices():
    for experts in (0, 2):
        with pytest.raises(InputError, match=rf"mesh\.experts={experts}: does not divide the 1 devices"):
            p.make_mesh(jax.devices()[:1], experts)


@pytest.mark.parametrize(
    ("platform", "limit", "chunk"),
    [("cpu", None, 1), ("gpu", 2**20, 1), ("gpu", 2**24, 8), ("tpu", 2**40, 64), ("gpu", None, 64)],
)
def test_the_chunk_fills_half_of_the_memory(platform, limit, chunk):
    """A client takes 1 MiB here; 16 GiB where a backend does not say."""
    cost = ModelCost(8, 0, 2**19, 2**15, 2**15, 0.0, 0.0)
    stats = None if limit is None else {"bytes_limit": limit}
    device = SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    mesh = SimpleNamespace(local_devices=[device], shape={"clients": 1, "experts": 1})
    assert p.chunk_size(0, cost, mesh) == chunk
    assert p.chunk_size(3, cost, mesh) == (1 if platform == "cpu" else 3)
