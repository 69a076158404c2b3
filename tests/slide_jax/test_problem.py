"""A problem as a pytree: names stay with their own problem, and neither compile anew nor stand in the way."""

import dataclasses

import jax
import numpy as np
from slide_strategies import random_problem

from slide_jax.problem import Labels


def problem_of(users=3, seed=0, names=None):
    problem = random_problem(np.random.default_rng(seed), users, 2, 2)
    labels = dataclasses.replace(problem.labels, users=names)
    return dataclasses.replace(problem, labels=labels)


def widened():
    """Returns a program of its own, with an empty cache, that doubles a problem's spectrum."""
    return jax.jit(lambda problem: dataclasses.replace(problem, bandwidth_hz=2 * problem.bandwidth_hz))


def test_no_problem_leaves_a_program_under_the_names_of_another():
    program, first, second = widened(), problem_of(names=("ann", "bob", "cem")), problem_of(seed=1)
    outcomes = [program(problem) for problem in (first, second)]
    assert [outcome.labels for outcome in outcomes] == [Labels(), Labels()]
    assert all(outcome.labels.users is None and outcome.labels.models == () for outcome in outcomes)
    assert outcomes[1].rate_model == second.rate_model
    for problem, outcome in zip((first, second), outcomes, strict=True):
        np.testing.assert_allclose(outcome.bandwidth_hz, 2 * problem.bandwidth_hz, rtol=1e-6)


def test_names_outlive_a_change_of_the_problem_itself():
    problem = problem_of(names=("ann", "bob", "cem"))
    changed = dataclasses.replace(problem, bandwidth_hz=np.float64(1.0))
    assert changed.labels.users == ("ann", "bob", "cem")


def test_other_names_do_not_compile_anew():
    program = widened()
    for names in (None, ("ann", "bob", "cem"), ("x", "y", "z")):
        program(problem_of(names=names))
    assert program._cache_size() == 1
    program(problem_of(users=4))
    assert program._cache_size() == 2


def test_structures_of_problems_of_other_names_and_numbers_are_one():
    ours, theirs = problem_of(names=("ann", "bob", "cem")), problem_of(users=5, seed=1)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert hash(jax.tree.structure(ours)) == hash(jax.tree.structure(theirs))
    shapes = jax.tree.map(lambda a, b: (np.shape(a)[:1], np.shape(b)[:1]), ours, theirs)
    assert shapes.users.deadline_s == ((3,), (5,)) and shapes.bandwidth_hz == ((), ())


def test_the_rate_model_compiles_anew():
    program, problem = widened(), problem_of()
    assert program(dataclasses.replace(problem, rate_model="shannon")).rate_model == "shannon"
    assert program(problem).rate_model == "linear"
    assert program._cache_size() == 2


def test_drops_are_stacked_whatever_they_are_called():
    drops = [problem_of(seed=seed, names=names) for seed, names in enumerate([None, ("ann", "bob", "cem")])]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *drops)
    assert stacked.users.deadline_s.shape == (2, 3) and stacked.num_users == 3
    np.testing.assert_array_equal(stacked.users.deadline_s[1], drops[1].users.deadline_s)
