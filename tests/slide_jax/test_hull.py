"""The hull against all the layers, and against the layers that decide somewhere, in exact fractions."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slide_jax.hull import convex_hull, latency_on_hull, least_rate_on_hull
from slide_jax.latency import latency_closed_form, least_rate


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@jax.jit
def rates_on_hull(hull, slack, speed):
    """[I, K] of users [K]."""

    def of_model(bits, flop, switch_flop, total_bits, total_flop):
        return least_rate_on_hull(bits, flop, switch_flop, total_flop, slack, speed)

    return jax.vmap(of_model)(*hull)


@jax.jit
def rates_of_all_layers(layer_bits, layer_flop, slack, speed):
    return least_rate(layer_bits.T[:, :, None], layer_flop.T[:, :, None], slack, speed)


@jax.jit
def latencies_on_hull(hull, rate, speed):
    return jax.vmap(lambda bits, flop, total: latency_on_hull(bits, flop, total, rate, speed))(
        hull.bits, hull.flop, hull.total_flop
    )


@jax.jit
def latencies_of_all_layers(layer_bits, layer_flop, rate, speed):
    return latency_closed_form(layer_bits.T[:, :, None], layer_flop.T[:, :, None], rate, speed)


layers_in_whole_numbers = st.integers(1, 7).flatmap(
    lambda size: st.tuples(*[st.lists(st.integers(0, 3), min_size=size, max_size=size)] * 2)
)
"""Bits and FLOP of one model, with layers of no size, of no work, and several on one line."""


def hull_of(bits, flop):
    return convex_hull(np.array([bits], float), np.array([flop], float))


def points(bits, flop):
    """(S_l, W_l) of every layer."""
    return [(sum(bits[: layer + 1]), sum(flop[layer:])) for layer in range(len(bits))]


def deciding(bits, flop):
    """The points that alone ask for the most rate at some workable amount, found by trying amounts.

    Between two neighbouring places where any two points ask for the same, nothing changes.
    """
    candidates = sorted({point for point in points(bits, flop) if point[0] > 0})
    if not candidates:
        return set()
    least = max(w for _, w in candidates)
    places = {Fraction(least)}
    for s1, w1 in candidates:
        for s2, w2 in candidates:
            if s2 > s1:
                places.add(Fraction(s2 * w1 - s1 * w2, s2 - s1))
    places = sorted(place for place in places if place >= least)
    places.append(places[-1] + 2)
    deciders = set()
    for low, high in itertools.pairwise(places):
        amount = (low + high) / 2
        asked = {point: Fraction(point[0]) / (amount - point[1]) for point in candidates}
        most = max(asked.values())
        best = [point for point, rate in asked.items() if rate == most]
        assert len(best) == 1
        deciders.add(best[0])
    return deciders


# ------------------------------------------------------------------ the hull itself


@given(layers_in_whole_numbers)
def test_vertices_are_the_layers_that_decide_somewhere(model):
    hull = hull_of(*model)
    found = {(int(s), int(w)) for s, w in zip(hull.bits[0], hull.flop[0], strict=True)}
    assert found == (deciding(*model) or {(0, 0)})
    assert (hull.total_bits[0], hull.total_flop[0]) == (sum(model[0]), sum(model[1]))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_vertices_rise_and_fall_and_the_last_is_repeated(bits, seed):
    flop = np.random.default_rng(seed).integers(0, 4, len(bits))
    hull = hull_of(bits, flop)
    assert hull.bits.shape[1] % 4 == 0 and hull.switch_flop.shape[1] == hull.bits.shape[1] - 1
    vertices = list(dict.fromkeys(zip(hull.bits[0], hull.flop[0], strict=True)))
    own = len(vertices)
    assert own > hull.bits.shape[1] - 4
    assert np.all(np.diff(hull.bits[0, :own]) > 0) and np.all(np.diff(hull.flop[0, :own]) < 0)
    assert np.all(hull.bits[0, own:] == hull.bits[0, own - 1])
    # In order, and none before the least amount that is workable at all.
    assert np.all(np.diff(hull.switch_flop[0, : own - 1]) >= 0)
    assert np.all(hull.switch_flop[0, : own - 1] > hull.flop[0, 0])
    assert np.all(hull.switch_flop[0, own - 1 :] == np.inf)


def test_models_of_one_catalogue_share_a_width():
    rng = np.random.default_rng(0)
    bits, flop = rng.lognormal(0, 1, (2, 6, 64))
    bits[1] = 0
    flop[2] = 0
    bits[3, 1:] = 0
    together = convex_hull(bits, flop)
    assert together.bits.shape == together.flop.shape
    widths = set()
    for i in range(len(bits)):
        alone = convex_hull(bits[i : i + 1], flop[i : i + 1])
        width = alone.bits.shape[1]
        widths.add(width)
        np.testing.assert_array_equal(together.bits[i, :width], alone.bits[0])
        np.testing.assert_array_equal(together.bits[i, width:], alone.bits[0, -1])
        np.testing.assert_array_equal(together.flop[i, :width], alone.flop[0])
        np.testing.assert_array_equal(together.flop[i, width:], alone.flop[0, -1])
        np.testing.assert_array_equal(together.switch_flop[i, : width - 1], alone.switch_flop[0])
    assert max(widths) == together.bits.shape[1]


@pytest.mark.parametrize(
    ("bits", "flop", "vertices"),
    [
        ([5], [3], [(5, 3)]),
        ([0, 0], [1, 1], [(0, 0)]),
        ([2, 3], [0, 0], [(5, 0)]),
        ([1, 1, 1], [1, 1, 1], [(1, 3), (3, 1)]),  # on one line: its ends alone
        ([0, 4, 0], [1, 2, 3], [(4, 5)]),
        ([1, 0, 1], [0, 2, 2], [(1, 4), (2, 2)]),
        ([3, 1, 1], [2, 1, 2], [(3, 5), (5, 2)]),
        ([3, 2, 1], [1, 2, 2], [(3, 5), (5, 4), (6, 2)]),
        ([1, 2, 2], [3, 1, 1], [(1, 5), (5, 1)]),
    ],
)
def test_hulls_by_hand(bits, flop, vertices):
    hull = hull_of(bits, flop)
    assert list(dict.fromkeys(zip(hull.bits[0], hull.flop[0], strict=True))) == vertices


def test_layers_in_single_precision_give_the_same_hull():
    rng = np.random.default_rng(1)
    bits, flop = rng.lognormal(0, 1, (2, 3, 20)).astype(np.float32)
    single, double = convex_hull(bits, flop), convex_hull(bits.astype(np.float64), flop.astype(np.float64))
    for ours, expected in zip(single, double, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_array_equal(ours, expected)


# ------------------------------------------------------------------ rates and latencies


def random_catalogue(seed, models, layers, zeros):
    rng = np.random.default_rng(seed)
    bits, flop = rng.lognormal(0, rng.uniform(0, 2), (2, models, layers))
    bits *= rng.random(bits.shape) >= zeros
    flop *= rng.random(flop.shape) >= zeros
    return bits * 1e6, flop * 1e9, rng


@pytest.mark.parametrize("layers", [1, 2, 5, 64])
@pytest.mark.parametrize("zeros", [0.0, 0.4, 0.9])
def test_least_rate_is_that_of_all_layers(layers, zeros):
    models, users = 40, 200
    bits, flop, rng = random_catalogue(layers, models, layers, zeros)
    speed = 10 ** rng.uniform(10, 12, users)
    # Slack of 0.5 to 100 times the compute of a typical model: some are late, and every vertex has its turn.
    slack = 10 ** rng.uniform(-0.3, 2, users) * (1e9 * layers + 1) / speed
    slack[:10] *= [0, 0, 0, -1, -1, 1e3, 1e3, 1e6, 1e6, 1e6]
    expected = np.asarray(rates_of_all_layers(bits, flop, slack, speed))
    result = np.asarray(rates_on_hull(convex_hull(bits, flop), slack, speed))
    np.testing.assert_array_equal(np.isinf(result), np.isinf(expected))
    np.testing.assert_allclose(result, expected, rtol=1e-9)
    assert 0 < np.isinf(expected).sum() < expected.size


@given(layers_in_whole_numbers, st.integers(-2, 60), st.sampled_from([0.5, 1.0, 4.0]))
def test_least_rate_at_exact_fits(model, halves, speed):
    """Slack, speed and work are exact in binary, and many slacks just fit."""
    bits, flop = (np.array([part], np.float64) for part in model)
    padding = ((0, 0), (0, 7 - bits.shape[1]))
    slack, speed = np.array([halves / 2]), np.array([speed])
    expected = rates_of_all_layers(np.pad(bits, padding), np.pad(flop, padding), slack, speed)
    result = rates_on_hull(convex_hull(bits, flop), slack, speed)
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("layers", [1, 5, 64])
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_latency_is_that_of_all_layers(layers, zeros):
    bits, flop, rng = random_catalogue(layers, 30, layers, zeros)
    rate, speed = 10 ** rng.uniform(3, 9, 100), 10 ** rng.uniform(8, 13, 100)
    rate[:3] = 0
    result = np.asarray(latencies_on_hull(convex_hull(bits, flop), rate, speed))
    expected = np.asarray(latencies_of_all_layers(bits, flop, rate, speed))
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_a_model_without_bits_asks_for_time_alone():
    hull = hull_of([0.0, 0.0], [1.0, 2.0])
    slack = np.array([2.9, 3.0, 3.1, 0.0, -1.0])
    rate = rates_on_hull(hull, slack, np.ones(5))[0]
    np.testing.assert_array_equal(rate, [np.inf, 0, 0, np.inf, np.inf])
    taking = latencies_on_hull(hull, np.array([0.0, 1.0]), np.ones(2))[0]
    np.testing.assert_array_equal(taking, 3)


def test_a_model_of_nothing_needs_a_deadline_not_before_the_start():
    rate = rates_on_hull(hull_of([0.0], [0.0]), np.array([-1e-9, 0.0, 1.0]), np.ones(3))[0]
    np.testing.assert_array_equal(rate, [np.inf, 0, 0])


def test_no_speed_is_late_unless_there_is_no_work():
    slack, speed = np.array([5.0, np.float64(5.0)]), np.zeros(2)
    assert np.all(np.isinf(rates_on_hull(hull_of([1.0], [1.0]), slack, speed)))
    assert np.all(np.isinf(rates_on_hull(hull_of([0.0], [1.0]), slack, speed)))


def test_single_precision_callers_stay_in_single_precision():
    bits, flop, _ = random_catalogue(2, 4, 9, 0.2)
    hull = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), convex_hull(bits, flop))
    slack, speed = np.float32([0.5, 3.0]), np.float32([1e10, 2e10])
    result = rates_on_hull(hull, slack, speed)
    assert result.dtype == latencies_on_hull(hull, speed, speed).dtype == np.float32
    expected = rates_of_all_layers(bits, flop, slack.astype(float), speed.astype(float))
    np.testing.assert_allclose(result, expected, rtol=1e-4)


# ------------------------------------------------------------------ batches, gradients, monotonicity


def test_drops_are_mapped():
    bits, flop, rng = random_catalogue(3, 4, 9, 0.2)
    hull = convex_hull(bits, flop)
    slack, speed = rng.uniform(0.1, 5, (2, 3, 7)) * 1e10 ** np.arange(2)[:, None, None]
    mapped = jax.vmap(rates_on_hull, (None, 0, 0))(hull, slack, speed)
    assert mapped.shape == (3, 4, 7)
    for drop in range(3):
        np.testing.assert_array_equal(mapped[drop], rates_on_hull(hull, slack[drop], speed[drop]))


def test_gradients_are_those_of_all_layers():
    bits, flop, rng = random_catalogue(4, 5, 12, 0.2)
    hull = convex_hull(bits, flop)
    slack, speed = rng.uniform(1.5, 6, 20), rng.uniform(1e10, 3e10, 20)

    def total(rates):
        return jnp.sum(jnp.where(jnp.isfinite(rates), rates, 0.0))

    ours = jax.grad(lambda *a: total(rates_on_hull(hull, *a)), (0, 1))(slack, speed)
    expected = jax.grad(lambda *a: total(rates_of_all_layers(bits, flop, *a)), (0, 1))(slack, speed)
    assert np.any(ours[0] != 0)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-9)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-9)


@given(layers_in_whole_numbers, st.floats(0, 60), st.floats(0, 60), st.sampled_from([0.5, 1.0, 4.0]))
def test_more_time_never_asks_for_more_rate(model, slack, other_slack, speed):
    slacks = np.sort([slack, other_slack])
    tight, loose = rates_on_hull(hull_of(*model), slacks, np.full(2, speed))[0]
    assert loose <= tight * (1 + 1e-12)
