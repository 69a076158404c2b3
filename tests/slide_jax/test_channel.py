"""Link budgets by hand; distributions of large samples under fixed keys, within five standard errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from slide_jax import channel
from slide_jax.rates import linear_rate, shannon_rate

COUNT = 100_000
KEY = jax.random.key(7)
# The distance of Kolmogorov and Smirnov exceeds this by chance once in ten million samples.
LARGEST_GAP = 2.9 / np.sqrt(COUNT)


def gap(sample, distribution):
    return scipy.stats.kstest(np.asarray(sample), distribution.cdf).statistic


def test_decibels():
    np.testing.assert_allclose(channel.db_to_linear(np.array([0.0, 10.0, -30.0])), [1, 10, 1e-3], rtol=1e-6)


def test_noise_is_thermal_at_290_kelvin():
    watts_per_hertz = 10 ** (channel.THERMAL_NOISE_DBM_PER_HZ / 10) / 1000
    np.testing.assert_allclose(watts_per_hertz, 1.380649e-23 * 290, rtol=0.01)


def test_path_loss():
    loss = channel.path_loss_db(np.array([1000.0, 100.0, 250.0]))
    np.testing.assert_allclose(loss, [128.1, 90.5, 105.4626], rtol=1e-6)
    assert channel.path_loss_db(0.0) == channel.path_loss_db(3.0) == channel.path_loss_db(10.0)
    assert np.isfinite(jax.grad(channel.path_loss_db)(0.0))
    np.testing.assert_allclose(channel.path_loss_db(100.0, 120.0, 20.0), 100.0, rtol=1e-6)


def test_mean_snr_is_the_quotient_of_watts():
    cell = channel.Cell()
    received_w = 10**3.3 / 1000 * 10**-10.54626
    noise_w = 1.380649e-23 * 290 * 10**0.7 * 1e8
    result = channel.mean_snr(105.4626, cell.power_dbm, cell.reference_bandwidth_hz, cell.noise_figure_db)
    np.testing.assert_allclose(result, received_w / noise_w, rtol=0.01)
    # 33 dBm - 105.4626 dB - (-174 + 7 + 80) dBm
    np.testing.assert_allclose(10 * np.log10(result), 14.5374, rtol=1e-5)
    gradient = jax.grad(channel.mean_snr, 3)(105.4626, 33.0, 1e8, 7.0)
    np.testing.assert_allclose(gradient, -np.log(10) / 10 * result, rtol=1e-4)


@pytest.mark.parametrize("minimum", [0.0, 50.0])
def test_users_are_uniform_over_the_disk(minimum):
    distance = channel.uniform_disk(KEY, COUNT, 250.0, minimum)
    assert np.min(distance) >= minimum and np.max(distance) <= 250 * (1 + 1e-6)
    area = (distance**2 - minimum**2) / (250.0**2 - minimum**2)
    assert gap(area, scipy.stats.uniform()) < LARGEST_GAP


def test_shadowing_is_normal_in_decibels():
    sample = channel.shadowing_db(KEY, (COUNT // 2, 2), 8.0)
    assert sample.shape == (COUNT // 2, 2)
    assert gap(sample.ravel(), scipy.stats.norm(0, 8)) < LARGEST_GAP
    assert np.all(channel.shadowing_db(KEY, (5,), 0.0) == 0)


def test_rayleigh_gain_is_exponential():
    gain = channel.fading_gain(KEY, (COUNT,), 0.0)
    assert gap(gain, scipy.stats.expon()) < LARGEST_GAP
    np.testing.assert_allclose(np.mean(gain), 1, atol=5 / np.sqrt(COUNT))


@pytest.mark.parametrize("rician_k", [1.0, 10.0])
def test_rician_gain_is_noncentral_chi_squared(rician_k):
    gain = channel.fading_gain(KEY, (COUNT,), rician_k)
    scale = 1 / (2 * (1 + rician_k))
    assert gap(gain, scipy.stats.ncx2(df=2, nc=2 * rician_k, scale=scale)) < LARGEST_GAP
    deviation = np.sqrt(1 + 2 * rician_k) / (1 + rician_k)
    np.testing.assert_allclose(np.mean(gain), 1, atol=5 * deviation / np.sqrt(COUNT))
    np.testing.assert_allclose(np.std(gain), deviation, rtol=0.05)


def test_a_strong_direct_path_hardly_fades():
    np.testing.assert_allclose(channel.fading_gain(KEY, (1000,), 1e8), 1, atol=1e-3)


def test_both_rate_models_agree_at_the_reference_bandwidth():
    cell = channel.Cell(efficiency_cap_bps_hz=1e3)
    drop = channel.sample_channel(KEY, 50, cell)
    np.testing.assert_allclose(
        shannon_rate(cell.reference_bandwidth_hz, drop.snr_hz),
        linear_rate(cell.reference_bandwidth_hz, drop.spectral_efficiency_bps_hz),
        rtol=1e-5,
    )


def test_the_snr_of_a_drop_is_its_mean_times_the_fading():
    cell = channel.Cell()
    drop = channel.sample_channel(KEY, COUNT, cell)
    mean = channel.mean_snr(
        channel.path_loss_db(drop.distance_m),
        cell.power_dbm,
        cell.reference_bandwidth_hz,
        cell.noise_figure_db,
    )
    fading = drop.snr_hz / cell.reference_bandwidth_hz / mean
    assert gap(fading, scipy.stats.expon()) < LARGEST_GAP
    near = drop.distance_m < np.median(drop.distance_m)  # fading and place are independent
    assert scipy.stats.ks_2samp(fading[near], fading[~near]).pvalue > 1e-6


def test_shadowing_of_a_drop():
    cell = channel.Cell(shadowing_db=6.0, rician_k=1e8)
    drop = channel.sample_channel(KEY, COUNT, cell)
    shadowing = 10 * jnp.log10(drop.snr_hz) - 80 - (33 - channel.path_loss_db(drop.distance_m) + 87)
    assert gap(shadowing, scipy.stats.norm(0, 6)) < LARGEST_GAP


def test_many_drops_under_jit_match_single_ones():
    keys = jax.random.split(KEY, 3)
    cell = channel.Cell(shadowing_db=8.0)
    draw = jax.jit(lambda keys, cell: jax.vmap(lambda key: channel.sample_channel(key, 4, cell))(keys))
    drops = draw(keys, cell)
    for index, key in enumerate(keys):
        one_drop = jax.tree.map(lambda column, index=index: column[index], drops)
        chex.assert_trees_all_close(one_drop, channel.sample_channel(key, 4, cell), rtol=1e-4)
    assert len(np.unique(drops.distance_m)) == 12
    smaller = draw(keys, cell._replace(radius_m=20.0))  # traced: another value, the same program
    assert np.all(smaller.distance_m <= 20) and draw._cache_size() == 1


@given(st.floats(-20, 60), st.floats(0, 12), st.floats(0, 12))
def test_power_helps_noise_hurts_and_the_cap_holds(power, noise_figure, cap):
    cell = channel.Cell(power_dbm=power, noise_figure_db=noise_figure, efficiency_cap_bps_hz=cap)
    drop = channel.sample_channel(KEY, 8, cell)
    better = channel.sample_channel(KEY, 8, cell._replace(power_dbm=power + 3.0))
    worse = channel.sample_channel(KEY, 8, cell._replace(noise_figure_db=noise_figure + 3.0))
    assert np.all(better.snr_hz > drop.snr_hz) and np.all(worse.snr_hz < drop.snr_hz)
    for efficiency in (drop.spectral_efficiency_bps_hz, better.spectral_efficiency_bps_hz):
        assert np.all(efficiency >= 0) and np.all(efficiency <= np.float32(cap))
    assert np.all(better.spectral_efficiency_bps_hz >= drop.spectral_efficiency_bps_hz)
