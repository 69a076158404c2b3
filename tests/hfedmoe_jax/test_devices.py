"""Budgets from profiles: exact at the edge of memory, and errors that say by how much."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hfedmoe_jax import devices as d
from hfedmoe_jax.cost import ModelCost
from hfedmoe_jax.errors import InputError

COST = ModelCost(
    all_experts=16,
    shared_parameter_bytes=1000,
    frozen_bytes=70,
    shared_training_bytes=5000,
    activation_bytes=1000,
    expert_parameter_bytes=100,
    expert_training_bytes=350,
    shared_flop=1e6,
    assignment_flop=10.0,
)


def profile(memory_bytes):
    return d.DeviceProfile("phone", memory_bytes, 1e9, 8e6, 16e6)


@given(st.integers(0, 20_000), st.sampled_from(["routed", "active"]))
def test_budget_is_the_most_experts_that_fit(spare, forward):
    memory = d.memory_needed(COST, 1, forward) + spare
    budget = d.expert_budget(profile(memory), COST, forward)
    assert 1 <= budget <= 16
    assert d.memory_needed(COST, budget, forward) <= memory
    assert budget == 16 or d.memory_needed(COST, budget + 1, forward) > memory


def test_the_routed_forward_holds_all_experts():
    assert d.memory_needed(COST, 3, "routed") == 70 + 5000 + 16 * 100 + 3 * 350
    assert d.memory_needed(COST, 3, "active") == 70 + 5000 + 3 * 450


def test_a_device_too_small_says_by_how_much():
    needed = d.memory_needed(COST, 1, "active")
    with pytest.raises(InputError, match=r"devices\.phone\.memory_bytes=.*too small by 51 bytes"):
        d.expert_budget(profile(needed - 51), COST, "active")
    with pytest.raises(InputError, match=r"fl\.forward=active"):
        d.expert_budget(profile(1), COST, "routed")


@pytest.mark.parametrize(("fraction", "budget"), [(1.0, 16), (0.25, 4), (0.5, 8), (1 / 16, 1), (0.3, 4)])
def test_fraction_budgets_round_down(fraction, budget):
    assert d.fraction_budget(fraction, 16) == budget


@pytest.mark.parametrize("fraction", [0.06, -0.5, 1.5, float("nan")])
def test_fractions_below_one_expert_or_outside_the_range_are_refused(fraction):
    with pytest.raises(InputError, match=r"budget\.fraction="):
        d.fraction_budget(fraction, 16)


def test_seconds_of_compute_and_of_transfers():
    counted = dict(assignments=100.0, trained_assignments=25.0)
    flop = 5 * (3 * 1e6 + (100 + 50) * 10)
    seconds = d.compute_seconds(profile(1e9), COST, 5, **counted, scoring=d.NO_SCORING)
    np.testing.assert_allclose(seconds, flop / 1e9)
    passes = d.ScoringPasses(5, shared=2, experts=3)
    seconds = d.compute_seconds(profile(1e9), COST, 5, **counted, scoring=passes)
    np.testing.assert_allclose(seconds, (flop + 5 * (2 * 1e6 + 3 * 100 * 10)) / 1e9)
    np.testing.assert_allclose(d.transfer_seconds(profile(1e9), 2600, 1300), 8 * 2600 / 16e6 + 8 * 1300 / 8e6)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 50))
def test_devices_are_assigned_by_share(shares, clients):
    classes = d.assign_devices(clients, shares, np.random.default_rng(0))
    assert len(classes) == clients
    exact = np.asarray(shares) / np.sum(shares) * clients
    counts = np.bincount(classes, minlength=len(shares))
    assert np.all(np.abs(counts - exact) < 1)


@pytest.mark.parametrize(
    ("field", "value"), [("memory_bytes", 0.0), ("flop_per_s", -1.0), ("uplink_bps", float("inf"))]
)
def test_impossible_profiles_are_refused(field, value):
    entry = dict(share=1.0, memory_bytes=1.0, flop_per_s=1.0, uplink_bps=1.0, downlink_bps=1.0)
    classes = ConfigDict({"watch": {**entry, field: value}})
    with pytest.raises(InputError, match=rf"devices\.watch\.{field}="):
        d.read_profiles(classes)
