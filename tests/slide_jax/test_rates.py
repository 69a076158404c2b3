"""Rate models against Newton in 60 decimal digits, SciPy, round trips and finite differences."""

import math
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from slide_jax import rates

shannon_rate = jax.jit(rates.shannon_rate)
shannon_bandwidth = jax.jit(rates.shannon_bandwidth)

LOADS = np.concatenate(
    [
        10.0 ** -np.linspace(0.01, 12, 25),
        1 - 10.0 ** -np.linspace(0.1, 12, 25),
        [0.59999, 0.6, 0.60001, 1e-300],
    ]
)
snrs = st.floats(1e5, 1e13)
load_levels = st.floats(-12, -1e-3)  # log10


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def efficiency_in_decimals(load):
    """u of u / expm1(u) = load, by Newton on ln(expm1(u) / u) + ln(load), which is convex and increasing."""
    with localcontext() as context:
        context.prec = 60
        load = Decimal(float(load))
        u = -2 * load.ln() + Decimal("1e-20")  # right of the root: ln(expm1(u) / u) > u / 2
        for _ in range(200):
            grown = u.exp()
            step = (((grown - 1) / u).ln() + load.ln()) / (grown / (grown - 1) - 1 / u)
            u -= step
            if abs(step) < u * Decimal("1e-30"):
                return u
    raise AssertionError("the oracle did not converge")


def test_efficiency_is_exact_to_a_few_units_in_the_last_place():
    result = np.asarray(jax.jit(rates.efficiency_at_load)(LOADS))
    for load, efficiency in zip(LOADS, result, strict=True):
        exact = efficiency_in_decimals(load)
        assert abs((Decimal(float(efficiency)) - exact) / exact) < 2e-15, load


def test_efficiency_is_lambert_w():
    loads = np.linspace(0.001, 0.95, 40)  # SciPy loses digits towards its branch point
    lambert = scipy.special.lambertw(-loads * np.exp(-loads), k=-1).real
    np.testing.assert_allclose(-(rates.efficiency_at_load(loads) + loads), lambert, rtol=1e-13)


def test_efficiency_in_single_precision():
    loads = np.float32([1e-30, 1e-6, 0.3, 0.6, 0.61, 0.99, 1 - 2**-24])
    exact = [float(efficiency_in_decimals(load)) for load in loads]
    result = rates.efficiency_at_load(loads)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, exact, rtol=1e-6)


@given(load_levels, snrs)
def test_shannon_bandwidth_inverts_the_rate(level, snr):
    rate = 10**level * snr / math.log(2)
    bandwidth = shannon_bandwidth(rate, snr)
    # The rate is flat in a wide band, so this direction is well conditioned for every load.
    np.testing.assert_allclose(shannon_rate(bandwidth, snr), rate, rtol=1e-14)


@given(st.floats(0, 1e9), snrs)
def test_shannon_rate_is_the_formula(bandwidth, snr):
    expected = bandwidth * math.log2(1 + snr / bandwidth) if bandwidth > snr * 1e-18 else 0.0
    np.testing.assert_allclose(shannon_rate(bandwidth, snr), expected, rtol=1e-12, atol=1e-3)


@pytest.mark.parametrize("snr", [1e25, 1e150, 1e300])
def test_shannon_rate_and_its_inverse_agree_at_any_power(snr):
    rate = 1e6
    bandwidth = shannon_bandwidth(rate, snr)
    np.testing.assert_allclose(
        bandwidth * (math.log(snr) - math.log(bandwidth)), rate * math.log(2), rtol=1e-12
    )
    np.testing.assert_allclose(shannon_rate(bandwidth, snr), rate, rtol=1e-12)


shannon_gradients = jax.jit(jax.grad(rates.shannon_bandwidth, (0, 1)))


@given(load_levels, snrs)
def test_shannon_gradients_are_implicit_derivatives_of_the_rate(level, snr):
    rate = 10**level * snr / math.log(2)
    by_rate, by_snr = shannon_gradients(rate, snr)
    bandwidth = float(shannon_bandwidth(rate, snr))
    x = snr / bandwidth
    # log1p(x) - x / (1 + x), by its series where the two cancel
    slope = (math.log1p(x) - x / (1 + x) if x > 0.05 else series_of_slope(x)) / math.log(2)
    np.testing.assert_allclose(by_rate, 1 / slope, rtol=1e-9)
    np.testing.assert_allclose(by_snr, -1 / (math.log(2) * (1 + x)) / slope, rtol=1e-9)


def series_of_slope(x):
    return sum((-1) ** n * x**n * (1 - 1 / n) for n in range(2, 15))


