"""Tiers, blocks and chunks: which clients run where, and together; tiers against brute force."""

import itertools
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from hfedmoe_jax import schedule as s
from hfedmoe_jax.cost import ModelCost
from hfedmoe_jax.schedule import choose_tiers, tier_of

budgets_strategy = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(np.array)


def unused(budgets, tiers):
    """Room that clients leave, each in the smallest tier that holds it; None if one fits nowhere."""
    rooms = [min((tier for tier in tiers if tier >= budget), default=None) for budget in budgets]
    return None if None in rooms else sum(rooms) - sum(budgets.tolist())


@given(budgets_strategy, st.integers(1, 5))
def test_no_other_tiers_leave_less_room(budgets, most):
    tiers = choose_tiers(budgets, most)
    assert tiers == sorted(set(tiers)) and len(tiers) <= most
    assert set(tiers) <= set(budgets.tolist()) and tiers[-1] == budgets.max()
    distinct = np.unique(budgets).tolist()
    choices = (choice for count in range(1, most + 1) for choice in itertools.combinations(distinct, count))
    rooms = (unused(budgets, choice) for choice in choices)
    assert unused(budgets, tiers) == min(room for room in rooms if room is not None)


@given(budgets_strategy, st.integers(1, 5))
def test_a_client_runs_in_the_smallest_tier_that_holds_its_budget(budgets, most):
    tiers = choose_tiers(budgets, most)
    expected = [min(tier for tier in tiers if tier >= budget) for budget in budgets]
    np.testing.assert_array_equal(tier_of(budgets, tiers), expected)


@pytest.mark.parametrize(("most", "tiers"), [(1, [8]), (2, [2, 8]), (3, [2, 6, 8]), (9, [1, 2, 6, 8])])
def test_tiers_follow_the_clients(most, tiers):
    budgets = np.array([1, 2, 2, 2, 2, 6, 6, 8, 8])
    assert choose_tiers(budgets, most) == tiers


def mesh_of(processes):
    """A stand-in for a mesh with one device along "clients" for each process named."""
    devices = [[SimpleNamespace(process_index=index)] for index in processes]
    return Mock(spec=Mesh, devices=np.array(devices, dtype=object))


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
    blocks = s.plan_blocks(tiers, mesh, chunk, hosts if by_host else None)
    size = s.block_size(chunk)
    assert size % chunk == 0 and size >= s.BLOCK
    seen = []
    for block in blocks:
        assert block.members.shape == (len(processes), size)
        for device, (row, count) in enumerate(zip(block.members, block.count, strict=True)):
            assert (row[:count] != s.NOBODY).all() and (row[count:] == s.NOBODY).all()
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
    blocks = s.plan_blocks(np.zeros(5, int), mesh_of((0, 0)), 2)
    assert s.empty_places(blocks, 2) == pytest.approx(1 / 6)
    assert s.empty_places(blocks, 1) == 0


@pytest.mark.parametrize(
    ("platform", "limit", "members", "chunk"),
    [
        ("cpu", None, 200, 1), ("gpu", 2**20, 200, 1), ("gpu", 2**24, 200, 8), ("tpu", 2**40, 200, 64),
        ("gpu", None, 200, 64), ("tpu", 2**40, 10, 8), ("tpu", 2**40, 2, 1), ("tpu", 2**40, 128, 64),
    ],
)  # fmt: skip
def test_the_chunk_fills_half_of_the_memory(platform, limit, members, chunk):
    """A client takes 1 MiB here; 16 GiB where a backend does not say. Two devices share the cohort."""
    cost = ModelCost(8, 0, 0, 2**19, 2**18, 2**15, 2**15, 0.0, 0.0)
    stats = None if limit is None else {"bytes_limit": limit}
    device = SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    mesh = Mock(spec=Mesh, local_devices=[device], shape={"clients": 2, "experts": 1})
    assert s.chunk_size(0, cost, mesh, members) == chunk
    assert s.chunk_size(3, cost, mesh, members) == (1 if platform == "cpu" else 3)


def test_the_chunk_of_a_device_that_cannot_be_asked_follows_the_memory_given():
    cost = ModelCost(8, 0, 0, 2**19, 2**18, 2**15, 2**15, 0.0, 0.0)
    mesh = Mock(
        spec=Mesh, local_devices=[SimpleNamespace(platform="tpu")], shape={"clients": 1, "experts": 1}
    )
    assert s.chunk_size(0, cost, mesh, 200, memory_bytes=2**24) == 8
