"""Weighted users against every subset of them."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slide_oracles import least_bandwidth
from slide_strategies import CORNERS, random_problem

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.extensions import fractional_bound, weighted, weighted_greedy
from slide_jax.extensions.weighted import greedy_choice
from slide_jax.problem import RATE_MODELS
from slide_jax.verification import verify


def drawn(corner="none", rate_model="linear", seed=0, users=6):
    rng = np.random.default_rng([seed, CORNERS.index(corner)])
    return random_problem(rng, users, 2, 2, rate_model, corner)


def best_value(weights, needs, spectrum):
    best = 0.0
    for taken in itertools.product((False, True), repeat=len(needs)):
        taken = np.array(taken)
        if needs[taken].sum() <= spectrum * (1 + 1e-12):
            best = max(best, weights[taken].sum())
    return best


@pytest.mark.parametrize("rate_model", RATE_MODELS)
@pytest.mark.parametrize("corner", CORNERS)
def test_it_serves_the_best_of_all_subsets(corner, rate_model):
    problem = drawn(corner, rate_model)
    weights = np.random.default_rng(1).choice([0.0, 0.5, 1.0, 2.0, 7.25], problem.num_users)
    best = best_value(weights, least_bandwidth(problem).min(axis=1), problem.bandwidth_hz)
    result = weighted(problem, weights)
    assert verify(problem, result.allocation) == []
    assert result.value == pytest.approx(best, rel=1e-9)
    assert result.value == weights[result.allocation.served].sum()
    assert result.bound >= result.value and result.bound == pytest.approx(best, rel=1e-5)

    greedy = weighted_greedy(problem, weights)
    assert verify(problem, greedy.allocation) == []
    assert best / 2 <= greedy.value <= best * (1 + 1e-12)
    assert best <= greedy.bound * (1 + 1e-9) <= 2 * greedy.value * (1 + 1e-6)


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_the_bound_holds_to_the_last_digit_for_weights_of_any_size(rate_model):
    rng = np.random.default_rng(39)
    for seed in range(20):
        problem = drawn("none", rate_model, seed)
        weights = 10 ** rng.uniform(-6, 6, problem.num_users)
        best = best_value(weights, least_bandwidth(problem).min(axis=1), problem.bandwidth_hz)
        for result in (weighted(problem, weights), weighted_greedy(problem, weights)):
            assert best <= result.bound
            assert result.value <= best
            assert verify(problem, result.allocation) == []


def test_equal_weights_count_users():
    for seed in range(4):
        problem = drawn(seed=seed, users=7)
        ones = np.ones(problem.num_users)
        expected = exact(problem).throughput
        assert weighted(problem, ones).value == weighted_greedy(problem, ones).value == expected


def test_weights_change_who_is_served():
    problem = drawn("none", "linear", 2)
    needs = least_bandwidth(problem).min(axis=1)
    dearest = int(np.argmax(np.where(np.isfinite(needs), needs, -1)))
    problem = dataclasses.replace(problem, bandwidth_hz=np.float64(needs[dearest]))
    assert not exact(problem).served[dearest]
    weights = np.where(np.arange(problem.num_users) == dearest, 100.0, 1.0)
    assert weighted(problem, weights).allocation.served[dearest]
    assert weighted_greedy(problem, weights).allocation.served[dearest]


items = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([0.0, 1.0, 2.5, 3.0, 7.0, np.inf])), min_size=6, max_size=6
)


@given(items, st.sampled_from([0.0, 2.5, 6.0, 11.0]))
def test_greedy_and_fractional_bound_enclose_the_best(entries, spectrum):
    weights, needs = np.array(entries, float).T
    best = best_value(weights, needs, spectrum)
    with jax.enable_x64(True):
        bound = float(jax.jit(fractional_bound)(weights, needs, spectrum))
        served = np.asarray(jax.jit(greedy_choice)(weights, needs, spectrum))
    assert bound == pytest.approx(relaxed_value(weights, needs, spectrum), abs=1e-9)
    assert needs[served].sum() <= spectrum * (1 + 1e-12)
    assert best - 1e-9 <= bound <= 2 * weights[served].sum() + 1e-9
    assert weights[served].sum() <= best + 1e-9


def relaxed_value(weights, needs, spectrum):
    """Fills the spectrum user by user, the last one in part."""
    fitting = [(w, b) for w, b in zip(weights, needs, strict=True) if b <= spectrum]
    value, left = 0.0, spectrum
    for w, b in sorted(fitting, key=lambda item: -item[0] / item[1] if item[1] else -np.inf):
        part = 1.0 if b <= left else left / b
        value, left = value + part * w, left - part * b
    return value


@pytest.mark.parametrize("solver", [weighted, weighted_greedy])
@pytest.mark.parametrize(
    ("weights", "field"),
    [
        ([1.0, -1.0, 1.0], r"weights\[1\]"),
        ([1.0, 1.0, np.nan], r"weights\[2\]"),
        ([1.0, 1.0], "weights"),
        (["a", "b", "c"], "weights"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_weights_that_cannot_be_are_refused(solver, weights, field):
    with pytest.raises(InputError, match=field):
        solver(drawn(users=3), np.array(weights))