@pytest.mark.parametrize("load", [1e-6, 0.3, 0.9])
def test_shannon_gradients_follow_finite_differences(load):
    snr = 3e9
    rate = load * snr / math.log(2)
    check_grads(
        lambda r, s: shannon_bandwidth(r * rate, s * snr) / snr,
        (1.0, 1.0),
        order=2,
        eps=1e-5,
        rtol=1e-3,
    )
    check_grads(lambda b, s: shannon_rate(b * rate, s * snr) / rate, (1.0, 1.0), order=2, eps=1e-5, rtol=1e-3)


def test_no_rate_reaches_the_supremum():
    snr = np.array([1.0, 3e9, 1e13])
    supremum = snr / math.log(2)
    np.testing.assert_array_equal(shannon_rate(np.inf, snr), supremum)
    np.testing.assert_allclose(shannon_rate(1e9 * snr, snr), supremum, rtol=1e-9)
    np.testing.assert_array_equal(shannon_bandwidth(supremum * (1 + 1e-15), snr), np.inf)
    just_below = shannon_bandwidth(supremum * (1 - 1e-12), snr)
    # x = 2 (1 - load) in the limit; the load itself is known to 1e-16
    np.testing.assert_allclose(just_below, snr / 2e-12, rtol=1e-3)


@given(st.floats(0, 1e10), st.floats(0, 1e10), snrs, snrs)
def test_more_rate_needs_more_band_and_more_signal_less(rate, other_rate, snr, other_snr):
    low, high = sorted((rate, other_rate))
    weak, strong = sorted((snr, other_snr))
    slack = 1 + 1e-12
    assert shannon_bandwidth(low, snr) <= shannon_bandwidth(high, snr) * slack
    assert shannon_bandwidth(rate, strong) <= shannon_bandwidth(rate, weak) * slack


RATES_AT_CORNERS = np.array([0.0, 0.0, 1.0, 1e300, np.inf, np.inf, 1e-300])
SIGNAL_AT_CORNERS = np.array([0.0, 1e9, 0.0, 1e9, 1e9, 0.0, 1e9])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("ignore:overflow")  # 1e300 is out of reach in float32
@pytest.mark.parametrize("inverse", [rates.linear_bandwidth, shannon_bandwidth])
def test_bandwidth_at_the_corners(inverse, dtype):
    rate, signal = RATES_AT_CORNERS.astype(dtype), SIGNAL_AT_CORNERS.astype(dtype)
    result = inverse(rate, signal)
    assert result.dtype == dtype
    reachable = {rates.linear_bandwidth: dtype(1e300) / dtype(1e9), shannon_bandwidth: np.inf}[inverse]
    np.testing.assert_array_equal(result[:6], [0, 0, np.inf, reachable, np.inf, np.inf])
    # Under the linear model 1e-309 Hz, which is flushed; under the other a band far narrower than the rate.
    assert 0 <= float(result[6]) < 1e-300
    for gradient in jax.vmap(jax.grad(inverse, (0, 1)))(rate, signal):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shannon_rate_at_the_corners(dtype):
    bandwidth = np.array([0.0, 0.0, 1.0, np.inf, 1e-30], dtype)
    snr = np.array([0.0, 1e9, 0.0, 0.0, 1e13], dtype)
    result = shannon_rate(bandwidth, snr)
    np.testing.assert_array_equal(result[:4], 0)
    assert result.dtype == dtype and 0 <= result[4] < 1e-20
    for gradient in jax.vmap(jax.grad(shannon_rate, (0, 1)))(bandwidth, snr):
        assert np.all(np.isfinite(gradient))


@given(st.floats(0, 1e10, allow_subnormal=False), st.floats(1e-3, 10))
def test_linear_model_and_its_inverse(rate, efficiency):
    bandwidth = rates.linear_bandwidth(rate, efficiency)
    np.testing.assert_allclose(rates.linear_rate(bandwidth, efficiency), rate, rtol=1e-15)
    by_rate, by_efficiency = jax.grad(rates.linear_bandwidth, (0, 1))(rate, efficiency)
    np.testing.assert_allclose(by_rate, 1 / efficiency)
    np.testing.assert_allclose(by_efficiency, -rate / efficiency**2, atol=1e-300)


def test_spectral_efficiency_is_capped():
    np.testing.assert_allclose(rates.spectral_efficiency(np.array([0.0, 1.0, 7.0, 1e9]), 7.4), [0, 1, 3, 7.4])


def test_arguments_broadcast():
    result = shannon_bandwidth(np.full((3, 1), 1e6), np.array([1e9, 1e8]))
    assert result.shape == (3, 2)
    np.testing.assert_array_equal(result[0], result[2])
    assert result[0, 0] < result[0, 1]
