"""A problem computed with more users than it has gives the same answer, and a new number compiles nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from compilations import compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from own_process import QUICK_TO_COMPILE
from slide_strategies import RATE_MODELS, random_problem, with_layers

from slide_jax import SOLVERS, solve, solve_batch, verify
from slide_jax.baselines import download_then_infer
from slide_jax.buckets import FINE, LEAST, STEPS, add_users, bucket_of, compute_in_bucket
from slide_jax.float64 import compute_in_float64
from slide_jax.leftover import LEFT_OVER
from slide_jax.problem import REASONS
from slide_jax.relaxed import decide_relaxed_from
from slide_jax.solvers import sweep_solvers

PROGRAMS = [
    (solver, options)
    for solver in sweep_solvers()
    for options in (
        [{"left_over": rest} for rest in LEFT_OVER] if "left_over" in SOLVERS[solver].options else [{}]
    )
]


def drawn(seed, count, rate_model="linear", allowed=False):
    rng = np.random.default_rng(seed)
    problem = with_layers(random_problem(rng, count, 3, 4, rate_model, "none"), 4)
    if allowed:
        named = rng.random((count, 3)) < 0.6
        users = dataclasses.replace(problem.users, allowed=named, task=np.full(count, -1, np.int32))
        problem = dataclasses.replace(problem, users=users)
    return problem


@given(st.integers(1, 2**21))
def test_a_bucket_holds_its_users_and_adds_few(count):
    bucket = bucket_of(count)
    assert count <= bucket <= (count * (1 + 1 / STEPS) if count > FINE else max(LEAST, 2 * count))
    assert bucket_of(bucket) == bucket
    assert bucket_of(count) <= bucket_of(count + 1)


def test_an_octave_has_few_buckets():
    assert len({bucket_of(count) for count in range(1025, 2049)}) == STEPS


@pytest.mark.parametrize(("solver", "options"), PROGRAMS)
@settings(max_examples=4)
@given(
    seed=st.integers(0, 1000),
    count=st.sampled_from((7, 33, 700)),
    rate_model=st.sampled_from(RATE_MODELS),
    allowed=st.booleans(),
)
def test_added_users_change_no_bit(solver, options, seed, count, rate_model, allowed):
    problem, entry = drawn(seed, count, rate_model, allowed), SOLVERS[solver]
    posed = download_then_infer(problem) if entry.download_first else problem
    keys = (jax.random.key(seed),) if entry.needs_key else ()
    # With its relaxation, of which the answer shows little.
    decide, arrays = (decide_relaxed_from, (np.float64(0),)) if solver == "relaxed" else (entry.decide, keys)
    assert bucket_of(count) > count
    padded = compute_in_bucket(decide, posed, *arrays, **options)
    plain = compute_in_float64(decide, posed, *arrays, **options)
    for ours, theirs in zip(jax.tree.leaves(padded), jax.tree.leaves(plain), strict=True):
        if QUICK_TO_COMPILE:  # the flag lets XLA round sums of other lengths otherwise
            np.testing.assert_allclose(ours, theirs, rtol=1e-10)
        else:
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_nobody_is_added_who_could_be_served():
    for allowed in (False, True):
        problem = drawn(0, 5, allowed=allowed)
        users = add_users(problem.users, 4)
        found = solve_batch(dataclasses.replace(problem, users=users, bandwidth_hz=np.float64(1e30)))
        assert {REASONS[reason] for reason in np.asarray(found.reason)[5:]} == {"no admissible model"}


@pytest.mark.parametrize("solver", sweep_solvers())
def test_a_new_number_of_users_in_a_bucket_compiles_nothing(solver):
    catalogue = drawn(0, 1).catalogue
    for count in (35, 33, 36, 40, 39):
        problem = dataclasses.replace(drawn(count, count), catalogue=catalogue)
        before = compilations()
        allocation = solve(problem, solver)
        posed = download_then_infer(problem) if SOLVERS[solver].download_first else problem
        assert allocation.model.shape == (count,) and verify(posed, allocation) == []
        if count != 35:
            assert compilations() == before
