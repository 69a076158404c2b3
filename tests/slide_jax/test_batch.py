"""`solve_batch` gives what `solve` gives, under every transformation, with derivatives that hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from slide_strategies import RATE_MODELS, problems, random_problem, with_layers

from slide_jax import SOLVERS, InputError, margins, sensitivities, solve, solve_batch, verify
from slide_jax.solvers import sweep_solvers

COLUMNS = ("model", "bandwidth_hz", "frequency_hz", "latency_s", "energy_j", "reason")


def drawn(seed=0, rate_model="linear", corner="none"):
    return with_layers(random_problem(np.random.default_rng(seed), 5, 3, 4, rate_model, corner), 4)


def stacked(several):
    return jax.tree.map(lambda *arrays: np.stack(arrays), *several)


def check_equal(ours, theirs):
    for name in COLUMNS:
        ours_of, theirs_of = np.asarray(getattr(ours, name)), getattr(theirs, name)
        np.testing.assert_allclose(ours_of, theirs_of, rtol=1e-9, err_msg=name)
        assert ours_of.dtype == theirs_of.dtype


@pytest.mark.parametrize("solver", sweep_solvers())
@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_a_jitted_batch_is_what_each_problem_gives(solver, rate_model):
    several = [drawn(seed, rate_model) for seed in range(4)]
    with jax.enable_x64(True):
        batch = jax.jit(lambda problem: solve_batch(problem, solver))(stacked(several))
        assert batch.solver == solver
        for d, problem in enumerate(several):
            one = jax.tree.map(lambda array: array[d], batch)  # noqa: B023
            if SOLVERS[solver].needs_key:
                assert np.asarray(one.served).sum() <= solve(problem).throughput
            else:
                check_equal(one, solve(problem, solver))


def test_drops_share_a_catalogue_and_a_spectrum():
    several = [dataclasses.replace(drawn(1), users=drawn(seed).users) for seed in range(3)]
    shared = dataclasses.replace(several[0], users=stacked([problem.users for problem in several]))
    for problem in (shared, dataclasses.replace(shared, bandwidth_hz=np.full(3, shared.bandwidth_hz))):
        batch = solve_batch(problem, left_over="proportional")
        for d in range(3):
            one = jax.tree.map(lambda array: array[d], batch)  # noqa: B023
            check_equal(one, solve(several[d], left_over="proportional"))


def test_vmap_over_users_alone_and_float32_outside():
    several = [drawn(seed) for seed in range(3)]
    users = stacked([problem.users for problem in several])
    with jax.enable_x64(True):
        batch = jax.vmap(lambda users: solve_batch(dataclasses.replace(several[0], users=users)))(users)
    for d in range(3):
        one = jax.tree.map(lambda array: array[d], batch)  # noqa: B023
        check_equal(one, solve(dataclasses.replace(several[0], users=several[d].users)))
    narrow = jax.tree.map(lambda x: np.float32(x) if x.dtype.kind == "f" else x, several[0])
    answer = solve_batch(narrow)  # promoted
    assert answer.bandwidth_hz.dtype == np.float64
    assert verify(narrow, answer) == []


@settings(max_examples=40)
@given(problems(users=(5,), models=(3,), layers=(4,)))
def test_the_hull_of_traced_layers_is_that_of_the_host(problem):
    problem = with_layers(problem, 4)
    with jax.enable_x64(True):
        check_equal(jax.jit(solve_batch)(problem), solve(problem))


@pytest.mark.parametrize("solver", ["exact", "proportional_share"])
@pytest.mark.parametrize("rate_model", RATE_MODELS)
@pytest.mark.parametrize("corner", ["none", "static power", "zero layers"])
def test_derivatives_are_those_of_differences(solver, rate_model, corner):
    problem = drawn(2, rate_model, corner)

    def total(problem):
        answer = solve_batch(problem, solver)
        return 1e-6 * jnp.sum(answer.bandwidth_hz) + jnp.sum(jnp.where(answer.served, answer.latency_s, 0.0))

    def shifted(deadline_s, layer_bits):
        users = dataclasses.replace(problem.users, deadline_s=deadline_s)
        catalogue = dataclasses.replace(problem.catalogue, layer_bits=layer_bits)
        return total(dataclasses.replace(problem, users=users, catalogue=catalogue))

    at = (jnp.asarray(problem.users.deadline_s), jnp.asarray(problem.catalogue.layer_bits))
    with jax.enable_x64(True):
        at = tuple(np.asarray(array) for array in (problem.users.deadline_s, problem.catalogue.layer_bits))
        value = jax.jit(shifted)
        for number, slope in enumerate(jax.jit(jax.grad(shifted, (0, 1)))(*at)):
            assert np.all(np.isfinite(slope))
            for index in np.ndindex(slope.shape):
                step = 1e-6 * max(at[number][index], 1e-3)
                moved = [tuple(np.array(array) for array in at) for _ in range(2)]
                moved[0][number][index] += step
                moved[1][number][index] -= step
                if number and at[number][index] == 0:
                    continue  # an end of the range
                difference = (value(*moved[0]) - value(*moved[1])) / (2 * step)
                np.testing.assert_allclose(slope[index], difference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "function",
    [
        solve,
        margins,
        *(lambda problem, name=name: SOLVERS[name].solve(problem) for name in SOLVERS),
        lambda problem: verify(problem, solve_batch(problem)),
        lambda problem: sensitivities(problem, solve_batch(problem)),
    ],
)
def test_what_needs_values_names_solve_batch(function):
    problem = drawn()
    with jax.enable_x64(True):
        for transformed, posed in ((jax.jit(function), problem), (jax.vmap(function), stacked([problem]))):
            with pytest.raises(InputError, match="inside jit, vmap and grad; call") as raised:
                transformed(posed)
            assert "\n" not in str(raised.value)


def test_mistakes_are_named():
    problem = drawn()
    with pytest.raises(InputError, match="float64 is not enabled; call"):
        jax.jit(solve_batch)(problem)
    with pytest.raises(InputError, match="solver='milp': unknown name"):
        solve_batch(problem, "milp")
    with pytest.raises(InputError, match="option of exact='leftover'"):
        solve_batch(problem, leftover="none")
    with pytest.raises(InputError, match="left_over='most': unknown name"):
        solve_batch(problem, left_over="most")
