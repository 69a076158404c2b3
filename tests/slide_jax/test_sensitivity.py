"""Derivatives of the least bandwidth and the relaxed number served, against differences and closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slide_strategies import CORNERS, random_problem

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.float64 import to_float64
from slide_jax.latency import latency, least_rate
from slide_jax.rates import linear_bandwidth, linear_rate, shannon_bandwidth, shannon_rate
from slide_jax.relaxed import relaxed_from
from slide_jax.sensitivity import least_bandwidth, margins, sensitivities, shadow_price

LAYERS, USERS = 4, 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_arguments(seed, rate_model):
    """Returns layer sizes and work, deadlines, starts, speeds and signals; compute takes 0.2 to 0.8 s."""
    rng = np.random.default_rng(seed)
    bits, flop = rng.lognormal(0, 1, (2, LAYERS, USERS))
    bits, flop = 1e7 * bits / bits.sum(axis=0), flop / flop.sum(axis=0) * 1e12 * rng.uniform(0.2, 0.8, USERS)
    deadline, start = rng.uniform(1.5, 3.0, USERS), rng.uniform(0, 0.3, USERS)
    signal = rng.uniform(1, 6, USERS) if rate_model == "linear" else rng.uniform(5e7, 5e8, USERS)
    return [bits, flop, deadline, start, np.full(USERS, 1e12) * rng.uniform(0.9, 1.1, USERS), signal]


@functools.partial(jax.jit, static_argnums=0)
def slopes(rate_model, *arguments):
    return jax.grad(lambda *a: least_bandwidth(*a, rate_model).sum(), range(6))(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def value(rate_model, *arguments):
    return least_bandwidth(*arguments, rate_model)


@pytest.mark.parametrize("rate_model", ["linear", "shannon"])
@pytest.mark.parametrize("seed", range(4))
def test_implicit_derivatives_agree_with_differences_and_with_the_closed_form(rate_model, seed):
    arguments = random_arguments(seed, rate_model)
    implicit = slopes(rate_model, *arguments)
    inverse = linear_bandwidth if rate_model == "linear" else shannon_bandwidth

    def closed_form(bits, flop, deadline, start, speed, signal):
        return inverse(least_rate(bits, flop, deadline - start, speed), signal).sum()

    explicit = jax.jit(jax.grad(closed_form, range(6)))(*arguments)
    for number, (one, other) in enumerate(zip(implicit, explicit, strict=True)):
        np.testing.assert_allclose(one, other, rtol=1e-8, err_msg=str(number))
    for number, argument in enumerate(arguments):
        rows = range(LAYERS) if number < 2 else [...]
        for row in rows:
            # A user's numbers concern no other user's bandwidth, so all users change at once.
            step = 1e-6 * np.maximum(np.abs(argument[row]), 1e-3)
            shifted = []
            for sign in (1, -1):
                changed = argument.copy()
                changed[row] += sign * step
                moved = [*arguments[:number], changed, *arguments[number + 1 :]]
                shifted.append(np.asarray(value(rate_model, *moved)))
            difference = (shifted[0] - shifted[1]) / (2 * step)
            scale = np.abs(implicit[number]).max()
            np.testing.assert_allclose(implicit[number][row], difference, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("rate_model", ["linear", "shannon"])
def test_the_least_bandwidth_just_meets_the_deadline(rate_model):
    arguments = random_arguments(7, rate_model)
    bits, flop, deadline, start, speed, signal = arguments
    bandwidth = value(rate_model, *arguments)
    rate = (linear_rate if rate_model == "linear" else shannon_rate)(bandwidth, signal)
    np.testing.assert_allclose(latency(bits, flop, rate, speed, start), deadline, rtol=1e-12)


def test_layers_that_all_users_share_broadcast_and_their_slopes_add_up():
    bits, flop, deadline, start, speed, signal = random_arguments(1, "linear")
    shared = slopes("linear", bits[:, 0], flop[:, 0], deadline, 0.1, speed, signal)
    tables = [np.repeat(table[:, :1], USERS, axis=1) for table in (bits, flop)]
    own = slopes("linear", *tables, deadline, np.full(USERS, 0.1), speed, signal)
    for one, other in zip(shared, own, strict=True):
        other = other if one.shape == other.shape else other.sum(axis=-1)
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_only_the_deciding_prefix_counts():
    # 2 bits in the 2 s before 2 s of work, or 4 bits in the 3 s before the last: the second decides.
    bits, flop = np.array([[2.0], [2.0], [0.0]]), np.array([[1.0], [0.5], [0.5]])
    by_bits, by_flop, *_ = slopes("linear", bits, flop, *(np.array([x]) for x in (4.0, 0.0, 1.0, 1.0)))
    np.testing.assert_allclose(by_bits[:, 0], [1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(by_flop[:, 0], [0, 4 / 9, 4 / 9])


def test_hopeless_and_free_users_have_no_slope_and_no_nan():
    bits, flop = np.array([[1.0, 0.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 1.0, 0.0]])
    arguments = np.array([[0.5, 2.0, 2.0, 2.0], [0.0] * 4, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    for rate_model in ("linear", "shannon"):
        bandwidth = value(rate_model, bits, flop, *arguments)
        assert bandwidth[0] == np.inf and bandwidth[1] == 0 and bandwidth[2] == np.inf
        for slope in slopes(rate_model, bits, flop, *arguments):
            assert np.isfinite(slope).all()
            assert (slope[..., :3] == 0).all()


def test_an_unknown_rate_model_is_refused():
    with pytest.raises(InputError, match="did you mean 'shannon'"):
        least_bandwidth(jnp.ones(1), jnp.ones(1), 1.0, 0.0, 1.0, 1.0, "shanon")


def changed_users(problem, **columns):
    return dataclasses.replace(problem, users=dataclasses.replace(problem.users, **columns))


def changed_layers(problem, **tables):
    return dataclasses.replace(problem, catalogue=dataclasses.replace(problem.catalogue, **tables))


@pytest.mark.parametrize("rate_model", ["linear", "shannon"])
def test_sensitivities_tell_what_a_served_user_would_need(rate_model):
    problem = random_problem(np.random.default_rng(0), 5, 3, 4, rate_model)
    answer = exact(problem, "proportional")
    table = sensitivities(problem, answer)
    served = answer.served
    assert 0 < served.sum() < 5
    for column in table:
        assert (column[~served] == 0).all()
    assert (table.deadline_hz_per_s[served] < 0).all() and (table.clock_hz_per_hz <= 0).all()
    least = exact(problem).bandwidth_hz
    later = exact(changed_users(problem, deadline_s=problem.users.deadline_s + 1e-6)).bandwidth_hz
    expected = table.deadline_hz_per_s * 1e-6
    np.testing.assert_allclose((later - least)[served], expected[served], rtol=1e-4)
    user = int(np.flatnonzero(served)[0])
    model = answer.model[user]
    for layer in range(problem.catalogue.layer_bits.shape[1]):
        bits = problem.catalogue.layer_bits.copy()
        bits[model, layer] += 1.0
        larger = exact(changed_layers(problem, layer_bits=bits)).bandwidth_hz
        slope = table.layer_bits_hz_per_bit[user, layer]
        assert larger[user] - least[user] == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("rate_model", ["linear", "shannon"])
def test_margins_are_differences_of_the_relaxed_number_served(rate_model):
    problem = random_problem(np.random.default_rng(2), 20, 3, 4, rate_model, "static power")
    worth = margins(problem)
    catalogue, users = problem.catalogue, problem.users

    def served(changed):
        return float(relaxed_from(changed, None)[1].served)

    def difference(change, step):
        return (served(change(step)) - served(change(-step))) / (2 * step)

    assert worth.served == pytest.approx(served(problem))
    assert worth.spectrum_users_per_hz > 0
    spectrum = float(problem.bandwidth_hz)
    by_spectrum = difference(
        lambda x: dataclasses.replace(problem, bandwidth_hz=spectrum + x), 1e-6 * spectrum
    )
    assert by_spectrum == pytest.approx(float(worth.spectrum_users_per_hz), rel=1e-4)
    assert shadow_price(problem) == float(worth.spectrum_users_per_hz)
    by_deadline = difference(lambda x: changed_users(problem, deadline_s=users.deadline_s + x), 1e-6)
    assert by_deadline == pytest.approx(worth.deadline_users_per_s.sum(), rel=1e-4)
    by_energy = difference(lambda x: changed_users(problem, energy_j=users.energy_j * (1 + x)), 1e-6)
    energy = np.where(users.energy_j < np.inf, users.energy_j, 0.0)
    assert by_energy > 0
    assert by_energy == pytest.approx(worth.energy_users_per_j @ energy, rel=1e-3)
    for name in ("layer_bits", "layer_flop"):
        sizes, slopes_of = getattr(catalogue, name), worth[4 if name == "layer_bits" else 5]
        for model in range(3):

            def grown(x, name=name, sizes=sizes, model=model):
                factors = np.where(np.arange(3) == model, 1 + x, 1.0)[:, None]
                return changed_layers(problem, **{name: sizes * factors})

            expected = slopes_of[model] @ sizes[model]
            assert difference(grown, 1e-6) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert (slopes_of <= 0).all() and (slopes_of < 0).any()


@pytest.mark.parametrize("corner", CORNERS)
def test_no_corner_makes_nan(corner):
    problem = random_problem(np.random.default_rng(0), 5, 3, 4, "linear", corner)
    columns = (*margins(problem), *sensitivities(problem, exact(problem)))
    assert all(np.isfinite(column).all() for column in columns)


def test_single_precision_callers_get_the_same():
    problem = to_float64(random_problem(np.random.default_rng(0), 5, 3, 4))
    double = shadow_price(problem)
    with jax.enable_x64(False):
        assert shadow_price(problem) == double
