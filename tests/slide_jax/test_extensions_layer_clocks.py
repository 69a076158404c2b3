"""Per-layer clocks against a general optimizer (SLSQP) and a replay layer by layer."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.optimize
from slide_strategies import CORNERS, random_problem

from slide_jax.exact import exact
from slide_jax.extensions import cheapest_clocks, layer_clocks
from slide_jax.problem import RATE_MODELS, Users
from slide_jax.scenario import make_problem


def drawn(corner="none", rate_model="linear", seed=0, users=5):
    rng = np.random.default_rng([seed, CORNERS.index(corner)])
    problem = random_problem(rng, users, 2, 3, rate_model, corner)
    # Of one shape, for the sake of one compilation.
    catalogue = problem.catalogue
    bits, flop = (
        np.pad(table, ((0, 0), (0, 3 - table.shape[1])))
        for table in (catalogue.layer_bits, catalogue.layer_flop)
    )
    return dataclasses.replace(
        problem, catalogue=dataclasses.replace(catalogue, layer_bits=bits, layer_flop=flop)
    )


def least_energy(cycles, arrival, deadline, f_min, f_max, kappa, power):
    """Returns the least energy of all clocks in range by SLSQP in seconds per cycle; infinite if none fit.

    Everything is scaled to numbers near 1 by the caller.
    """
    layers = len(cycles)
    left = np.triu(np.ones((layers, layers))) * cycles

    def energy(seconds):
        return np.sum(cycles * (kappa / seconds**2 + power * seconds))

    if np.any(left @ np.full(layers, 1 / f_max) > deadline - arrival + 1e-12):
        return np.inf
    result = scipy.optimize.minimize(
        energy,
        np.full(layers, 1 / f_max),
        jac=lambda seconds: cycles * (-2 * kappa / seconds**3 + power),
        bounds=[(1 / f_max, 1 / f_min)] * layers,
        constraints={"type": "ineq", "fun": lambda s: deadline - arrival - left @ s, "jac": lambda s: -left},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    # 8: no step improves any more, which for a convex programme is the optimum to rounding.
    assert result.status in (0, 8), result.message
    return energy(result.x)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_clocks_cost_what_a_general_optimizer_finds(layers):
    rng = np.random.default_rng(layers)
    solved = jax.jit(cheapest_clocks)
    possible = 0
    for _ in range(25):
        cycles, sizes = rng.uniform(0.1, 1.5, (2, layers))
        arrival = np.cumsum(sizes) * rng.uniform(0.1, 1)
        deadline = arrival[-1] + rng.uniform(0.1, 3)
        f_min, f_max = rng.uniform(0.1, 0.4), rng.uniform(1.0, 3.0)
        kappa, power = rng.uniform(0.5, 2), rng.choice([0.0, 0.3, 3.0])
        device = (f_min, f_max, kappa, power)
        with jax.enable_x64(True):
            clocks, in_time = (np.asarray(x) for x in solved(cycles, arrival, deadline, *device))
        best = least_energy(cycles, arrival, deadline, *device)
        assert in_time == np.isfinite(best)
        if not in_time:
            continue
        possible += 1
        assert np.all(clocks >= f_min) and np.all(clocks <= f_max) and np.all(np.diff(clocks) >= -1e-12)
        assert np.all(deadline - arrival - np.cumsum((cycles / clocks)[::-1])[::-1] >= -1e-12)
        assert np.sum(cycles * (kappa * clocks**2 + power / clocks)) == pytest.approx(best, rel=1e-5)
    assert possible > 5


def test_layers_without_work_or_size_change_nothing():
    device = (0.01, 50.0, 1.0, 0.0)
    with jax.enable_x64(True):
        plain, fits = cheapest_clocks(np.array([1.0, 2.0]), np.array([1.0, 3.0]), 4.0, *device)
        padded, also = cheapest_clocks(
            np.array([0.0, 1.0, 0.0, 2.0, 0.0]), np.array([0.5, 1.0, 2.0, 3.0, 3.0]), 4.0, *device
        )
        # An empty layer that arrives late is waited for all the same.
        _, late = cheapest_clocks(np.array([1.0, 0.0]), np.array([1.0, 4.5]), 4.0, *device)
    assert fits and also and not late
    np.testing.assert_allclose(np.asarray(padded)[[1, 3]], plain, rtol=1e-12)
    np.testing.assert_allclose(plain, [0.5, 2.0])


def replay(problem, result, k):
    """Returns latency and energy of a user, from its bandwidth and clocks alone."""
    users, catalogue = problem.users, problem.catalogue
    i, bandwidth = result.allocation.model[k], result.allocation.bandwidth_hz[k]
    rate = bandwidth * users.spectral_efficiency_bps_hz[k]
    if problem.rate_model == "shannon":
        rate = bandwidth * np.log2(1 + users.snr_hz[k] / bandwidth) if bandwidth > 0 else 0.0
    received, done, energy = 0.0, users.start_s[k], 0.0
    layers = zip(catalogue.layer_bits[i], catalogue.layer_flop[i], result.frequency_hz[:, k], strict=True)
    for bits, flop, clock in layers:
        received += bits
        arrival = users.start_s[k] + (received / rate if received > 0 else 0.0)
        cycles = flop / users.flop_per_cycle[k]
        done = max(arrival, done) + (cycles / clock if cycles > 0 else 0.0)
        if cycles > 0:
            energy += (
                cycles * users.kappa_j_per_hz2_cycle[k] * clock**2 + users.static_power_w[k] * cycles / clock
            )
    return done, energy


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_answers_keep_every_constraint_and_serve_no_fewer_than_one_clock(rate_model):
    narrower = 0
    for corner in CORNERS:
        for seed in range(2):
            problem = drawn(corner, rate_model, seed)
            users, single = problem.users, exact(problem)
            result = layer_clocks(problem)
            allocation = result.allocation
            assert allocation.throughput >= single.throughput, corner
            assert allocation.upper_bound == allocation.throughput
            assert allocation.bandwidth_used_hz <= problem.bandwidth_hz * (1 + 1e-12)
            assert np.all((allocation.reason == 0) == allocation.served)
            assert np.all(result.frequency_hz[:, ~allocation.served] == 0)
            for k in np.flatnonzero(allocation.served):
                latency, energy = replay(problem, result, k)
                assert latency <= users.deadline_s[k] * (1 + 1e-9), corner
                assert energy <= users.energy_j[k] * (1 + 1e-9), corner
                assert allocation.latency_s[k] == pytest.approx(latency, rel=1e-9)
                assert allocation.energy_j[k] == pytest.approx(energy, rel=1e-9)
                clocks = result.frequency_hz[:, k]
                assert np.all(clocks >= users.f_min_hz[k]) and np.all(clocks <= users.f_max_hz[k])
                assert allocation.frequency_hz[k] == clocks.max()
                if single.served[k]:
                    assert allocation.bandwidth_hz[k] <= single.bandwidth_hz[k] * (1 + 1e-9)
                    narrower += allocation.bandwidth_hz[k] < 0.99 * single.bandwidth_hz[k]
    assert narrower


@pytest.mark.parametrize("seed", range(8))
def test_no_lower_rate_would_do(seed):
    """One user, numbers near 1: at a little less rate even the best clocks are late or break the budget."""
    rng = np.random.default_rng(seed)
    bits, flop = rng.uniform(0.1, 0.6, (2, 5))
    flop[rng.integers(5)] *= 2
    device = {
        "f_min_hz": 0.2,
        "f_max_hz": 5.0,
        "kappa_j_per_hz2_cycle": 1.0,
        "static_power_w": float(rng.choice([0.0, 0.5])),
    }
    layers = [{"bits": b, "flop": f} for b, f in zip(bits.tolist(), flop.tolist(), strict=True)]
    one_second = flop.sum() * (flop.sum() ** 2) + device["static_power_w"]
    energy = float(one_second * rng.uniform(1.1, 4))
    users = Users(
        task=np.zeros(1, int),
        min_accuracy=0.0,
        deadline_s=1.0,
        start_s=0.0,
        energy_j=energy,
        spectral_efficiency_bps_hz=1.0,
        snr_hz=0.0,
        flop_per_cycle=1.0,
        memory_bits=np.inf,
        **device,
    )
    problem = make_problem([{"name": "m", "task": "t", "accuracy": 0.9, "layers": layers}], users, 1e9)
    result = layer_clocks(problem)
    assert result.allocation.throughput == 1
    rate = result.allocation.bandwidth_hz[0]
    assert rate <= exact(problem).bandwidth_hz[0] * (1 + 1e-12)

    def cost(rate):
        return least_energy(flop, np.cumsum(bits) / rate, 1.0, *device.values())

    assert cost(rate) <= energy * (1 + 1e-5)
    assert cost(0.998 * rate) > energy
    # With energy to spare the clocks are at their highest and the rate is that of one clock.
    rich = dataclasses.replace(problem.users, energy_j=np.full(1, np.inf))
    rich = dataclasses.replace(problem, users=rich)
    assert layer_clocks(rich).allocation.bandwidth_hz[0] == pytest.approx(exact(rich).bandwidth_hz[0])
