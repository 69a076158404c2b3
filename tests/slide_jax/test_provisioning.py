"""The least bandwidth against brute force and grids of clocks; why there is none, by lifting constraints."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import slide_oracles as oracles
from slide_strategies import CORNERS, RATE_MODELS, hull_of, random_problem, with_layers

from slide_jax import provisioning
from slide_jax.problem import REASONS, Users
from slide_jax.scenario import make_problem

USERS, MODELS, LAYERS = 5, 3, 4
SERVED, NOT_ADMISSIBLE, NO_MEMORY, NO_ENERGY, TOO_LATE, NO_SIGNAL, NO_RATE = range(7)
families = pytest.mark.parametrize(
    ("corner", "rate_model"),
    [pair for pair in itertools.product(CORNERS, RATE_MODELS) if pair != ("shannon cap", "linear")],
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


provision = jax.jit(provisioning.provision)


@functools.partial(jax.jit, static_argnums=5)
def outcome(hull, users, model, frequency_hz, bandwidth_hz, rate_model):
    return provisioning.outcome(hull, users, model, frequency_hz, bandwidth_hz, rate_model)


@functools.partial(jax.jit, static_argnums=5)
def bandwidth_by(deadline_s, hull, users, model, frequency_hz, rate_model):
    return provisioning.bandwidth_by(deadline_s, hull, users, model, frequency_hz, rate_model)


def need_of(problem):
    need = provision(hull_of(problem), problem)
    return jax.tree.map(np.asarray, need)


def problems_of(corner, rate_model, count, users=USERS):
    for seed in range(count):
        problem = random_problem(np.random.default_rng(seed), users, MODELS, LAYERS, rate_model, corner)
        yield with_layers(problem, LAYERS)


def with_users(problem, **columns):
    columns = {
        name: np.broadcast_to(column, (problem.num_users, *np.shape(column)[1:]))
        for name, column in columns.items()
    }
    return dataclasses.replace(problem, users=dataclasses.replace(problem.users, **columns))


# ------------------------------------------------------------------ against brute force


@families
def test_least_bandwidth_is_that_of_brute_force(corner, rate_model):
    finite = 0
    for problem in problems_of(corner, rate_model, 6):
        least, clocks = oracles.least_bandwidth(problem), oracles.best_clock(problem)
        need = need_of(problem)
        np.testing.assert_allclose(need.bandwidth_hz, least.min(axis=1), rtol=1e-7)
        for k in range(USERS):
            if np.isfinite(need.bandwidth_hz[k]):
                finite += 1
                i = need.model[k]
                np.testing.assert_allclose(least[k, i], least[k].min(), rtol=1e-7)
                np.testing.assert_allclose(need.frequency_hz[k], clocks[k, i], rtol=1e-6)
                assert need.reason[k] == SERVED
            else:
                assert need.model[k] == -1 and need.reason[k] != SERVED
    assert (finite == 0) == (corner == "no feasible user")


@pytest.mark.parametrize("corner", ["none", "static power", "clock limits", "zero layers"])
@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_no_model_and_no_clock_does_with_less(corner, rate_model):
    """Replays of the recursion over a grid of clocks: nothing is assumed about which clock is best."""
    tried = 0
    for problem in problems_of(corner, rate_model, 4):
        need = need_of(problem)
        for k, i in np.ndindex(USERS, MODELS):
            if not (oracles.is_admissible(problem, k, i) and oracles.fits_memory(problem, k, i)):
                continue
            f_min, f_max = problem.users.f_min_hz[k], problem.users.f_max_hz[k]
            less = 0.999 * need.bandwidth_hz[k] if np.isfinite(need.bandwidth_hz[k]) else 1e13
            for clock in np.linspace(max(f_min, 1e-3 * f_max), f_max, 40):
                if oracles.energy_j(problem, k, i, clock) <= problem.users.energy_j[k] and less > 0:
                    tried += 1
                    assert oracles.latency_s(problem, k, i, less, clock) > problem.users.deadline_s[k]
    assert tried > 100


# ------------------------------------------------------------------ why not


def reasons_by_brute_force(problem):
    """How far the model came that came furthest, constraint by constraint."""
    reachable = with_users(
        dataclasses.replace(problem, rate_model="linear"), spectral_efficiency_bps_hz=[1.0] * USERS
    )
    clocks, any_rate = oracles.best_clock(problem), oracles.least_bandwidth(reachable)
    least = oracles.least_bandwidth(problem)
    linear = problem.rate_model == "linear"
    signal = problem.users.spectral_efficiency_bps_hz if linear else problem.users.snr_hz

    def reason(k):
        stages = [NOT_ADMISSIBLE]
        for i in range(MODELS):
            if not oracles.is_admissible(problem, k, i):
                stages.append(NOT_ADMISSIBLE)
            elif not oracles.fits_memory(problem, k, i):
                stages.append(NO_MEMORY)
            elif np.isnan(clocks[k, i]):
                stages.append(NO_ENERGY)
            elif np.isinf(any_rate[k, i]):
                stages.append(TOO_LATE)
            elif np.isinf(least[k, i]):
                stages.append(NO_RATE if signal[k] > 0 else NO_SIGNAL)
            else:
                return SERVED
        return max(stages)

    return [reason(k) for k in range(USERS)]


LIFTED = {
    NO_MEMORY: {"memory_bits": [np.inf] * USERS},
    NO_ENERGY: {"energy_j": [np.inf] * USERS},
    TOO_LATE: {"deadline_s": [1e6] * USERS},
    NO_SIGNAL: {"spectral_efficiency_bps_hz": [10.0] * USERS, "snr_hz": [1e20] * USERS},
}
"""Columns that no longer bind, by the first reason that they stand behind."""


@families
def test_reasons_are_those_of_brute_force(corner, rate_model):
    for problem in problems_of(corner, rate_model, 8):
        assert need_of(problem).reason.tolist() == reasons_by_brute_force(problem)


def test_lifting_the_named_constraint_helps_and_lifting_a_later_one_does_not():
    seen = set()
    for corner, rate_model in itertools.product(CORNERS, RATE_MODELS):
        for problem in problems_of(corner, rate_model, 4):
            before = need_of(problem).reason
            seen |= set(before.tolist())
            for reason, columns in LIFTED.items():
                after = need_of(with_users(problem, **columns)).reason
                earlier = (before < reason) & (before != SERVED)
                named = (before == reason) | ((before == NO_RATE) & (reason == NO_SIGNAL))
                assert np.all((after[named] > reason) | (after[named] == SERVED))
                if reason == NO_SIGNAL:
                    assert np.all(after[named] == SERVED)
                np.testing.assert_array_equal(after[earlier], before[earlier])
                assert np.all(after[before == SERVED] == SERVED)
            everything = with_users(problem, allowed=np.ones((USERS, MODELS), bool))
            after = need_of(everything).reason
            assert np.all(after != NOT_ADMISSIBLE)
    assert seen == set(range(7))


# A device of 1e9 FLOP/s at its top clock, whose inference of 1e9 FLOP takes 1 s and 1 J there.
COLUMNS = dict(
    task=0,
    min_accuracy=0.5,
    deadline_s=4.0,
    start_s=1.0,
    energy_j=1.0,
    spectral_efficiency_bps_hz=2.0,
    snr_hz=1e7,
    f_min_hz=5e8,
    f_max_hz=1e9,
    flop_per_cycle=1.0,
    kappa_j_per_hz2_cycle=1e-27,
    static_power_w=0.0,
    memory_bits=1e7,
)


def model_of(accuracy=0.7, task="vision", bits=(1e6,), flop=(1e9,), name="model"):
    layers = [{"bits": b, "flop": w} for b, w in zip(bits, flop, strict=True)]
    return {"name": name, "task": task, "accuracy": accuracy, "layers": layers}


def need_for(*models, rate_model="linear", **columns):
    """Returns the need of one user."""
    models = [{**model, "name": f"m{i}"} for i, model in enumerate(models)]
    columns = {name: [value] for name, value in (COLUMNS | columns).items()}
    need = need_of(make_problem(models, Users(**columns), 1e6, rate_model, tasks=["vision", "language"]))
    return jax.tree.map(lambda column: column[0], need)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, SERVED),
        ({"min_accuracy": 0.71}, NOT_ADMISSIBLE),
        ({"min_accuracy": 0.7}, SERVED),
        ({"memory_bits": 1e6}, SERVED),
        ({"memory_bits": 1e6 - 1}, NO_MEMORY),
        ({"energy_j": 0.25}, SERVED),
        ({"energy_j": 0.24}, NO_ENERGY),
        ({"energy_j": 0.0}, NO_ENERGY),
        ({"deadline_s": 2.01}, SERVED),
        ({"deadline_s": 2.0}, TOO_LATE),
        ({"deadline_s": 1.0}, TOO_LATE),
        ({"deadline_s": 0.5}, TOO_LATE),
        ({"energy_j": 0.25, "deadline_s": 3.0}, TOO_LATE),
        ({"spectral_efficiency_bps_hz": 0.0}, NO_SIGNAL),
        ({"snr_hz": 0.0}, SERVED),
        ({"snr_hz": 0.0, "rate_model": "shannon"}, NO_SIGNAL),
        ({"snr_hz": 3e5, "rate_model": "shannon"}, NO_RATE),  # 5e5 bit/s asked, 3e5 / ln 2 at most
        ({"snr_hz": 4e5, "rate_model": "shannon"}, SERVED),
        ({"memory_bits": 0.0, "energy_j": 0.0, "deadline_s": 0.0}, NO_MEMORY),
        ({"energy_j": 0.0, "deadline_s": 0.0, "spectral_efficiency_bps_hz": 0.0}, NO_ENERGY),
        ({"deadline_s": 0.0, "spectral_efficiency_bps_hz": 0.0}, TOO_LATE),
    ],
)
def test_reasons_by_hand(columns, reason):
    need = need_for(model_of(), **columns)
    assert need.reason == reason, REASONS[need.reason]
    assert (need.model == -1) == (reason != SERVED) == np.isinf(need.bandwidth_hz)


def test_the_model_that_comes_furthest_names_the_reason():
    other_task, too_big = model_of(task="language"), model_of(bits=(1e8,))
    too_long = model_of(flop=(5e9,))
    for models in itertools.permutations([other_task, too_big]):
        assert need_for(*models).reason == NO_MEMORY
    for models in itertools.permutations([other_task, too_big, too_long]):
        assert need_for(*models).reason == NO_ENERGY
        assert need_for(*models, energy_j=np.inf).reason == TOO_LATE
    for models in itertools.permutations([other_task, too_big, model_of()]):
        need = need_for(*models)
        assert need.reason == SERVED
        assert models[need.model] == model_of()


def test_a_model_already_there_needs_no_signal():
    need = need_for(model_of(bits=(0.0,)), spectral_efficiency_bps_hz=0.0)
    assert (need.reason, need.bandwidth_hz) == (SERVED, 0.0)
    need = need_for(model_of(bits=(0.0,)), snr_hz=0.0, rate_model="shannon")
    assert (need.reason, need.bandwidth_hz) == (SERVED, 0.0)


# ------------------------------------------------------------------ ties


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_of_equal_rates_the_more_accurate_then_the_first(rate_model):
    for accuracies in itertools.product([0.6, 0.7, 0.8], repeat=3):
        need = need_for(*(model_of(accuracy=a) for a in accuracies), rate_model=rate_model)
        assert need.model == np.argmax(accuracies)


def test_accuracy_does_not_outweigh_rate():
    small, large = model_of(accuracy=0.6, bits=(9.9e5,)), model_of(accuracy=0.9, bits=(1e6,))
    assert need_for(small, large).model == 0
    assert need_for(large, small).model == 1


def test_equal_rates_of_different_models():
    """Both need 5e5 bit/s: 1e6 bits in 3 - 1 s and 1.25e6 bits in 3 - 0.5 s. Models of no bits need none."""
    long, short = model_of(accuracy=0.6), model_of(accuracy=0.7, bits=(1.25e6,), flop=(5e8,))
    assert need_for(long, short, energy_j=np.inf).model == 1
    assert need_for(short, long, energy_j=np.inf).model == 0
    need = need_for(long, short, energy_j=np.inf)
    np.testing.assert_allclose((need.bandwidth_hz, need.frequency_hz), (2.5e5, 1e9), rtol=1e-12)
    free = [model_of(accuracy=a, bits=(0.0,), flop=(w,)) for a, w in ((0.6, 1e8), (0.8, 2e8), (0.8, 1e8))]
    assert need_for(*free).model == 1


def test_the_clock_is_that_of_the_model_taken():
    """1 J carries 4e9 FLOP at half the clock only; the other model runs at the top."""
    slow, fast = model_of(flop=(4e9,)), model_of(bits=(2e7,))
    for deadline_s, model, clock in ((20.0, 0, 5e8), (8.9, 1, 1e9)):
        need = need_for(slow, fast, deadline_s=deadline_s, memory_bits=np.inf)
        assert need.model == model
        np.testing.assert_allclose(need.frequency_hz, clock, rtol=1e-12)


def test_named_models_replace_task_and_accuracy():
    models = [model_of(), model_of(task="language"), model_of(accuracy=0.1)]
    for names in itertools.product([False, True], repeat=3):
        need = need_for(*models, task=-1, allowed=list(names))
        expected = [i for i in range(3) if names[i]]
        # All need the same rate, and they stand in the order of their accuracy.
        assert need.model == (expected[0] if expected else -1)
        assert need.reason == (SERVED if expected else NOT_ADMISSIBLE)


# ------------------------------------------------------------------ latency, energy and bandwidth of a choice


@pytest.mark.parametrize("corner", ["none", "zero layers", "static power", "one layer"])
@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_outcome_is_the_replay(corner, rate_model):
    for seed, problem in enumerate(problems_of(corner, rate_model, 5)):
        rng = np.random.default_rng(seed)
        model = rng.integers(-1, MODELS, USERS).astype(np.int32)
        clock = rng.uniform(0.5, 1, USERS) * problem.users.f_max_hz
        bandwidth = 10 ** rng.uniform(4, 8, USERS)
        result = outcome(hull_of(problem), problem.users, model, clock, bandwidth, rate_model)
        for k, i in enumerate(model):
            taken = (result.latency_s[k], result.energy_j[k])
            if i < 0:
                assert np.all(np.isnan(taken))
                continue
            latency = oracles.latency_s(problem, k, i, bandwidth[k], clock[k])
            expected = (latency, oracles.energy_j(problem, k, i, clock[k]))
            np.testing.assert_allclose(taken, expected, rtol=1e-12)


def test_outcome_without_bandwidth():
    problem = make_problem(
        [model_of(), model_of(bits=(0.0,), name="there")],
        Users(**{name: [value] * 2 for name, value in COLUMNS.items()}),
        1e6,
    )
    model, clock = np.array([0, 1], np.int32), np.full(2, 1e9)
    for rate_model in RATE_MODELS:
        result = outcome(hull_of(problem), problem.users, model, clock, np.zeros(2), rate_model)
        np.testing.assert_array_equal(result.latency_s, [np.inf, 2.0])


@families
def test_bandwidth_by_the_deadline_is_the_need(corner, rate_model):
    for problem in problems_of(corner, rate_model, 4):
        need, users, hull = need_of(problem), problem.users, hull_of(problem)
        chosen = (hull, users, need.model, need.frequency_hz, rate_model)
        bandwidth = bandwidth_by(users.deadline_s, *chosen)
        np.testing.assert_allclose(bandwidth, need.bandwidth_hz, rtol=1e-12)
        # Half of the time costs more, and is kept where it can be.
        sooner = users.start_s + 0.5 * (users.deadline_s - users.start_s)
        more = np.asarray(bandwidth_by(sooner, *chosen))
        assert np.all((more >= bandwidth) | np.isinf(bandwidth))
        met = np.isfinite(more) & (more > 0)
        taken = outcome(hull, users, need.model, need.frequency_hz, np.where(met, more, 1.0), rate_model)
        np.testing.assert_allclose(taken.latency_s[met], sooner[met], rtol=1e-8)
