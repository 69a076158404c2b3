"""What becomes of left-over spectrum: feasible, never at someone's cost, and as early as can be."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import slide_oracles as oracles
from slide_strategies import CORNERS, RATE_MODELS, random_problem

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.leftover import LEFT_OVER
from slide_jax.verification import verify

USERS, MODELS, LAYERS = 5, 3, 4
families = pytest.mark.parametrize(
    ("corner", "rate_model"),
    [pair for pair in itertools.product(CORNERS, RATE_MODELS) if pair != ("shannon cap", "linear")],
)


@functools.cache
def problems_of(corner, rate_model, count=5):
    """Half of these have spectrum to spare for everybody, so that it is not the admission that binds."""
    problems = []
    for seed in range(count):
        problem = random_problem(np.random.default_rng(seed), USERS, MODELS, LAYERS, rate_model, corner)
        padding = ((0, 0), (0, LAYERS - problem.catalogue.layer_bits.shape[1]))
        catalogue = dataclasses.replace(
            problem.catalogue,
            layer_bits=np.pad(problem.catalogue.layer_bits, padding),
            layer_flop=np.pad(problem.catalogue.layer_flop, padding),
        )
        spectrum = problem.bandwidth_hz * (1 if seed % 2 else 10)
        problems.append(dataclasses.replace(problem, catalogue=catalogue, bandwidth_hz=spectrum))
    return problems


def least_by(problem, allocation, deadline_s):
    """The bandwidth that keeps an allocation's models and clocks and meets other deadlines, by bisection."""
    served = allocation.served
    clock = np.where(served, allocation.frequency_hz, problem.users.f_max_hz)
    users = dataclasses.replace(
        problem.users,
        deadline_s=np.minimum(problem.users.deadline_s, deadline_s),
        f_min_hz=clock,
        f_max_hz=clock,
        energy_j=np.full(USERS, np.inf),
        allowed=allocation.model[:, None] == np.arange(MODELS),
    )
    least = oracles.least_bandwidth(dataclasses.replace(problem, users=users)).min(axis=1)
    return np.where(served, least, 0.0)


@families
def test_policies_change_bandwidth_and_time_alone(corner, rate_model):
    for problem in problems_of(corner, rate_model):
        plain = exact(problem)
        for left_over in LEFT_OVER:
            answer = exact(problem, left_over=left_over)
            assert verify(problem, answer) == []
            for name in ("model", "frequency_hz", "energy_j", "reason", "upper_bound"):
                np.testing.assert_array_equal(getattr(answer, name), getattr(plain, name))
            assert np.all(answer.bandwidth_hz >= plain.bandwidth_hz)
            served = answer.served
            later = answer.latency_s[served] > plain.latency_s[served] * (1 + 1e-9)
            assert not later.any()


@families
def test_none_leaves_everyone_the_least(corner, rate_model):
    for problem in problems_of(corner, rate_model, 3):
        answer = exact(problem, left_over="none")
        least = least_by(problem, answer, np.inf)
        np.testing.assert_allclose(answer.bandwidth_hz, least, rtol=1e-7)
        bound = answer.bandwidth_hz > 0
        # Who has spectrum ends when the deadline does.
        np.testing.assert_allclose(answer.latency_s[bound], problem.users.deadline_s[bound], rtol=1e-9)


@families
def test_proportional_gives_all_of_it_in_proportion(corner, rate_model):
    for problem in problems_of(corner, rate_model):
        least = exact(problem).bandwidth_hz
        answer = exact(problem, left_over="proportional")
        if least.sum() > 0:
            np.testing.assert_allclose(answer.bandwidth_used_hz, problem.bandwidth_hz, rtol=2e-12)
            factor = problem.bandwidth_hz / least.sum()
            np.testing.assert_allclose(answer.bandwidth_hz, factor * least, rtol=1e-11)
        else:
            np.testing.assert_array_equal(answer.bandwidth_hz, 0)


