"""A problem computed with more users than it has gives the same answer, and a new number compiles nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from compilations import compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_strategies import RATE_MODELS, random_problem, with_layers

from slide_jax import SOLVERS, solve, solve_batch, verify
from slide_jax.buckets import LEAST, MOST, STEPS, add_users, bucket_of
from slide_jax.problem import REASONS
from slide_jax.solvers import sweep_solvers


def drawn(seed, count, rate_model="linear", allowed=False):
    rng = np.random.default_rng(seed)
    problem = with_layers(random_problem(rng, count, 3, 4, rate_model, "none"), 4)
    if allowed:
        named = rng.random((count, 3)) < 0.6
        users = dataclasses.replace(problem.users, allowed=named, task=np.full(count, -1, np.int32))
        problem = dataclasses.replace(problem, users=users)
    return problem


@given(st.integers(1, 3 * MOST))
def test_a_bucket_holds_its_users_and_adds_few(count):
    bucket = bucket_of(count)
    assert count <= bucket <= max(LEAST, count * (1 + 1 / STEPS))
    assert bucket_of(bucket) == bucket
    assert bucket_of(count) <= bucket_of(count + 1)


def test_an_octave_has_few_buckets():
    assert len({bucket_of(count) for count in range(1025, 2049)}) == STEPS


@pytest.mark.parametrize("solver", sweep_solvers())
@pytest.mark.parametrize("rate_model", RATE_MODELS)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000), count=st.integers(1, 40), allowed=st.booleans())
def test_added_users_change_no_decision(solver, rate_model, seed, count, allowed):
    problem = drawn(seed, count, rate_model, allowed)
    ours, plain = solve(problem, solver), solve_batch(problem, solver)
    for name in ("model", "reason"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name), err_msg=name)
    for name in ("bandwidth_hz", "frequency_hz", "latency_s", "energy_j"):
        np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), rtol=1e-12, err_msg=name)
        assert getattr(ours, name).shape == (count,)


def test_nobody_is_added_who_could_be_served():
    for allowed in (False, True):
        problem = drawn(0, 5, allowed=allowed)
        users = add_users(problem.users, 4)
        found = solve_batch(dataclasses.replace(problem, users=users, bandwidth_hz=np.float64(1e30)))
        assert {REASONS[reason] for reason in np.asarray(found.reason)[5:]} == {"no admissible model"}


@pytest.mark.parametrize("solver", sweep_solvers())
def test_a_new_number_of_users_in_a_bucket_compiles_nothing(solver):
    first, *others = (drawn(seed, count) for seed, count in enumerate((17, 18, 17)))
    problem = dataclasses.replace(first, catalogue=others[0].catalogue)
    solve(problem, solver)
    before = compilations()
    for other in others:
        problem = dataclasses.replace(other, catalogue=first.catalogue)
        allocation = solve(problem, solver)
        if not SOLVERS[solver].download_first:
            assert not verify(problem, allocation)
    jax.block_until_ready(())
    assert compilations() == before
