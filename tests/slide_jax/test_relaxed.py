"""The relaxed problem: optimality conditions, feasible rounding, proofs, warm starts, derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_oracles import best_throughput
from slide_strategies import CORNERS, problems, random_problem

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.float64 import _jitted, to_float64
from slide_jax.hull import convex_hull
from slide_jax.relaxed import TAU, certificate, decide_relaxed, relax, relaxed, relaxed_from, rounded
from slide_jax.verification import verify

SPECTRUM_HZ = 1e7

rounded, certificate = jax.jit(rounded), jax.jit(certificate)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_needs(seed, users=30, spread=1.0):
    """Returns least bandwidths of users of whom the spectrum holds a part, a few of them hopeless."""
    rng = np.random.default_rng(seed)
    needs = SPECTRUM_HZ * rng.lognormal(0, spread, users) * rng.uniform(0.5, 5) / users
    needs[rng.random(users) < 0.1] = np.inf
    needs[rng.random(users) < 0.05] = 0.0
    return needs


def slope(fraction):
    return (1 - TAU * fraction) / (1 - TAU / 2)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_relaxation_meets_the_conditions_that_make_a_concave_program_optimal(seed, spread):
    needs = random_needs(seed, spread=spread)
    fraction, _, price, _ = map(np.asarray, relax(needs, SPECTRUM_HZ))
    reachable = needs <= SPECTRUM_HZ
    assert (fraction[~reachable] == 0).all()
    z, cost = fraction[reachable], price * needs[reachable]
    assert (z >= 0).all() and (z <= 1).all()
    assert z @ needs[reachable] <= SPECTRUM_HZ * (1 + 1e-9)
    assert price == 0 or z @ needs[reachable] == pytest.approx(SPECTRUM_HZ, rel=1e-9)
    assert (slope(z)[z > 0] >= cost[z > 0] * (1 - 1e-9)).all()
    assert (slope(z)[z < 1] <= cost[z < 1] * (1 + 1e-9)).all()


def test_fractions_are_those_of_a_projected_gradient_over_shares():
    needs = random_needs(1)
    part = np.where(needs <= SPECTRUM_HZ, needs, 0.0) / SPECTRUM_HZ
    reachable = needs <= SPECTRUM_HZ

    def project(fraction, _):
        upper = jnp.where(reachable, 1.0, 0.0)
        inside = jnp.clip(fraction, 0, upper)
        weights = jnp.maximum(part, 1e-6)
        section = jaxopt.projection.projection_box_section(fraction, (jnp.zeros(30), upper, weights, 1.0))
        return jnp.where(jnp.sum(part * inside) <= 1, inside, section)

    descent = jaxopt.ProjectedGradient(lambda z: -jnp.sum(z - TAU / 2 * z**2), project, maxiter=200)
    descended = descent.run(jnp.full(30, 0.1)).params
    np.testing.assert_allclose(descended, relax(needs, SPECTRUM_HZ).fraction, atol=2e-2)


@settings(max_examples=20)
@given(problems(users=(5,), models=(3,), layers=(4,)))
def test_answer_is_feasible_optimal_and_proven_so(problem):
    answer = relaxed(problem)
    assert verify(problem, answer) == []
    assert answer.throughput == best_throughput(problem) == answer.upper_bound


@pytest.mark.parametrize("rate_model", ["linear", "shannon"])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_equals_the_exact_optimum_of_larger_problems(seed, rate_model):
    problem = random_problem(np.random.default_rng(seed), 100, 3, 4, rate_model)
    answer, best = relaxed(problem), exact(problem)
    np.testing.assert_array_equal(answer.model, best.model)
    np.testing.assert_array_equal(answer.reason, best.reason)
    assert answer.upper_bound == best.throughput
    _, relaxation = relaxed_from(problem, None)
    assert best.throughput <= relaxation.served <= best.throughput + 1 + 0.1 * best.throughput


def test_exact_fit_of_many_equal_users_is_a_fit():
    needs = np.full(3000, 0.1)
    fraction = relax(needs, 0.1 * 1000).fraction
    assert int(rounded(fraction, needs, 0.1 * 1000).sum()) == 1000
    assert certificate(np.arange(3000) < 1000, needs, 0.1 * 1000) == 1000


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_any_fractions_round_to_users_who_fit_and_any_users_give_a_valid_bound(seed):
    needs, rng = random_needs(seed), np.random.default_rng(seed)
    served = np.asarray(rounded(rng.choice([0.3, 1.0], 30), needs, SPECTRUM_HZ))
    assert needs[served].sum() <= SPECTRUM_HZ * (1 + 1e-11)
    left_out = needs[~served]
    assert (left_out > SPECTRUM_HZ - needs[served].sum()).all()
    most = int((np.cumsum(np.sort(needs)) <= SPECTRUM_HZ).sum())
    anyone = rng.random(30) < 0.5
    assert certificate(anyone, needs, SPECTRUM_HZ) >= most
    assert certificate(served, needs, SPECTRUM_HZ) >= most


def test_warm_start_gives_the_same_answer_in_fewer_evaluations():
    cold_steps, warm_steps = 0, 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, 200, 3, 4)
        efficiency = problem.users.spectral_efficiency_bps_hz * np.exp(0.01 * rng.normal(size=200))
        users = dataclasses.replace(problem.users, spectral_efficiency_bps_hz=efficiency)
        changed = dataclasses.replace(problem, users=users)
        _, start = relaxed_from(problem, None)
        cold, cold_relaxation = relaxed_from(changed, None)
        warm, warm_relaxation = relaxed_from(changed, start)
        np.testing.assert_array_equal(warm.model, cold.model)
        np.testing.assert_allclose(warm_relaxation.fraction, cold_relaxation.fraction, atol=1e-9)
        cold_steps += int(cold_relaxation.steps)
        warm_steps += int(warm_relaxation.steps)
    assert warm_steps < cold_steps


@pytest.mark.parametrize("start", [1e-30, 1e30, np.inf])
def test_no_start_is_too_bad(start):
    needs = random_needs(3)
    np.testing.assert_allclose(
        relax(needs, SPECTRUM_HZ, start).fraction, relax(needs, SPECTRUM_HZ).fraction, atol=1e-9
    )


def test_derivatives_are_those_of_the_value():
    needs = random_needs(5)
    reachable = needs < SPECTRUM_HZ
    relaxation = relax(needs, SPECTRUM_HZ)
    assert relaxation.price_per_hz > 0
    by_needs, by_spectrum = jax.grad(lambda *x: relax(*x).served, (0, 1))(needs, SPECTRUM_HZ)
    assert by_spectrum == pytest.approx(float(relaxation.price_per_hz), rel=1e-9)
    np.testing.assert_allclose(by_needs, -relaxation.price_per_hz * relaxation.fraction, rtol=1e-9)
    step = 1e-6 * SPECTRUM_HZ
    for change, expected in [
        (lambda x: relax(needs, SPECTRUM_HZ + x).served, by_spectrum),
        (lambda x: relax(np.where(reachable, needs + x, needs), SPECTRUM_HZ).served, by_needs.sum()),
    ]:
        difference = (change(step) - change(-step)) / (2 * step)
        assert difference == pytest.approx(float(expected), rel=1e-5)


def test_fractions_themselves_can_be_differentiated():
    needs, weights = random_needs(6), np.random.default_rng(0).normal(size=30)

    def weighted(spectrum_hz):
        return weights @ relax(needs, spectrum_hz).fraction

    derivative, step = jax.grad(weighted)(SPECTRUM_HZ), 1.0
    difference = (weighted(SPECTRUM_HZ + step) - weighted(SPECTRUM_HZ - step)) / (2 * step)
    assert derivative != 0
    assert derivative == pytest.approx(float(difference), rel=1e-5)


@jax.jit
def solve_batch(hull, problem, spectra):
    def solve(spectrum_hz):
        answer = decide_relaxed(hull, dataclasses.replace(problem, bandwidth_hz=spectrum_hz))
        return answer.model, answer.upper_bound

    return jax.vmap(solve)(spectra)


@pytest.mark.parametrize("corner", CORNERS)
def test_drops_in_a_batch_are_solved_as_one_by_one_and_without_nan(corner):
    problem = to_float64(random_problem(np.random.default_rng(0), 5, 3, 4, "linear", corner))
    hull = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
    spectra = np.array([0.3, 1.0, 3.0]) * problem.bandwidth_hz

    models, bounds = solve_batch(hull, problem, spectra)
    for model, bound, spectrum in zip(models, bounds, spectra, strict=True):
        alone = exact(dataclasses.replace(problem, bandwidth_hz=spectrum))
        np.testing.assert_array_equal(model, alone.model)
        assert bound == alone.throughput


def test_corners_of_the_relaxation():
    everyone = relax(np.array([0.0, 1.0, np.inf]), 2.0)
    np.testing.assert_array_equal(everyone.fraction, [1, 1, 0])
    assert everyone.price_per_hz == 0 and everyone.served == 2
    nothing = relax(np.array([0.0, 1.0]), 0.0)
    np.testing.assert_array_equal(nothing.fraction, [1, 0])
    slopes = jax.grad(lambda *x: relax(*x).served, (0, 1))(np.array([0.0, 1.0, np.inf]), 0.0)
    assert all(np.isfinite(part).all() for part in slopes)


def test_same_shapes_compile_once():
    problem = random_problem(np.random.default_rng(0), 7, 3, 4)
    other = dataclasses.replace(problem, bandwidth_hz=problem.bandwidth_hz / 2)
    _, start = relaxed_from(problem, None)
    before = _jitted._cache_size()
    relaxed_from(other, start)
    assert _jitted._cache_size() == before


def test_left_over_spectrum_is_shared_out_and_unknown_policies_are_refused():
    problem = random_problem(np.random.default_rng(0), 5, 3, 4)
    answer = relaxed(problem, "proportional")
    assert answer.bandwidth_used_hz == pytest.approx(float(problem.bandwidth_hz))
    assert verify(problem, answer) == []
    with pytest.raises(InputError, match="left_over='proportionate': unknown name; did you mean"):
        relaxed(problem, "proportionate")
