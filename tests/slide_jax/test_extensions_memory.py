"""Streaming memory against a replay in time and brute-force admission."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slide_oracles import best_clock, best_throughput, is_admissible, least_bandwidth, rate_bps
from slide_strategies import CORNERS, random_problem

from slide_jax.exact import exact
from slide_jax.extensions import peak_memory, streaming_memory
from slide_jax.problem import RATE_MODELS, REASONS
from slide_jax.verification import verify


def drawn(corner, rate_model, seed, room):
    """Returns a problem whose memories are about `room` times a model's size."""
    rng = np.random.default_rng([seed, CORNERS.index(corner)])
    problem = random_problem(rng, 5, 2, 3, rate_model, corner)
    size = problem.catalogue.layer_bits.sum(axis=1).mean()
    return with_memory(problem, size * room * rng.uniform(0.5, 1.5, problem.num_users))


def with_memory(problem, memory_bits, **columns):
    users = dataclasses.replace(problem.users, memory_bits=memory_bits, **columns)
    return dataclasses.replace(problem, users=users)


def buffer_peak(bits, flop, rate, speed):
    """Looks at the buffer just before every event and at a thousand times between."""
    arrival, done, arrivals, completions = 0.0, 0.0, [], []
    for s, w in zip(bits, flop, strict=True):
        arrival += s / rate if s else 0.0
        done = max(arrival, done) + w / speed
        arrivals.append(arrival)
        completions.append(done)
    peak = 0.0
    for time in [*arrivals, *completions, *np.linspace(0, done, 1000)]:
        received = min(rate * time, sum(bits))
        freed = sum(s for s, end in zip(bits, completions, strict=True) if end < time)
        peak = max(peak, received - freed)
    return peak


amounts = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=4)
paces = st.sampled_from([0.3, 1.0, 2.7])


@given(amounts, paces, paces)
def test_peak_is_that_of_a_replay(layers, rate, speed):
    bits, flop = np.array(layers, float).T
    with jax.enable_x64(True):
        peak = float(jax.jit(peak_memory)(bits, flop, rate, speed))
    assert peak == pytest.approx(buffer_peak(bits.tolist(), flop.tolist(), rate, speed), rel=1e-9, abs=1e-9)


@given(amounts)
def test_peak_rises_with_rate_falls_with_speed_and_lies_between_largest_layer_and_model(layers):
    bits, flop = np.array(layers, float).T
    paces = np.array([0.1, 0.5, 1.0, 2.0, 10.0])
    with jax.enable_x64(True):
        peak = np.asarray(peak_memory(bits[:, None, None], flop[:, None, None], paces[:, None], paces))
    assert np.all(np.diff(peak, axis=0) >= -1e-9)
    assert np.all(np.diff(peak, axis=1) <= 1e-9)
    assert np.all(peak >= bits.max()) and np.all(peak <= bits.sum() + 1e-9)


@pytest.mark.parametrize("rate_model", RATE_MODELS)
@pytest.mark.parametrize("room", [0.5, 1.0])
def test_it_is_the_best_of_all_admissions_of_pairs_that_fit(rate_model, room):
    gained = 0
    for corner in CORNERS:
        problem = drawn(corner, rate_model, 0, room)
        allocation = streaming_memory(problem)
        unlimited = with_memory(problem, np.full(problem.num_users, np.inf))
        # Reasons are those of the problem with its memory.
        assert {each.constraint for each in verify(unlimited, allocation)} <= {"reason"}, corner
        expected = best_throughput(with_fitting_pairs(problem, unlimited))
        assert allocation.throughput == allocation.upper_bound == expected, corner
        assert exact(problem).throughput <= allocation.throughput <= exact(unlimited).throughput
        gained += allocation.throughput - exact(problem).throughput
        for k in np.flatnonzero(allocation.served):
            assert peak_of(problem, k, allocation.model[k], allocation.bandwidth_hz[k]) <= (
                problem.users.memory_bits[k] * (1 + 1e-9)
            )
    assert gained > 0


def peak_of(problem, k, i, bandwidth_hz):
    speed = best_clock(with_memory(problem, np.full(problem.num_users, np.inf)))[k, i]
    speed *= problem.users.flop_per_cycle[k]
    bits, flop = problem.catalogue.layer_bits[i].tolist(), problem.catalogue.layer_flop[i].tolist()
    return buffer_peak(bits, flop, rate_bps(problem, k, bandwidth_hz), speed)


def with_fitting_pairs(problem, unlimited):
    """Names the pairs whose replayed buffer fits at the least bandwidth."""
    least = least_bandwidth(unlimited)
    fits = np.isfinite(least)
    for k, i in np.argwhere(fits):
        fits[k, i] = peak_of(problem, k, i, least[k, i]) <= problem.users.memory_bits[k] * (1 + 1e-9)
    return with_memory(unlimited, unlimited.users.memory_bits, allowed=fits)


def test_who_has_no_room_is_told_so():
    problem = drawn("none", "linear", 1, 0.0)
    allocation = streaming_memory(problem)
    models = range(problem.num_models)
    hopeful = [k for k in range(problem.num_users) if any(is_admissible(problem, k, i) for i in models)]
    assert allocation.throughput == 0 and hopeful
    reasons = {REASONS[code] for code in allocation.reason[hopeful]}
    assert reasons <= {
        "memory smaller than the model",
        "energy budget too small for the lowest clock",
        "deadline shorter than compute",
    }
    assert "memory smaller than the model" in reasons
