"""The exact solver against every choice of models and admissions, on thousands of small problems."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slide_oracles as oracles
from hypothesis import given
from hypothesis import strategies as st
from slide_strategies import CORNERS, RATE_MODELS, random_problem, with_layers

from slide_jax import provisioning
from slide_jax.exact import decide_exact, exact
from slide_jax.float64 import compute_in_float64
from slide_jax.hull import convex_hull
from slide_jax.leftover import LEFT_OVER
from slide_jax.problem import Labels, Users
from slide_jax.provisioning import CROWDED_OUT, NO_SPECTRUM, SERVED
from slide_jax.scenario import make_problem
from slide_jax.verification import verify

INTEGERS = ("model", "reason")
FAMILIES = [pair for pair in itertools.product(CORNERS, RATE_MODELS) if pair != ("shannon cap", "linear")]
families = pytest.mark.parametrize(("corner", "rate_model"), FAMILIES)


def problem_of(seed, corner="none", rate_model="linear", users=5, models=3, layers=4):
    """Returns a random problem, padded to that many layers so that one compiled program serves."""
    problem = random_problem(np.random.default_rng(seed), users, models, layers, rate_model, corner)
    return with_layers(problem, layers)


def with_users(problem, **columns):
    return dataclasses.replace(problem, users=dataclasses.replace(problem.users, **columns))


def with_spectrum(problem, bandwidth_hz):
    return dataclasses.replace(problem, bandwidth_hz=np.float64(bandwidth_hz))


def take(problem, index):
    """Returns the problem of these users."""
    columns = jax.tree.map(lambda column: column[np.asarray(index)], problem.users)
    return dataclasses.replace(problem, users=columns, labels=Labels())


def without(problem, absent):
    """Returns the problem in which these users ask in vain, of the same shape."""
    return with_users(
        problem, deadline_s=np.where(absent, problem.users.start_s - 1, problem.users.deadline_s)
    )


# ------------------------------------------------------------------ brute force

SIZES = {(5, 3, 4): 55, (3, 2, 2): 20, (1, 1, 1): 5}
"""Problems of every family by users, models and layers: 25 * 80 = 2000 in all."""


@families
@pytest.mark.parametrize("size", SIZES)
def test_serves_as_many_as_brute_force(size, corner, rate_model):
    for seed in range(SIZES[size]):
        check_against_brute_force(problem_of(seed, corner, rate_model, *size))


def most_that_fit(least, spectrum):
    """Returns the most users that any of the (I + 1)^K choices of models, or none, serves."""
    users, models = least.shape
    choices = np.indices([models + 1] * users).reshape(users, -1)
    costs = np.concatenate([np.zeros((users, 1)), least], axis=1)
    totals = costs[np.arange(users)[:, None], choices].sum(axis=0)
    return np.count_nonzero(choices, axis=0)[totals <= spectrum * (1 + 1e-12)].max()


def check_against_brute_force(problem):
    answer = exact(problem)
    least, spectrum = oracles.least_bandwidth(problem), float(problem.bandwidth_hz)
    assert answer.throughput == answer.upper_bound == most_that_fit(least, spectrum)
    assert verify(problem, answer) == []
    # Reasons of admission: who could be served by more spectrum, and how much more.
    least = least.min(axis=1)
    alone = least <= spectrum * (1 + 1e-12)
    in_reach = np.isfinite(least)
    np.testing.assert_array_equal(np.isin(answer.reason, (SERVED, NO_SPECTRUM, CROWDED_OUT)), in_reach)
    np.testing.assert_array_equal(answer.reason == NO_SPECTRUM, in_reach & ~alone)
    np.testing.assert_array_equal(answer.reason == CROWDED_OUT, alone & ~answer.served)
    used = answer.bandwidth_hz.sum()
    assert np.all(used + least[answer.reason == CROWDED_OUT] > spectrum)


@families
def test_lifting_what_stands_between_helps(corner, rate_model):
    for seed in range(5):
        problem = problem_of(seed, corner, rate_model)
        reason = exact(problem).reason
        plenty = exact(with_spectrum(problem, 1e30)).reason
        np.testing.assert_array_equal(plenty == SERVED, np.isin(reason, (SERVED, NO_SPECTRUM, CROWDED_OUT)))
        # Other reasons have nothing to do with the spectrum, nor with who else is there.
        own = plenty != SERVED
        np.testing.assert_array_equal(reason[own], plenty[own])
        for k in np.flatnonzero(reason != SERVED):
            alone = exact(without(problem, np.arange(5) != k))
            assert alone.reason[k] == (SERVED if reason[k] == CROWDED_OUT else reason[k])


def test_an_answer_is_of_numpy_arrays_in_float64():
    problem = problem_of(0)
    answer = exact(problem)
    for name in ("bandwidth_hz", "frequency_hz", "latency_s", "energy_j"):
        column = getattr(answer, name)
        assert isinstance(column, np.ndarray) and column.dtype == np.float64 and column.shape == (5,)
    for name in INTEGERS:
        assert getattr(answer, name).dtype == np.int32
    assert answer.solver == "exact" and answer.upper_bound == answer.throughput


# ------------------------------------------------------------------ monotonicity

drawn = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from(FAMILIES))
factors = st.one_of(st.floats(1, 1.2), st.floats(1, 10))


def served_with(problem, **columns):
    return exact(with_users(problem, **columns)).throughput


@given(drawn, factors)
def test_more_spectrum_never_serves_fewer(draw, factor):
    problem = problem_of(draw[0], *draw[1])
    wider = exact(with_spectrum(problem, factor * problem.bandwidth_hz))
    assert np.all(wider.served >= exact(problem).served)


@given(drawn, factors)
def test_longer_deadlines_never_serve_fewer(draw, factor):
    problem = problem_of(draw[0], *draw[1])
    users, before = problem.users, exact(problem).throughput
    assert served_with(problem, deadline_s=users.deadline_s * factor) >= before
    one = np.where(np.arange(5) == draw[0] % 5, factor, 1.0)
    assert served_with(problem, deadline_s=users.deadline_s * one) >= before
    assert served_with(problem, start_s=users.start_s / factor) >= before


@given(drawn, factors)
def test_better_devices_never_serve_fewer(draw, factor):
    problem = problem_of(draw[0], *draw[1])
    users, before = problem.users, exact(problem).throughput
    better = {
        "f_max_hz": users.f_max_hz * factor,
        "f_min_hz": users.f_min_hz / factor,
        "flop_per_cycle": users.flop_per_cycle * factor,
        "energy_j": users.energy_j * factor,
        "kappa_j_per_hz2_cycle": users.kappa_j_per_hz2_cycle / factor,
        "static_power_w": users.static_power_w / factor,
        "memory_bits": users.memory_bits * factor,
        "spectral_efficiency_bps_hz": users.spectral_efficiency_bps_hz * factor,
        "snr_hz": users.snr_hz * factor,
    }
    for name, column in better.items():
        assert served_with(problem, **{name: column}) >= before, name
    assert served_with(problem, **better) >= before


@given(drawn)
def test_easier_tasks_and_smaller_models_never_serve_fewer(draw):
    problem = problem_of(draw[0], *draw[1])
    before = exact(problem).throughput
    assert served_with(problem, min_accuracy=np.zeros(5)) >= before
    for name in ("layer_bits", "layer_flop"):
        layers = getattr(problem.catalogue, name) * np.linspace(1, 0.5, 12).reshape(3, 4)
        smaller = dataclasses.replace(problem.catalogue, **{name: layers})
        assert exact(dataclasses.replace(problem, catalogue=smaller)).throughput >= before


@given(drawn)
def test_fewer_users_are_no_worse_off(draw):
    problem = problem_of(draw[0], *draw[1])
    absent = np.arange(5) == draw[0] % 5
    everyone, fewer = exact(problem), exact(without(problem, absent))
    assert not fewer.served[absent].any()
    assert np.all(fewer.served[~absent] >= everyone.served[~absent])


# ------------------------------------------------------------------ ties


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_of_equal_users_the_first_are_served(rate_model):
    counts = set()
    for seed in range(20):
        answer = exact(problem_of(seed, "equal users", rate_model))
        counts.add(answer.throughput)
        np.testing.assert_array_equal(answer.served, np.arange(5) < answer.throughput)
    assert len(counts) > 1


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_of_twins_the_first_is_served(rate_model):
    split = 0
    for seed in range(30):
        twins = take(problem_of(seed, "none", rate_model), [0, 1, 2, 0, 1])
        served = exact(twins).served
        assert not np.any(served[3:] & ~served[:2])
        split += np.any(served[:2] & ~served[3:])
    assert split > 3


def test_the_order_of_users_does_not_matter_otherwise():
    rng = np.random.default_rng(0)
    for seed in range(20):
        problem, order = problem_of(seed), rng.permutation(5)
        answer, moved = exact(problem), exact(take(problem, order))
        for name in ("model", "reason", "bandwidth_hz", "frequency_hz"):
            np.testing.assert_array_equal(getattr(moved, name), getattr(answer, name)[order])


def identical_users(count, bandwidth_hz):
    """Each needs 1e6 bits in 2 s at 2 bit/s/Hz: 0.25 MHz."""
    columns = dict(
        task=0,
        min_accuracy=0.0,
        deadline_s=3.0,
        start_s=0.0,
        energy_j=np.inf,
        spectral_efficiency_bps_hz=2.0,
        snr_hz=1e7,
        f_min_hz=1e8,
        f_max_hz=1e9,
        flop_per_cycle=1.0,
        kappa_j_per_hz2_cycle=1e-27,
        static_power_w=0.0,
        memory_bits=np.inf,
    )
    model = {"name": "m", "task": "t", "accuracy": 0.5, "layers": [{"bits": 1e6, "flop": 1e9}]}
    users = Users(**{name: [value] * count for name, value in columns.items()})
    return make_problem([model], users, bandwidth_hz)


@pytest.mark.parametrize(
    ("bandwidth_hz", "served"),
    [(0, 0), (2.4e5, 0), (2.5e5, 1), (4.9e5, 1), (5e5, 2), (5.1e5, 2), (7.5e5, 3), (1e9, 3)],
)
def test_identical_users_by_hand(bandwidth_hz, served):
    answer = exact(identical_users(3, bandwidth_hz))
    refused = NO_SPECTRUM if bandwidth_hz < 2.5e5 else CROWDED_OUT
    assert answer.reason.tolist() == [SERVED] * served + [refused] * (3 - served)
    assert answer.bandwidth_hz.tolist() == [2.5e5] * served + [0.0] * (3 - served)


def test_a_fit_up_to_rounding_is_one_for_the_reason_too():
    """The second of two equal users could be served in the place of the first."""
    answer = exact(identical_users(2, 2.5e5 * (1 - 1e-13)))
    assert answer.reason.tolist() == [SERVED, CROWDED_OUT]


def test_nobody_asks():
    answer = exact(take(problem_of(0), np.zeros(0, int)))
    assert answer.throughput == 0 and answer.model.shape == (0,)


# ------------------------------------------------------------------ precision


def in_single(problem):
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x, problem)


def in_double(problem):
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype.kind == "f" else x, problem)


@families
def test_single_precision_callers_get_the_same_integers(corner, rate_model):
    for seed in range(4):
        single = in_single(problem_of(seed, corner, rate_model))
        reference = exact(in_double(single))
        answers = [exact(single), exact(jax.tree.map(jnp.asarray, single))]
        with jax.enable_x64(True):
            answers += [exact(single), exact(in_double(single))]
            answers.append(exact(jax.tree.map(jnp.asarray, in_double(single))))
        for answer in answers:
            for name in (*INTEGERS, "bandwidth_hz", "frequency_hz", "latency_s", "energy_j"):
                np.testing.assert_array_equal(getattr(answer, name), getattr(reference, name))


def test_the_callers_precision_is_left_as_it_is():
    exact(problem_of(0))
    assert jnp.zeros(1).dtype == np.float32
    with jax.enable_x64(True):
        exact(problem_of(0))
        assert jnp.zeros(1).dtype == np.float64


def test_many_users_are_counted_in_double_precision():
    """A sum of 20001 needs that float32 would get wrong by more than a user."""
    answer = exact(identical_users(20_001, 20_000 * 2.5e5))
    assert answer.throughput == 20_000


# ------------------------------------------------------------------ jit, vmap, blocks


def test_another_problem_of_the_same_shape_compiles_nothing():
    traces = []

    def traced(hull, problem, **options):
        traces.append(options)
        return decide_exact(hull, problem, **options)

    labels = itertools.count()
    for seed in range(10):
        for left_over in LEFT_OVER:
            name = f"a{next(labels)}"
            other = Labels((name,) * 3, (name, name), (name,) * 5)
            problem = dataclasses.replace(problem_of(seed), labels=other)
            compute_in_float64(traced, problem, left_over=left_over)
            with jax.enable_x64(True):
                compute_in_float64(traced, problem, left_over=left_over)
                compute_in_float64(traced, in_single(problem), left_over=left_over)
    assert [options["left_over"] for options in traces] == list(LEFT_OVER)


def assert_same_columns(allocation, column):
    """Compares integers exactly and numbers to 1e-9."""
    names = (*INTEGERS, "bandwidth_hz", "frequency_hz", "latency_s", "energy_j")
    expected = {name: getattr(allocation, name) for name in names}
    found = {name: column(name) for name in names}
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("rate_model", "left_over"), [("linear", "none"), ("linear", "proportional"), ("shannon", "min_max")]
)
def test_drops_at_once_are_drops_one_at_a_time(rate_model, left_over):
    one_catalogue = problem_of(0, "none", rate_model).catalogue
    drops = [
        dataclasses.replace(problem_of(seed, "none", rate_model), catalogue=one_catalogue, labels=Labels())
        for seed in range(12)
    ]
    users = jax.tree.map(lambda *columns: np.stack(columns), *(drop.users for drop in drops))
    spectra = np.stack([drop.bandwidth_hz for drop in drops])
    hull = convex_hull(one_catalogue.layer_bits, one_catalogue.layer_flop)

    def one(users, bandwidth_hz):
        problem = dataclasses.replace(drops[0], users=users, bandwidth_hz=bandwidth_hz)
        return decide_exact(hull, problem, left_over)

    with jax.enable_x64(True):
        together = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(users, spectra))
    assert len(set(together.served.sum(axis=1).tolist())) > 1
    for drop, problem in enumerate(drops):
        alone = exact(problem, left_over)
        assert_same_columns(alone, lambda name, drop=drop: getattr(together, name)[drop])


@pytest.mark.parametrize(
    ("users", "corner", "left_over"),
    [(13, "none", "none"), (13, "named models", "min_max"), (16, "none", "min_max")],
)
def test_users_in_overlapping_blocks(users, corner, left_over, monkeypatch):
    problem = problem_of(users, corner, "shannon", users=users)
    whole = exact(problem, left_over)
    monkeypatch.setattr(provisioning, "BLOCK", 4)
    # Another function, so that what was compiled with other blocks is not taken.
    in_blocks = compute_in_float64(lambda hull, problem: decide_exact(hull, problem, left_over), problem)
    assert 0 < whole.throughput < users
    assert_same_columns(whole, lambda name: getattr(in_blocks, name))
