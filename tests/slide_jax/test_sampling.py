"""Drops: what is drawn lies in its range, and only what a setting names changes them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slide_jax.channel import Cell
from slide_jax.exact import decide_exact, exact
from slide_jax.hull import convex_hull
from slide_jax.problem import RATE_MODELS, Catalogue
from slide_jax.sampling import Setting, sample_problem
from slide_jax.verification import verify

NOT_ADMISSIBLE = 1
COUNT = 40
CATALOGUE = Catalogue(
    layer_bits=np.array([[1e6, 2e6, 0], [8e6, 8e6, 8e6], [4e6, 0, 1e6], [2e7, 1e7, 0]]),
    layer_flop=np.array([[1e9, 1e9, 1e9], [4e9, 2e9, 2e9], [0, 3e9, 1e9], [5e9, 5e9, 0]]),
    num_layers=np.array([3, 3, 3, 2], np.int32),
    accuracy=np.array([0.6, 0.8, 0.7, 0.9]),
    task=np.array([0, 0, 1, 0], np.int32),
)
TOTAL_BITS, TOTAL_FLOP = CATALOGUE.layer_bits.sum(axis=1), CATALOGUE.layer_flop.sum(axis=1)


@functools.partial(jax.jit, static_argnums=3)
def sampled(key, setting, catalogue, rate_model):
    return sample_problem(key, setting, catalogue, COUNT, rate_model)


def draw(seed=0, rate_model="linear", double=True, **fields):
    """Returns a drop as NumPy arrays."""
    with jax.enable_x64(double):
        setting = Setting(**({"users": COUNT} | fields))
        problem = sampled(jax.random.key(seed), setting, CATALOGUE, rate_model)
        return jax.tree.map(np.asarray, problem)


def compute_at(problem, clock_hz, model):
    """Seconds and Joules of the users' inference."""
    users = problem.users
    cycles = TOTAL_FLOP[model] / users.flop_per_cycle
    energy = users.kappa_j_per_hz2_cycle * clock_hz**2 * cycles + users.static_power_w * cycles / clock_hz
    return cycles / clock_hz, energy


def reference_model(problem):
    """The admissible model of fewest bits, by hand; -1: none."""
    users = problem.users
    fits = (users.task[:, None] == CATALOGUE.task) & (CATALOGUE.accuracy >= users.min_accuracy[:, None])
    ordered = np.argsort(TOTAL_BITS)
    return np.array([next((i for i in ordered if row[i]), -1) for row in fits])


def between(values, low, high):
    """Values of COUNT users that fill a range, or sit on its one point."""
    slack = 1e-9 * abs(high)
    assert np.all((values >= low - slack) & (values <= high + slack))
    assert high - low <= slack or np.ptp(values) > 0.7 * (high - low)


settings = st.fixed_dictionaries(
    {
        "deadline_min_s": st.floats(0.1, 2),
        "deadline_max_s": st.floats(2, 10),
        "compute_min": st.floats(0.05, 0.5),
        "compute_max": st.floats(0.5, 0.95),
        "accuracy_min": st.floats(0, 0.3),
        "accuracy_max": st.floats(0.3, 0.7),
        "f_min_hz": st.floats(1e8, 1e9),
        "f_max_hz": st.floats(1e9, 3e9),
        "kappa_j_per_hz2_cycle": st.floats(1e-29, 1e-27),
        "static_power_w": st.sampled_from([0.0, 0.5]),
        "energy_min": st.floats(0.5, 1),
        "energy_max": st.floats(1, 5),
        "bandwidth_hz": st.floats(1e6, 1e9),
    }
)


@given(st.integers(0, 1000), settings)
def test_everything_lies_in_its_range(seed, setting):
    problem = draw(seed, **setting)
    users = problem.users
    between(users.deadline_s, setting["deadline_min_s"], setting["deadline_max_s"])
    between(users.min_accuracy, setting["accuracy_min"], setting["accuracy_max"])
    reference = reference_model(problem)
    seconds, energy = compute_at(problem, setting["f_max_hz"], reference)
    between(seconds / users.deadline_s, setting["compute_min"], setting["compute_max"])
    between(users.energy_j / energy, setting["energy_min"], setting["energy_max"])
    for name in ("f_min_hz", "f_max_hz", "kappa_j_per_hz2_cycle", "static_power_w"):
        np.testing.assert_array_equal(getattr(users, name), setting[name])
    assert problem.bandwidth_hz == setting["bandwidth_hz"]
    assert np.all(users.start_s == 0) and np.all(users.memory_bits == np.inf)
    assert np.all(users.snr_hz > 0)
    assert np.all((users.spectral_efficiency_bps_hz > 0) & (users.spectral_efficiency_bps_hz <= 7.4))


