"""Budget tiers against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_jax.tiers import choose_tiers, tier_of

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
