"""Budgeted selection (15) against brute force over all subsets."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hfedmoe_jax.selection import select

SHAPES = st.sampled_from([(1, 1), (1, 4), (3, 3)])


@st.composite
def instances(draw):
    shape = draw(SHAPES)
    # Few distinct values, so that ties are common.
    score = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0])))
    eligible = draw(hnp.arrays(bool, shape))
    return score, eligible, draw(st.integers(0, shape[0] * shape[1] + 1))


def brute_force(score, eligible, budget):
    """Returns the best subset of the eligible; of equal ones, that of lowest indices."""
    candidates = np.flatnonzero(eligible)
    size = min(budget, len(candidates))
    flat = score.reshape(-1).astype(np.float64)
    # `combinations` is lexicographic and `max` keeps the first of equals.
    best = max(itertools.combinations(candidates, size), key=lambda subset: flat[list(subset)].sum())
    result = np.zeros(score.size, bool)
    result[list(best)] = True
    return result.reshape(score.shape)


@given(instances())
def test_selection_is_the_best_subset(instance):
    score, eligible, budget = instance
    np.testing.assert_array_equal(select(score, eligible, budget), brute_force(score, eligible, budget))


@given(instances(), st.floats(0.1, 10), st.floats(-3, 3))
def test_selection_depends_on_the_order_of_scores_alone(instance, scale, shift):
    score, eligible, budget = instance
    moved = (score.astype(np.float64) * scale + shift).astype(np.float32)
    np.testing.assert_array_equal(select(score, eligible, budget), select(moved, eligible, budget))


def test_unmeasured_scores_rank_last_but_are_eligible():
    score = np.float32([[np.nan, 1.0, -np.inf]])
    eligible = np.array([[True, True, True]])
    np.testing.assert_array_equal(select(score, eligible, 1), [[False, True, False]])
    np.testing.assert_array_equal(select(score, eligible, 3), [[True, True, True]])
    np.testing.assert_array_equal(select(score, ~eligible, 3), [[False, False, False]])