def test_default_accuracy_asks_for_nothing():
    problem = draw()
    assert np.all(problem.users.min_accuracy == 0)
    np.testing.assert_array_equal(problem.users.allowed, problem.users.task[:, None] == CATALOGUE.task)


def test_the_channel_is_that_of_the_cell():
    near, far = (draw(cell=Cell(radius_m=radius)).users for radius in (100.0, 1000.0))
    assert np.all(near.snr_hz > far.snr_hz)
    assert np.all(near.spectral_efficiency_bps_hz >= far.spectral_efficiency_bps_hz)
    capped = draw(cell=Cell(efficiency_cap_bps_hz=2.0)).users.spectral_efficiency_bps_hz
    assert capped.max() == 2.0


def test_tasks_are_asked_for_as_often_as_they_have_models():
    tasks = np.concatenate([draw(seed).users.task for seed in range(50)])
    assert set(tasks.tolist()) == {0, 1}
    # Three of four models; standard deviation of the share 0.0097.
    assert abs((tasks == 0).mean() - 0.75) < 0.05


@given(st.integers(0, 1000), st.floats(0, 0.5), st.floats(0.5, 1.0))
def test_admissible_are_the_models_of_the_task_that_are_accurate_enough(seed, low, high):
    problem = draw(seed, accuracy_min=low, accuracy_max=high)
    users = problem.users
    for k, i in np.ndindex(COUNT, 4):
        fits = CATALOGUE.task[i] == users.task[k] and CATALOGUE.accuracy[i] >= users.min_accuracy[k]
        assert users.allowed[k, i] == fits
    assert np.all(np.isfinite(users.energy_j)) and np.all(users.flop_per_cycle > 0)


def test_users_without_an_admissible_model_say_so():
    problem = draw(accuracy_min=0.0, accuracy_max=1.0)
    nobody = reference_model(problem) < 0
    assert 0 < nobody.sum() < COUNT
    reason = exact(problem).reason
    np.testing.assert_array_equal(reason == NOT_ADMISSIBLE, nobody)


@pytest.mark.parametrize("rate_model", RATE_MODELS)
@pytest.mark.parametrize("users", [0, 1, 7, COUNT])
def test_users_beyond_those_that_ask_are_never_served(users, rate_model):
    problem = draw(3, rate_model, users=users, bandwidth_hz=1e12)
    answer = exact(problem)
    assert np.all(answer.reason[users:] == NOT_ADMISSIBLE)
    assert not answer.served[users:].any() and not problem.users.allowed[users:].any()
    # With a spectrum without end the others are limited by themselves alone.
    assert answer.throughput == exact(draw(3, rate_model, bandwidth_hz=1e12)).served[:users].sum()
    assert users == 0 or answer.throughput > 0
    assert verify(problem, answer) == []


def columns_of(problem):
    """Everything that a drop holds, by name."""
    columns = {name: getattr(problem.users, name) for name in vars(problem.users)}
    return columns | {"bandwidth_hz": problem.bandwidth_hz}


def changed(one, other):
    return {name for name, column in columns_of(one).items() if np.any(column != columns_of(other)[name])}


def test_the_same_key_draws_the_same_drop_and_another_another():
    assert changed(draw(1), draw(1)) == set()
    assert changed(draw(1), draw(2)) == {
        "task",
        "deadline_s",
        "energy_j",
        "spectral_efficiency_bps_hz",
        "snr_hz",
        "flop_per_cycle",
        "allowed",
    }


