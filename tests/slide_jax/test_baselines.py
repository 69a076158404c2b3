"""Baselines against brute force and plain loops over the users."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slide_oracles import best_throughput, fits_memory, least_bandwidth
from slide_strategies import CORNERS, random_problem

from slide_jax import baselines
from slide_jax.exact import exact
from slide_jax.float64 import to_float64
from slide_jax.hull import convex_hull
from slide_jax.problem import RATE_MODELS
from slide_jax.solvers import solve
from slide_jax.verification import verify

ORDERS = {
    "best_channel_first": lambda p: (
        -(p.users.snr_hz if p.rate_model == "shannon" else p.users.spectral_efficiency_bps_hz)
    ),
    "earliest_deadline_first": lambda p: p.users.deadline_s,
}
NAMES = ("equal_share", "proportional_share", *ORDERS, "random_order")
CASES = [(corner, rate_model) for corner in CORNERS for rate_model in RATE_MODELS]


def drawn(corner="none", rate_model="linear", seed=0, users=5):
    rng = np.random.default_rng([seed, CORNERS.index(corner)])
    problem = random_problem(rng, users, 2, 2, rate_model, corner)
    # Of one shape, for the sake of one compilation.
    catalogue = problem.catalogue
    bits, flop = (
        np.pad(table, ((0, 0), (0, 2 - table.shape[1])))
        for table in (catalogue.layer_bits, catalogue.layer_flop)
    )
    return dataclasses.replace(
        problem, catalogue=dataclasses.replace(catalogue, layer_bits=bits, layer_flop=flop)
    )


def in_turn(needs, order, spectrum):
    """Serves users in an order, in plain Python."""
    served, used = np.zeros(len(needs), bool), 0.0
    for k in order:
        if used + needs[k] <= spectrum * (1 + 1e-12):
            served[k], used = True, used + needs[k]
    return served


@pytest.mark.parametrize("name", NAMES)
def test_every_baseline_is_feasible_and_none_beats_the_optimum(name):
    for corner, rate_model in CASES:
        problem = drawn(corner, rate_model)
        allocation = solve(problem, name)
        assert verify(problem, allocation) == [], (corner, rate_model)
        assert allocation.throughput <= best_throughput(problem), (corner, rate_model)
        assert allocation.solver == name and np.isnan(allocation.upper_bound)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_every_baseline_serves_all_when_there_is_spectrum_to_spare(name, seed):
    problem = drawn(seed=seed)
    needs = least_bandwidth(problem).min(axis=1)
    possible = np.isfinite(needs)
    assert possible.any()
    # However small a share is of the sum, it is enough.
    plenty = dataclasses.replace(problem, bandwidth_hz=np.float64(1e6 * needs[possible].sum()))
    np.testing.assert_array_equal(solve(plenty, name).served, possible)


@pytest.mark.parametrize("name", ORDERS)
def test_ordered_baselines_are_a_loop_over_the_sorted_users(name):
    for rate_model in RATE_MODELS:
        for seed in range(6):
            problem = drawn("none", rate_model, seed, users=7)
            needs = least_bandwidth(problem).min(axis=1)
            expected = in_turn(needs, np.argsort(ORDERS[name](problem)), problem.bandwidth_hz)
            allocation = solve(problem, name)
            np.testing.assert_array_equal(allocation.served, expected)
            np.testing.assert_allclose(allocation.bandwidth_hz[expected], needs[expected], rtol=1e-9)


def test_random_order_depends_on_its_seed_alone_and_leaves_no_user_who_fits():
    problem = drawn("none", "linear", 1, users=7)
    needs = least_bandwidth(problem).min(axis=1)
    found = set()
    for seed in range(12):
        allocation = solve(problem, "random_order", seed=seed)
        again = solve(problem, "random_order", seed=seed)
        np.testing.assert_array_equal(allocation.served, again.served)
        left = problem.bandwidth_hz - allocation.bandwidth_used_hz
        assert not np.any(needs[~allocation.served] <= left * (1 - 1e-9))
        found.add(tuple(allocation.served.tolist()))
    assert len(found) > 1


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 4.0, np.inf]), min_size=6, max_size=6),
    st.permutations(range(6)),
    st.sampled_from([0.0, 1.0, 5.0, 7.5]),
)
def test_admit_in_order_is_a_loop(needs, order, spectrum):
    result = jax.jit(baselines.admit_in_order)(jnp.array(needs), jnp.array(order), spectrum)
    np.testing.assert_array_equal(result, in_turn(needs, order, spectrum))


def most_by_share(needs, loads, spectrum):
    """Returns how many of the users of least need all get enough when they share by load."""
    order = np.argsort(needs, kind="stable")
    enough = [
        n
        for n in range(len(needs) + 1)
        if np.isfinite(needs[order[:n]]).all()
        and (spectrum * loads[order[:n]] >= needs[order[:n]] * loads[order[:n]].sum() * (1 - 1e-12)).all()
    ]
    return order[: max(enough)]


def test_equal_users_share_equally():
    problem = drawn("equal users", "linear", 2)
    need = exact(problem).bandwidth_hz.max()
    assert need > 0
    for spectrum, served in ((5 * need, 5), (5 * need * (1 - 1e-6), 4), (need / 2, 0)):
        shared = solve(dataclasses.replace(problem, bandwidth_hz=np.float64(spectrum)), "equal_share")
        assert shared.throughput == served
        if served:
            np.testing.assert_allclose(shared.bandwidth_hz[shared.served], spectrum / served, rtol=1e-12)


def test_the_most_users_are_served_who_share_equally():
    for corner, rate_model in CASES:
        for seed in range(4):
            problem = drawn(corner, rate_model, seed)
            needs = least_bandwidth(problem).min(axis=1)
            allocation = solve(problem, "equal_share")
            expected = most_by_share(needs, np.ones(len(needs)), problem.bandwidth_hz)
            assert allocation.throughput == len(expected), (corner, rate_model, seed)


def test_proportional_share_follows_the_loads():
    served = 0
    for seed in range(6):
        problem = drawn("none", "linear", seed)
        users, needs = problem.users, least_bandwidth(problem)
        bits = problem.catalogue.layer_bits.sum(axis=1)[needs.argmin(axis=1)]
        load = bits / (users.spectral_efficiency_bps_hz * (users.deadline_s - users.start_s))
        who = most_by_share(needs.min(axis=1), load, problem.bandwidth_hz)
        allocation = solve(problem, "proportional_share")
        assert set(np.flatnonzero(allocation.served)) == set(who)
        share = problem.bandwidth_hz * load[who] / load[who].sum()
        np.testing.assert_allclose(allocation.bandwidth_hz[who], share, rtol=1e-9)
        served += len(who)
    assert served > 0


def test_dai_is_the_optimum_of_downloading_first_and_never_serves_more_than_slide():
    for corner, rate_model in CASES:
        problem = drawn(corner, rate_model, 1)
        collapsed = baselines.download_then_infer(problem)
        allocation = baselines.dai(problem)
        assert verify(collapsed, allocation) == [], (corner, rate_model)
        assert allocation.throughput == best_throughput(collapsed), (corner, rate_model)
        assert allocation.throughput <= exact(problem).throughput
        assert allocation.solver == "dai" and np.isnan(allocation.upper_bound)


def test_dai_latency_is_download_plus_inference():
    problem = drawn("none", "linear", 3)
    allocation, users = baselines.dai(problem), problem.users
    served = np.flatnonzero(allocation.served)
    assert served.size
    for k in served:
        i = allocation.model[k]
        assert fits_memory(problem, k, i)
        rate = allocation.bandwidth_hz[k] * users.spectral_efficiency_bps_hz[k]
        speed = allocation.frequency_hz[k] * users.flop_per_cycle[k]
        bits, flop = problem.catalogue.layer_bits[i].sum(), problem.catalogue.layer_flop[i].sum()
        expected = users.start_s[k] + bits / rate + flop / speed
        assert allocation.latency_s[k] == pytest.approx(expected, rel=1e-12)


def test_dai_hands_out_what_is_left():
    problem = drawn("none", "linear", 4)
    allocation = baselines.dai(problem, left_over="proportional")
    assert allocation.throughput and allocation.bandwidth_used_hz == pytest.approx(problem.bandwidth_hz)


def test_a_batch_of_drops_is_decided_drop_by_drop():
    decide = {name: getattr(baselines, f"decide_{name}") for name in NAMES[:4]}
    problem = drawn("none", "linear", 0)
    spectra = np.float64(problem.bandwidth_hz) * np.array([0.5, 1.0, 2.0])
    with jax.enable_x64(True):
        hull = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
        problem = to_float64(problem)

        def served(spectrum, key):
            drop = dataclasses.replace(problem, bandwidth_hz=spectrum)
            random = baselines.decide_random_order(hull, drop, key)
            return {
                "random_order": random.served,
                **{name: f(hull, drop).served for name, f in decide.items()},
            }

        keys = jax.vmap(jax.random.key)(jnp.arange(3))
        batch = jax.jit(jax.vmap(served))(spectra, keys)
    for drop, spectrum in enumerate(spectra):
        alone = dataclasses.replace(problem, bandwidth_hz=spectrum)
        for name in decide:
            np.testing.assert_array_equal(batch[name][drop], solve(alone, name).served)
        np.testing.assert_array_equal(
            batch["random_order"][drop], solve(alone, "random_order", seed=drop).served
        )
