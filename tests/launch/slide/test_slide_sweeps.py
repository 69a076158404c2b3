"""Rows of metrics.csv against sums by hand and a bootstrap; which user the timeline shows."""

import dataclasses

import numpy as np
import pytest

from launch.slide.sweeps import point_row, typical_user
from slide_jax.baselines import dai
from slide_jax.exact import exact
from slide_jax.experiment import Sweep
from slide_jax.problem import Users
from slide_jax.sampling import Setting
from slide_jax.scenario import make_problem


def row_of(exact_counts, dai_counts, saved, rho):
    """Returns the row of a single point from what each drop gave."""
    served = {"exact": np.array([exact_counts]), "dai": np.array([dai_counts])}
    setting = Setting(patience=1.5, users=20)
    return point_row(setting, Sweep(served, np.array([saved], float), np.array([rho], float)))


def test_means_and_intervals_by_hand():
    row = row_of([7, 9, 8, 12], [4, 6, 5, 5], [0.1, 0.3, 0.2, 0.4], [1.0, 2.0, 3.0, 6.0])
    assert (row["patience"], row["users"], row["rho"]) == (1.5, 20, 3.0)
    # Squared deviations 4, 0, 1, 9 over 3, and 1, 1, 0, 0 over 3, of 4 drops.
    assert row["served_exact"] == 9 and row["served_dai"] == 5
    assert row["served_exact_ci95"] == pytest.approx(1.96 * (14 / 3) ** 0.5 / 2)
    assert row["served_dai_ci95"] == pytest.approx(1.96 * (2 / 3) ** 0.5 / 2)
    assert row["latency_saved"] == pytest.approx(0.25)
    assert row["latency_saved_ci95"] == pytest.approx(1.96 * (0.05 / 3) ** 0.5 / 2)
    # Of the means, 9 / 5, not the mean of the quotients.
    assert row["users_gained"] == pytest.approx(0.8)


def test_drops_in_which_dai_serves_nobody_count_for_users_but_not_for_latency():
    row = row_of([2, 4, 6], [0, 3, 3], [np.nan, 0.1, 0.3], [np.nan, 1.0, 3.0])
    assert row["served_exact"] == 4 and row["users_gained"] == pytest.approx(1.0)
    assert row["latency_saved"] == pytest.approx(0.2) and row["rho"] == 2.0
    assert row["latency_saved_ci95"] == pytest.approx(1.96 * 0.02**0.5 / 2**0.5)


def test_nothing_is_gained_over_nothing():
    row = row_of([2, 3], [0, 0], [np.nan, np.nan], [np.nan, np.nan])
    names = ("users_gained", "users_gained_ci95", "latency_saved", "latency_saved_ci95", "rho")
    assert np.isnan([row[name] for name in names]).all()
    assert row["served_exact"] == 2.5 and row["served_dai"] == 0


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_the_interval_of_the_gain_is_that_of_a_bootstrap(shared):
    """Drops are drawn anew, both methods together: what moves both of them widens nothing."""
    rng = np.random.default_rng(0)
    drops = 400
    crowd = shared * rng.normal(0, 4, drops)
    conventional = np.maximum(np.round(20 + crowd + rng.normal(0, 2, drops)), 0).astype(int)
    best = np.maximum(np.round(1.3 * (20 + crowd) + rng.normal(0, 2, drops)), 0).astype(int)
    row = row_of(best, conventional, np.full(drops, 0.2), np.ones(drops))
    drawn = rng.integers(drops, size=(4000, drops))
    gains = best[drawn].mean(axis=1) / conventional[drawn].mean(axis=1) - 1
    low, high = np.quantile(gains, [0.025, 0.975])
    assert row["users_gained"] == pytest.approx(best.sum() / conventional.sum() - 1)
    assert row["users_gained_ci95"] == pytest.approx((high - low) / 2, rel=0.12)


def problem_of(deadlines):
    """Returns a problem of 1 s of work in two even layers, whose spectrum holds every user under DAI."""
    layers = [{"bits": 1e6, "flop": 5e8}, {"bits": 1e6, "flop": 5e8}]
    users = Users(
        task=0,
        min_accuracy=0.5,
        deadline_s=np.array(deadlines),
        start_s=0.0,
        energy_j=np.inf,
        spectral_efficiency_bps_hz=2.0,
        snr_hz=1e7,
        f_min_hz=1e9,
        f_max_hz=1e9,
        flop_per_cycle=1.0,
        kappa_j_per_hz2_cycle=0.0,
        static_power_w=0.0,
        memory_bits=np.inf,
    )
    models = [{"name": "even", "task": "vision", "accuracy": 0.9, "layers": layers}]
    return make_problem(models, users, 1e8)


def test_the_user_drawn_is_the_one_of_the_median_saving():
    # Half of the shorter of download and work overlaps: 1/4, none (late under DAI), 1/8 and 1/6 is saved.
    problem = problem_of([2.0, 0.9, 4.0, 1.5])
    conventional = dai(problem)
    assert conventional.served.tolist() == [True, False, True, True]
    user = typical_user(problem, conventional, exact(problem))
    assert (user.start_s, user.deadline_s) == (0.0, 1.5)
    np.testing.assert_allclose(user.arrival_s, [0.25, 0.5], rtol=1e-9)
    np.testing.assert_allclose(user.slide_begin_s, [0.25, 0.75], rtol=1e-9)
    np.testing.assert_allclose(user.slide_end_s, [0.75, 1.25], rtol=1e-9)
    np.testing.assert_allclose(user.dai_begin_s, [0.5, 1.0], rtol=1e-9)
    np.testing.assert_allclose(user.dai_end_s, [1.0, 1.5], rtol=1e-9)
    assert user.rho == pytest.approx(2.0)


def test_where_dai_serves_nobody_the_first_user_of_slide_is_drawn():
    # Work of 1 s leaves the first two no time to download, whoever serves them.
    problem = problem_of([0.9, 1.0, 1.2])
    nobody = dataclasses.replace(
        dai(problem),
        model=np.full(3, -1, np.int32),
        bandwidth_hz=np.zeros(3),
        frequency_hz=np.zeros(3),
        latency_s=np.full(3, np.nan),
    )
    user = typical_user(problem, nobody, exact(problem))
    assert user.deadline_s == 1.2 and user.slide_end_s[-1] == pytest.approx(1.2)
    assert typical_user(problem, nobody, nobody) is None
