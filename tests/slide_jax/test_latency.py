"""Latency and the least rate against the recursion in exact fractions, the three forms against each other."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slide_jax.latency import (
    dai_latency,
    duration,
    latency,
    latency_associative,
    latency_closed_form,
    least_rate,
    prefix_bits,
    suffix_flop,
    timeline,
)

FORMS = {"recursion": latency, "associative": latency_associative, "closed form": latency_closed_form}
jitted = {name: jax.jit(form) for name, form in FORMS.items()}
jitted_dai, jitted_least_rate, jitted_timeline = map(jax.jit, (dai_latency, least_rate, timeline))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@st.composite
def chains(draw, number=(1, 2, 5)):
    """Draws layers in whole numbers, many of them 0, with ties between layers that can decide."""
    size = draw(st.sampled_from(number))
    amounts = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    return draw(amounts), draw(amounts)


paces = st.sampled_from([Fraction(1, 3), Fraction(1), Fraction(2), Fraction(7, 2)])


def floats(*values):
    return [np.asarray(value, np.float64) for value in values]


def recursion(bits, flop, rate, speed, start=0):
    """The definition in fractions: arrivals, beginnings and completions."""
    received, done, events = 0, start, []
    for b, w in zip(bits, flop, strict=True):
        received += b
        arrival = start + (received / rate if received else 0)
        begin = max(arrival, done)
        done = begin + (w / speed if w else 0)
        events.append((arrival, begin, done))
    return events


# ------------------------------------------------------------------ values


@given(chains(), paces, paces, st.sampled_from([Fraction(0), Fraction(3, 4)]))
def test_every_form_is_the_recursion(chain, rate, speed, start):
    expected = float(recursion(*chain, rate, speed, start)[-1][2])
    for name, form in jitted.items():
        result = float(form(*floats(*chain, rate, speed, start)))
        assert math.isclose(result, expected, rel_tol=1e-12), name


@pytest.mark.parametrize("layers", [1, 2, 3, 64, 200])
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_forms_agree_in_float64(layers, zeros):
    rng = np.random.default_rng(layers)
    bits, flop = rng.lognormal(0, 2, (2, layers, 500)) * (rng.random((2, layers, 500)) >= zeros)
    rate, speed = 10 ** rng.uniform(-3, 3, (2, 500))
    results = [form(bits * 1e6, flop * 1e9, rate * 1e7, speed * 1e11) for form in jitted.values()]
    assert all(result.dtype == np.float64 for result in results)
    np.testing.assert_allclose(results[1], results[0], rtol=1e-12)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_dtype_is_that_of_the_arrays(form):
    rng = np.random.default_rng(0)
    values = [*rng.random((2, 6, 3)), *rng.random((2, 3)) + 0.5]
    exact = jitted[form](*values)
    result = jitted[form](*(np.float32(value) for value in values))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, exact, rtol=1e-6)


@given(chains(), paces, paces)
def test_timeline_is_the_recursion(chain, rate, speed):
    result = jitted_timeline(*floats(*chain, rate, speed, 0.75))
    expected = np.array(recursion(*chain, rate, speed, Fraction(3, 4)), np.float64)
    np.testing.assert_allclose(np.stack(result, axis=1), expected, rtol=1e-12)


def test_prefix_and_suffix_sums():
    layers = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    np.testing.assert_array_equal(prefix_bits(layers), [[1, 10], [3, 30], [7, 70]])
    np.testing.assert_array_equal(suffix_flop(layers), [[7, 70], [6, 60], [4, 40]])


def test_nothing_to_do_takes_no_time():
    amount, pace = jnp.array([0.0, 0.0, 3.0, 3.0]), jnp.array([0.0, 2.0, 0.0, 2.0])
    np.testing.assert_array_equal(duration(amount, pace), [0, 0, np.inf, 1.5])


CORNERS = [
    # bits, FLOP, rate, speed -> latency
    ([0.0, 0.0], [3.0, 1.0], 0.0, 2.0, 2.0),
    ([0.0, 1.0], [3.0, 0.0], 0.0, 2.0, np.inf),
    ([3.0, 1.0], [0.0, 0.0], 2.0, 0.0, 2.0),
    ([3.0, 1.0], [0.0, 1.0], 2.0, 0.0, np.inf),
    ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0, 0.0),
    ([4.0, 0.0], [0.0, 6.0], 2.0, 2.0, 5.0),
    ([0.0, 4.0], [6.0, 0.0], 2.0, 2.0, 3.0),
    ([4.0], [6.0], 2.0, 2.0, 5.0),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bits", "flop", "rate", "speed", "expected"), CORNERS)
def test_corners(form, bits, flop, rate, speed, expected):
    assert jitted[form](*floats(bits, flop, rate, speed, 0)) == expected
    assert jitted[form](*floats(bits, flop, rate, speed, 1.5)) == expected + 1.5


@pytest.mark.parametrize("form", [*jitted.values(), jitted_dai])
def test_empty_layers_at_the_end_change_nothing(form):
    rng = np.random.default_rng(1)
    bits, flop = rng.random((2, 4, 3))
    padding = ((0, 3), (0, 0))
    padded = form(np.pad(bits, padding), np.pad(flop, padding), 0.7, 1.3)
    np.testing.assert_allclose(padded, form(bits, flop, 0.7, 1.3), rtol=1e-14)


@given(chains(), paces, paces)
def test_between_half_of_dai_and_dai(chain, rate, speed):
    arguments = floats(*chain, rate, speed, 0.25)
    taking, dai = float(jitted["recursion"](*arguments)) - 0.25, float(jitted_dai(*arguments)) - 0.25
    assert math.isclose(dai, sum(chain[0]) / rate + sum(chain[1]) / speed, rel_tol=1e-12)
    # Neither the download nor the compute alone can be shortened.
    assert taking >= max(sum(chain[0]) / rate, sum(chain[1]) / speed) * (1 - Fraction(1, 10**12))
    assert dai / 2 * (1 - 1e-12) <= taking <= dai * (1 + 1e-12)


@pytest.mark.parametrize("rho", [0.1, 0.5, 1.0, 3.0])
def test_even_layers_save_what_theory_says(rho):
    layers = 50
    even = np.full(layers, 1.0)
    dai, slide = dai_latency(even, even, 1.0, 1 / rho), latency(even, even, 1.0, 1 / rho)
    np.testing.assert_allclose(1 - slide / dai, min(rho, 1) / (1 + rho) * (1 - 1 / layers), rtol=1e-12)


@given(chains(), paces, paces, paces, paces)
def test_faster_is_never_later(chain, rate, speed, other_rate, other_speed):
    slow = jitted["recursion"](*floats(*chain, min(rate, other_rate), min(speed, other_speed)))
    fast = jitted["recursion"](*floats(*chain, max(rate, other_rate), max(speed, other_speed)))
    assert fast <= slow


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("form", [*jitted.values(), jitted_dai])
def test_batches_of_users_models_and_drops(form):
    rng = np.random.default_rng(2)
    drops, users, models, layers = 2, 3, 4, 5
    bits, flop = rng.random((2, layers, models))
    rate, start = rng.uniform(0.5, 2, (2, drops, users, 1))
    speed = rng.uniform(0.5, 2, (users, models))
    result = form(bits, flop, rate, speed, start)
    assert result.shape == (drops, users, models)
    for d, k, i in np.ndindex(result.shape):
        one = form(bits[:, i], flop[:, i], rate[d, k, 0], speed[k, i], start[d, k, 0])
        np.testing.assert_allclose(result[d, k, i], one, rtol=1e-14)
    mapped = jax.vmap(lambda rate, start: form(bits, flop, rate, speed, start))(rate, start)
    np.testing.assert_allclose(mapped, result, rtol=1e-14)


def test_layers_of_every_user_and_scalars():
    rng = np.random.default_rng(3)
    bits, flop = rng.random((2, 5, 2, 3))
    result = latency(bits, flop[:, :, :1], 0.5, 2.0)
    assert result.shape == (2, 3)
    expected = latency_closed_form(bits, flop[:, :, :1], 0.5, 2.0)
    np.testing.assert_allclose(result, expected, rtol=1e-14)


def test_timeline_of_a_batch():
    rng = np.random.default_rng(4)
    bits, flop = rng.random((2, 5, 4))
    rate = rng.random((3, 1)) + 0.5
    result = jitted_timeline(bits, flop, rate, 1.0, 0.5)
    assert all(part.shape == (5, 3, 4) for part in result)
    expected = jitted["recursion"](bits, flop, rate, 1.0, 0.5)
    np.testing.assert_allclose(result.completion_s[-1], expected, rtol=1e-14)


# ------------------------------------------------------------------ least rate

slacks = st.sampled_from([Fraction(n, 6) for n in (-3, 0, 1, 3, 6, 9, 12, 18, 40)])


def least_rate_in_fractions(bits, flop, slack, speed):
    """The largest rate that any layer asks for, infinite where one cannot be met."""
    rate = Fraction(0)
    for layer in range(len(bits)):
        received, spare = sum(bits[: layer + 1]), slack - sum(flop[layer:]) / speed
        if spare < 0 or (received and spare == 0):
            return math.inf
        rate = max(rate, received / spare if received else 0)
    return rate


@given(chains(), slacks, st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(4)]))
def test_least_rate_is_least(chain, slack, speed):
    # In binary the speeds are exact and so are fits of the deadline; thirds of a second are not whole work.
    rate = float(jitted_least_rate(*floats(*chain, slack, speed)))
    expected = least_rate_in_fractions(*chain, slack, speed)
    assert math.isclose(rate, expected, rel_tol=1e-12)
    bits, flop = chain
    if expected == math.inf:
        assert recursion(bits, flop, Fraction(10**12), speed)[-1][2] > slack
    else:
        if expected > 0:
            assert recursion(bits, flop, expected, speed)[-1][2] <= slack
            assert recursion(bits, flop, expected * Fraction(999_999, 1_000_000), speed)[-1][2] > slack
        elif sum(bits) == 0:
            assert recursion(bits, flop, Fraction(1), speed)[-1][2] <= slack


@pytest.mark.parametrize(
    ("bits", "flop", "slack", "speed", "expected"),
    [
        ([0, 0], [1, 2], 3, 1, 0),  # without bits an exact fit of the compute is in time
        ([0, 0], [1, 2], 2.5, 1, np.inf),
        ([0, 4], [1, 2], 3, 1, 4),  # the work in front of the bits has all of the slack
        ([4, 0], [1, 2], 3, 1, np.inf),  # with bits it is late
        ([4, 0], [1, 2], 5, 1, 2),
        ([4, 0], [0, 0], 2, 0, 2),
        ([4, 0], [0, 1], 2, 0, np.inf),
        ([0, 0], [0, 0], 0, 0, 0),
        ([0, 0], [0, 0], -1, 1, np.inf),
        ([1, 0], [0, 0], 0, 1, np.inf),
    ],
)
def test_least_rate_by_hand(bits, flop, slack, speed, expected):
    assert jitted_least_rate(*floats(bits, flop, slack, speed)) == expected


@given(chains(), slacks, slacks, paces, paces)
def test_more_time_or_speed_never_asks_for_more_rate(chain, slack, other_slack, speed, other_speed):
    tight = jitted_least_rate(*floats(*chain, min(slack, other_slack), min(speed, other_speed)))
    loose = jitted_least_rate(*floats(*chain, max(slack, other_slack), max(speed, other_speed)))
    assert loose <= tight


def test_least_rate_of_a_batch_and_its_inverse():
    rng = np.random.default_rng(7)
    bits, flop = rng.random((2, 6, 4))
    slack, speed = rng.uniform(1, 8, (2, 3, 1)), rng.uniform(0.5, 3, (3, 4))
    rate = jitted_least_rate(bits, flop, slack, speed)
    assert rate.shape == (2, 3, 4)
    met = np.isfinite(rate)
    assert 0 < met.sum() < met.size
    taking = jitted["recursion"](bits, flop, np.where(met, rate, 1.0), speed)
    np.testing.assert_allclose(taking[met], np.broadcast_to(slack, rate.shape)[met], rtol=1e-12)