@families
def test_min_max_ends_as_early_as_any_allocation_can(corner, rate_model):
    """No allocation to the same users, models and clocks ends sooner by a millionth: even the least
    bandwidths that do would not fit. Being late by more than that is seen too."""
    for problem in problems_of(corner, rate_model):
        answer = exact(problem, left_over="min_max")
        if answer.throughput == 0:
            continue
        end, start_s = np.nanmax(answer.latency_s), problem.users.start_s[answer.served]
        # Nobody who has nothing to do ends before the start.
        if end > start_s.max():
            sooner = least_by(problem, answer, end - 1e-6 * (end - start_s.min()))
            assert sooner.sum() > problem.bandwidth_hz
        for other in ("none", "proportional"):
            assert end <= np.nanmax(exact(problem, left_over=other).latency_s) * (1 + 1e-9)


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_min_max_wins_where_the_others_leave_time(rate_model):
    better = 0
    for problem in problems_of("none", rate_model, 8):
        ends = {left_over: exact(problem, left_over=left_over).latency_s for left_over in LEFT_OVER}
        if not np.all(np.isnan(ends["none"])):
            none, proportional, min_max = (np.nanmax(ends[name]) for name in LEFT_OVER)
            better += min_max < 0.99 * proportional < 0.99 * none
    assert better >= 2


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_random_moves_of_spectrum_never_end_sooner(rate_model):
    rng, feasible = np.random.default_rng(0), 0
    for problem in problems_of("none", rate_model, 4):
        answer = exact(problem, left_over="min_max")
        served = np.flatnonzero(answer.served)
        if served.size == 0:
            continue
        end = np.nanmax(answer.latency_s)
        for scale in (1e-4, 1e-2, 1.0):
            for _ in range(20):
                share = answer.bandwidth_hz[served] * np.exp(scale * rng.normal(size=served.size))
                share *= problem.bandwidth_hz / share.sum()
                ends = [
                    oracles.latency_s(problem, k, answer.model[k], b, answer.frequency_hz[k])
                    for k, b in zip(served, share, strict=True)
                ]
                if np.all(ends <= problem.users.deadline_s[served]):
                    feasible += 1
                    assert max(ends) >= end * (1 - 1e-9)
    assert feasible > 50


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_min_max_ends_sooner_with_more_spectrum(rate_model):
    for problem in problems_of("none", rate_model, 6):
        everyone = dataclasses.replace(problem, bandwidth_hz=10 * problem.bandwidth_hz)
        plain = exact(everyone)
        if plain.throughput == 0:
            continue
        ends = [
            np.nanmax(
                exact(
                    dataclasses.replace(problem, bandwidth_hz=np.float64(factor * plain.bandwidth_used_hz)),
                    left_over="min_max",
                ).latency_s
            )
            for factor in (1, 1.5, 3, 100)
        ]
        assert np.all(np.diff(ends) <= 1e-9)
        assert ends[-1] < ends[0]


@pytest.mark.parametrize("left_over", LEFT_OVER)
def test_exact_fit_leaves_nothing_to_share(left_over):
    for problem in problems_of("exact fit", "linear", 6):
        problem = dataclasses.replace(problem, bandwidth_hz=np.float64(exact(problem).bandwidth_used_hz))
        answer = exact(problem, left_over=left_over)
        np.testing.assert_allclose(answer.bandwidth_hz, exact(problem).bandwidth_hz, rtol=1e-9)


@pytest.mark.parametrize("left_over", LEFT_OVER)
def test_nobody_served_and_nothing_to_send(left_over):
    for corner in ("no feasible user", "no spectrum"):
        for problem in problems_of(corner, "linear"):
            for spectrum in (0.0, 1e9):
                answer = exact(dataclasses.replace(problem, bandwidth_hz=np.float64(spectrum)), left_over)
                assert np.all(answer.bandwidth_hz[~answer.served] == 0)
                assert np.all(np.isnan(answer.latency_s[~answer.served]))
                assert np.all(np.isfinite(answer.bandwidth_hz))
                assert np.all(np.isfinite(answer.latency_s[answer.served]))


@pytest.mark.parametrize("name", ["minmax", "", None, 3])
@pytest.mark.usefixtures("unchecked_types")
def test_an_unknown_policy_is_refused(name):
    with pytest.raises(InputError, match="left_over"):
        exact(problems_of("none", "linear")[0], left_over=name)


def test_policies_agree_in_either_precision():
    for problem in problems_of("none", "shannon", 3):
        for left_over in LEFT_OVER:
            answer = exact(problem, left_over=left_over)
            with jax.enable_x64(True):
                double = exact(problem, left_over=left_over)
            np.testing.assert_array_equal(answer.bandwidth_hz, double.bandwidth_hz)