def test_one_draw_tells_nothing_of_another():
    """Columns are drawn from keys of their own: over 2000 users no two go together."""
    drops = [draw(seed, accuracy_max=0.5) for seed in range(50)]
    columns = [
        np.concatenate(parts)
        for parts in (
            [drop.users.deadline_s for drop in drops],
            [drop.users.min_accuracy for drop in drops],
            [drop.users.snr_hz.argsort().argsort() for drop in drops],
            [compute_at(drop, 1.3e9, reference_model(drop))[0] / drop.users.deadline_s for drop in drops],
            [drop.users.energy_j / compute_at(drop, 1.3e9, reference_model(drop))[1] for drop in drops],
            [drop.users.task for drop in drops],
        )
    ]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.1  # four and a half standard deviations


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"patience": 2.0}, {"deadline_s"}),
        ({"bandwidth_hz": 5e7}, {"bandwidth_hz"}),
        ({"users": 7}, {"allowed"}),
        ({"f_min_hz": 4e8}, {"f_min_hz"}),
        ({"energy_max": 9.0}, {"energy_j"}),
        ({"cell": Cell(radius_m=300.0)}, {"spectral_efficiency_bps_hz", "snr_hz"}),
        ({"cell": Cell(efficiency_cap_bps_hz=3.0)}, {"spectral_efficiency_bps_hz"}),
        ({"compute_max": 0.9}, {"flop_per_cycle", "energy_j"}),
        ({"static_power_w": 0.3}, {"static_power_w", "energy_j"}),
        ({"accuracy_max": 0.3}, {"min_accuracy"}),
        ({"deadline_max_s": 9.0}, {"deadline_s", "flop_per_cycle", "energy_j"}),
    ],
)
def test_a_field_changes_its_columns_alone(fields, columns):
    """Points of a sweep see the same drops otherwise."""
    assert changed(draw(4), draw(4, **fields)) == columns


def test_patience_scales_the_deadlines():
    plain, patient = draw(5).users, draw(5, patience=1.5).users
    np.testing.assert_allclose(patient.deadline_s, 1.5 * plain.deadline_s, rtol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_rate_models_see_the_same_users(seed):
    linear, shannon = draw(seed, "linear"), draw(seed, "shannon")
    assert changed(linear, shannon) == set()
    assert (linear.rate_model, shannon.rate_model) == ("linear", "shannon")


def test_many_keys_and_settings_at_once():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        fields = Setting(users=COUNT)
        points = jax.tree.map(lambda value: jnp.full(2, value, jnp.float64), fields)
        points = points._replace(users=jnp.array([COUNT, 10]), patience=jnp.array([1.0, 2.0]))

        def one_drop(key, setting):
            return sampled(key, setting, CATALOGUE, "linear")

        drops = jax.vmap(jax.vmap(one_drop, (0, None)), (None, 0))(keys, points)
        for point, drop in np.ndindex(2, 3):
            one = one_drop(keys[drop], jax.tree.map(lambda x, point=point: x[point], points))
            for name, column in columns_of(one).items():
                many = columns_of(drops)[name][point, drop]
                np.testing.assert_allclose(many, column, rtol=1e-12, err_msg=name)


def test_a_drop_is_solved_where_it_is_drawn():
    """Drawn and solved in one program that knows the catalogue; the host solver agrees with it."""
    hull = convex_hull(CATALOGUE.layer_bits, CATALOGUE.layer_flop)

    @jax.jit
    def served(key):
        return decide_exact(hull, sample_problem(key, Setting(users=COUNT), CATALOGUE, COUNT)).model

    for seed in range(3):
        with jax.enable_x64(True):
            model = np.asarray(served(jax.random.key(seed)))
        answer = exact(draw(seed))
        np.testing.assert_array_equal(model, answer.model)
        assert answer.throughput > 0
        assert verify(draw(seed), answer) == []


def test_single_precision_drops_are_ordinary_problems():
    problem = draw(0, double=False)
    assert problem.users.deadline_s.dtype == np.float32
    answer = exact(problem)
    assert answer.throughput > 0 and verify(problem, answer) == []
    between(problem.users.deadline_s.astype(float), 2.0, 8.0)


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_a_problem_keeps_its_catalogue(rate_model):
    problem = draw(0, rate_model)
    for name in vars(CATALOGUE):
        np.testing.assert_array_equal(getattr(problem.catalogue, name), getattr(CATALOGUE, name))
    assert dataclasses.is_dataclass(problem) and problem.num_users == COUNT and problem.num_models == 4
