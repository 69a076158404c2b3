"""The knapsack for HiGHS against brute force and against `exact`."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slide_oracles import best_throughput, least_bandwidth
from slide_strategies import CORNERS, random_problem

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.milp import least_bandwidth_by_model, milp, pack
from slide_jax.problem import RATE_MODELS
from slide_jax.verification import verify


def drawn(corner="none", rate_model="linear", seed=0, users=5, models=3):
    rng = np.random.default_rng([seed, CORNERS.index(corner)])
    problem = random_problem(rng, users, models, 2, rate_model, corner)
    # Of one shape, for the sake of one compilation.
    catalogue = problem.catalogue
    bits, flop = (
        np.pad(table, ((0, 0), (0, 2 - table.shape[1])))
        for table in (catalogue.layer_bits, catalogue.layer_flop)
    )
    return dataclasses.replace(
        problem, catalogue=dataclasses.replace(catalogue, layer_bits=bits, layer_flop=flop)
    )


@pytest.mark.parametrize("rate_model", RATE_MODELS)
@pytest.mark.parametrize("corner", CORNERS)
def test_it_is_feasible_best_and_proven(corner, rate_model):
    for seed in range(2):
        problem = drawn(corner, rate_model, seed)
        allocation = milp(problem)
        assert verify(problem, allocation) == []
        assert allocation.throughput == allocation.upper_bound == best_throughput(problem)
        assert allocation.solver == "milp"


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_it_agrees_with_the_exact_optimum_of_more_users(rate_model):
    problem = drawn("none", rate_model, 5, users=80, models=5)
    optimum, found = exact(problem), milp(problem)
    assert 0 < optimum.throughput < 80
    assert verify(problem, found) == []
    assert found.throughput == found.upper_bound == optimum.throughput


@pytest.mark.parametrize("corner", CORNERS)
def test_pairs_need_what_bisection_of_the_recursion_finds(corner):
    for rate_model in RATE_MODELS:
        problem = drawn(corner, rate_model, 3)
        needs = least_bandwidth_by_model(problem)
        expected = least_bandwidth(problem)
        np.testing.assert_allclose(needs.bandwidth_hz.T, expected, rtol=1e-8)
        assert needs.bandwidth_hz.dtype == np.float64


choices = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.0, 3.5]), st.floats(0.0, 9.0)), max_size=7
)


@given(choices, st.sampled_from([0.0, 4.0, 9.5]))
def test_packing_is_the_best_of_all_subsets(entries, spectrum):
    entries = [entry for entry in entries if entry[2] <= spectrum]
    user, value, bandwidth = (np.array([entry[n] for entry in entries], float) for n in range(3))
    best = 0.0
    for taken in itertools.product((False, True), repeat=len(entries)):
        taken = np.array(taken, bool)
        if bandwidth[taken].sum() <= spectrum and len(set(user[taken])) == taken.sum():
            best = max(best, value[taken].sum())
    packing = pack(value, bandwidth, user.astype(int), spectrum)
    assert value[packing.chosen].sum() == pytest.approx(best)
    assert packing.bound == pytest.approx(best, rel=1e-5)
    assert bandwidth[packing.chosen].sum() <= spectrum * (1 + 1e-12)
    assert len(set(user[packing.chosen])) == packing.chosen.sum()


@pytest.mark.parametrize("short", [1e-5, 1e-7, 1e-9, 1e-11])
def test_what_just_does_not_fit_is_not_served(short):
    problem = drawn("none", "linear", 7, users=7)
    needs = np.sort(least_bandwidth_by_model(problem).bandwidth_hz.min(axis=0))
    needs = needs[np.isfinite(needs)]
    assert needs.size >= 4
    spectrum = np.float64(needs[:4].sum() * (1 - short))
    allocation = milp(dataclasses.replace(problem, bandwidth_hz=spectrum))
    assert allocation.throughput == 3 <= allocation.upper_bound
    assert allocation.bandwidth_used_hz <= spectrum * (1 + 1e-12)


def test_an_answer_out_of_time_is_feasible_and_bounded():
    problem = drawn("none", "linear", 8, users=120, models=6)
    allocation = milp(problem, time_limit_s=1e-6)
    assert verify(problem, allocation) == []
    assert allocation.throughput <= exact(problem).throughput <= allocation.upper_bound <= 120


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_time_limit_is_above_zero(limit):
    with pytest.raises(InputError, match="time_limit_s"):
        milp(drawn(), time_limit_s=limit)
