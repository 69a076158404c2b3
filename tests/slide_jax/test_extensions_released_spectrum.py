"""Downloads that take turns, against linear programmes over every choice of users and models."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.optimize
from slide_oracles import best_clock
from slide_strategies import CORNERS, random_problem

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.extensions import released_spectrum
from slide_jax.problem import Users
from slide_jax.scenario import make_problem


def drawn(corner="none", seed=0, users=4, models=2, layers=2):
    rng = np.random.default_rng([seed, CORNERS.index(corner)])
    return random_problem(rng, users, models, layers, "linear", corner)


def chain(problem, clocks, k, i):
    """Returns areas [Hz s], start and deadlines of the layers of a pair; None where it cannot be in time."""
    if not np.isfinite(clocks[k, i]):
        return None
    users, bits, flop = problem.users, problem.catalogue.layer_bits[i], problem.catalogue.layer_flop[i]
    speed = clocks[k, i] * users.flop_per_cycle[k]
    due = [users.deadline_s[k] - flop[layer:].sum() / speed for layer in range(len(flop))]
    if due[0] < users.start_s[k] or (bits.sum() > 0 and users.spectral_efficiency_bps_hz[k] == 0):
        return None
    efficiency = users.spectral_efficiency_bps_hz[k] or 1.0
    return [(b / efficiency, users.start_s[k], d) for b, d in zip(bits, due, strict=True) if b > 0]


def fits(pieces, spectrum):
    """Returns whether shares that vary between events can carry all the pieces, by a linear programme."""
    if not pieces:
        return True
    events = np.unique([time for _, release, due in pieces for time in (release, due)])
    slots = [(a, b) for a, b in itertools.pairwise(events)]
    if not slots or spectrum == 0:
        return False
    allowed = np.array([[release <= a and b <= due for a, b in slots] for _, release, due in pieces])
    size, scale = len(slots), spectrum * (events[-1] - events[0])
    area = np.array([piece[0] for piece in pieces]) / scale
    each_slot = np.tile(np.eye(size), len(pieces))
    each_piece = np.kron(np.eye(len(pieces)), np.ones(size))
    result = scipy.optimize.linprog(
        np.zeros(each_slot.shape[1]),
        A_ub=np.vstack([each_slot, -each_piece]),
        b_ub=np.concatenate([np.diff(events) * spectrum / scale, -area * (1 - 1e-7)]),
        bounds=[(0, None if free else 0) for free in allowed.ravel()],
        method="highs",
    )
    return result.status == 0


def best_throughput(problem):
    """Tries every choice of at most one model a user, the largest first."""
    clocks = best_clock(problem)
    chains = [
        [c for i in range(problem.num_models) if (c := chain(problem, clocks, k, i)) is not None]
        for k in range(problem.num_users)
    ]
    choices = itertools.product(*([None, *options] for options in chains))
    for choice in sorted(choices, key=lambda c: sum(option is not None for option in c), reverse=True):
        pieces = [piece for option in choice if option is not None for piece in option]
        if fits(pieces, float(problem.bandwidth_hz)):
            return sum(option is not None for option in choice)
    raise AssertionError("nobody always fits")


def check_replay(problem, result):
    """Replays the downloads: one at a time, all the bits of each, every constraint kept."""
    allocation, download, users = result.allocation, result.download, problem.users
    assert np.all(download.begin_s[1:] >= download.end_s[:-1])
    assert np.all(download.end_s >= download.begin_s)
    assert np.all(download.begin_s >= users.start_s[download.user])
    horizon = users.deadline_s.max() - users.start_s.min()
    for k in range(problem.num_users):
        turns = [
            (begin, end)
            for user, begin, end in zip(*(c.tolist() for c in download), strict=True)
            if user == k
        ]
        if not allocation.served[k]:
            assert not turns and allocation.reason[k] != 0
            continue
        assert allocation.reason[k] == 0
        i, rate = allocation.model[k], problem.bandwidth_hz * users.spectral_efficiency_bps_hz[k]
        bits, flop = problem.catalogue.layer_bits[i], problem.catalogue.layer_flop[i]
        seconds = sum(end - begin for begin, end in turns)
        assert seconds * rate == pytest.approx(bits.sum(), rel=1e-9)
        mean = allocation.bandwidth_hz[k] * horizon
        assert mean == pytest.approx(seconds * problem.bandwidth_hz, rel=1e-9)
        done, received = users.start_s[k], 0.0
        for b, f in zip(bits, flop, strict=True):
            received += b
            arrival = time_of(received * (1 - 1e-12) / rate, turns) if received else users.start_s[k]
            done = max(done, arrival) + f / (allocation.frequency_hz[k] * users.flop_per_cycle[k])
        assert done <= users.deadline_s[k] * (1 + 1e-9)
        assert allocation.latency_s[k] == pytest.approx(done, rel=1e-9)
        assert allocation.energy_j[k] <= users.energy_j[k] * (1 + 1e-9)


def time_of(seconds, turns):
    """Returns when a download that takes turns has had so many seconds."""
    for begin, end in turns:
        if seconds <= end - begin:
            return begin + seconds
        seconds -= end - begin
    assert seconds < 1e-9
    return turns[-1][1]


@pytest.mark.parametrize("corner", [corner for corner in CORNERS if corner != "shannon cap"])
def test_it_lies_between_constant_shares_and_its_bound(corner):
    for seed in range(2):
        problem = drawn(corner, seed)
        result = released_spectrum(problem)
        allocation = result.allocation
        best = best_throughput(problem)
        assert exact(problem).throughput <= allocation.throughput <= best <= allocation.upper_bound
        assert allocation.upper_bound <= problem.num_users
        check_replay(problem, result)


def test_it_finds_the_best_of_most_small_problems():
    problems = [drawn("none", seed, users=4, models=1, layers=3) for seed in range(10)]
    gaps = [best_throughput(p) - released_spectrum(p).allocation.throughput for p in problems]
    assert sum(gap > 0 for gap in gaps) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_models_of_one_layer_and_one_start_are_solved_and_proven(seed):
    problem = drawn("one layer", seed, users=7, models=1)
    users = dataclasses.replace(problem.users, start_s=np.zeros(7), deadline_s=problem.users.deadline_s + 0.3)
    problem = dataclasses.replace(problem, users=users)
    result = released_spectrum(problem)
    assert result.allocation.throughput == result.allocation.upper_bound == best_throughput(problem)
    check_replay(problem, result)


def own_models(layers_of, start_s, deadline_s, bandwidth_hz):
    """Returns a problem in which each user allows its own model alone; 1 FLOP/s, 1 bit/s/Hz."""
    users = len(layers_of)
    models = [
        {
            "name": f"m{k}",
            "task": "t",
            "accuracy": 0.9,
            "layers": [{"bits": float(b), "flop": float(f)} for b, f in layers],
        }
        for k, layers in enumerate(layers_of)
    ]
    columns = Users(
        task=np.full(users, -1),
        min_accuracy=0.0,
        deadline_s=np.asarray(deadline_s, float),
        start_s=np.asarray(start_s, float),
        energy_j=np.inf,
        spectral_efficiency_bps_hz=1.0,
        snr_hz=0.0,
        f_min_hz=1.0,
        f_max_hz=1.0,
        flop_per_cycle=1.0,
        kappa_j_per_hz2_cycle=0.0,
        static_power_w=0.0,
        memory_bits=np.inf,
        allowed=np.eye(users, dtype=bool),
    )
    return make_problem(models, columns, float(bandwidth_hz))


def test_users_one_after_the_other_both_have_all_the_spectrum():
    problem = own_models([[(4, 1)], [(4, 1)]], [0.0, 2.0], [3.0, 5.0], 2.0)
    assert exact(problem).throughput == 1
    result = released_spectrum(problem)
    assert result.allocation.throughput == 2 and result.allocation.upper_bound == 2
    check_replay(problem, result)
    np.testing.assert_allclose(result.download.end_s, [2.0, 4.0], rtol=1e-12)


def test_a_user_who_is_due_soon_interrupts():
    problem = own_models([[(6, 1)], [(2, 1)]], [0.0, 1.0], [6.0, 3.5], 2.0)
    result = released_spectrum(problem)
    assert result.allocation.throughput == 2
    check_replay(problem, result)
    assert result.download.user.tolist() == [0, 1, 0]


def test_who_is_served_by_constant_shares_may_have_to_go():
    """User 0 asks for little bandwidth but for long: with it nobody else than user 3 has room."""
    layers_of = [[(10, 1)], [(6, 1)], [(6, 1)], [(6, 1)]]
    problem = own_models(layers_of, [0.0] * 4, [22.0, 7.1, 13.1, 19.1], 1.0)
    # Insertion keeps these two and finds no third; by deadline, the largest goes.
    assert exact(problem).served.tolist() == [True, False, False, True]
    result = released_spectrum(problem)
    assert result.allocation.served.tolist() == [False, True, True, True]
    assert result.allocation.throughput == best_throughput(problem) == 3
    check_replay(problem, result)


@pytest.mark.parametrize(("numbers", "partition"), [((1, 2, 3, 4), True), ((1, 2, 2, 7), False)])
def test_partitions_are_told_apart_by_how_many_can_be_served(numbers, partition):
    """The construction of the module's proof that the problem is NP-hard."""
    half, n, limit = sum(numbers) / 2, len(numbers) // 2, max(numbers) + 1
    first = 1.0
    second = first * (2 * n * limit - half) / half
    layers_of = [[(a, second - first), (2 * limit - 2 * a, 1.0)] for a in numbers]
    problem = own_models(layers_of, [0.0] * 2 * n, [second + 1.0] * 2 * n, half / first)
    assert (best_throughput(problem) == n) == partition
    check_replay(problem, released_spectrum(problem))


def test_rates_of_a_fixed_power_are_refused():
    problem = drawn("shannon cap")
    with pytest.raises(InputError, match="rate_model"):
        released_spectrum(problem)
