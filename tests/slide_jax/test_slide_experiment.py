"""Monte Carlo: every number is that of the solvers, one drop at a time."""

import chex
import jax
import numpy as np
import pytest

from slide_jax import experiment
from slide_jax.baselines import dai, download_then_infer
from slide_jax.checks import read_models
from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.experiment import compare_latencies, run_sweep, sample_latencies
from slide_jax.hull import convex_hull
from slide_jax.profiles import profile, to_model
from slide_jax.sampling import Setting, sample_problem
from slide_jax.solvers import SOLVERS, solve, sweep_solvers
from slide_jax.verification import verify

CATALOGUE = read_models([to_model(profile(name), 8) for name in ("resnet50", "resnet152")], None)[0]
SETTING = Setting(users=12, bandwidth_hz=3e7, accuracy_max=0.8)
DROPS, SEED = 3, 7


def drawn(setting=SETTING, rate_model="linear", count=12):
    """Returns the problems that a sweep sees."""
    with jax.enable_x64(True):
        keys = [jax.random.split(key)[0] for key in jax.random.split(jax.random.key(SEED), DROPS)]
        problems = [sample_problem(key, setting, CATALOGUE, count, rate_model) for key in keys]
        return [jax.tree.map(np.asarray, problem) for problem in problems]


def replayed(problem, allocation):
    """Returns latencies by the recursion and its two sums, one layer and one user at a time."""
    users, catalogue = problem.users, problem.catalogue
    slide, download = np.full((2, len(allocation.model)), np.nan)
    for k in np.flatnonzero(allocation.served):
        i = allocation.model[k]
        rate = allocation.bandwidth_hz[k] * users.spectral_efficiency_bps_hz[k]
        speed = allocation.frequency_hz[k] * users.flop_per_cycle[k]
        received = done = 0.0
        for bits, flop in zip(catalogue.layer_bits[i], catalogue.layer_flop[i], strict=True):
            received += bits / rate
            done = max(received, done) + flop / speed
        slide[k], download[k] = done, received
    return slide, download


@pytest.mark.parametrize(
    ("rate_model", "solvers"),
    [("linear", [name for name in sweep_solvers() if name != "random_order"]), ("shannon", ["exact", "dai"])],
)
def test_a_sweep_counts_what_the_solvers_serve(rate_model, solvers):
    settings = [SETTING, SETTING._replace(bandwidth_hz=6e7)]
    sweep = run_sweep(settings, CATALOGUE, DROPS, SEED, solvers, rate_model)
    assert set(sweep.served) == set(solvers)
    for point, setting in enumerate(settings):
        for drop, problem in enumerate(drawn(setting, rate_model)):
            for solver in solvers:
                assert sweep.served[solver][point, drop] == solve(problem, solver).throughput
    assert sweep.served["exact"].sum() > sweep.served["dai"].sum() > 0


def test_the_pure_function_of_every_solver_is_feasible():
    problem = drawn()[0]
    with jax.enable_x64(True):
        collapsed = download_then_infer(problem)
        hulls = [convex_hull(p.catalogue.layer_bits, p.catalogue.layer_flop) for p in (problem, collapsed)]
        drop = experiment.Drop(problem, hulls[0], collapsed, hulls[1], jax.random.key(0))
        for name in sweep_solvers():
            allocation = jax.tree.map(np.asarray, experiment.decide_drop(SOLVERS[name], drop))
            posed = collapsed if SOLVERS[name].download_first else problem
            assert verify(posed, allocation) == [], name


def test_latency_saved_is_that_of_the_same_users_spectrum_and_clocks():
    sweep = run_sweep([SETTING], CATALOGUE, DROPS, SEED)
    latencies = sample_latencies(SETTING, CATALOGUE, DROPS, SEED)
    for drop, problem in enumerate(drawn()):
        allocation = dai(problem)
        slide, download = replayed(problem, allocation)
        conventional = np.where(allocation.served, problem.users.deadline_s, np.nan)  # nothing is left over
        np.testing.assert_allclose(latencies.slide_s[drop], slide, rtol=1e-9)
        np.testing.assert_allclose(latencies.dai_s[drop], conventional, rtol=1e-9)
        rho = (conventional - download) / download
        np.testing.assert_allclose(latencies.rho[drop], rho, rtol=1e-9)
        np.testing.assert_allclose(sweep.rho[0, drop], np.nanmean(rho), rtol=1e-9)
        saved = 1 - np.nansum(slide) / np.nansum(conventional)
        np.testing.assert_allclose(sweep.saved[0, drop], saved, rtol=1e-9)
        alone = compare_latencies(problem, allocation)
        of_drop = jax.tree.map(lambda column, drop=drop: column[drop], latencies)
        chex.assert_trees_all_close(alone, of_drop, rtol=1e-12)


def test_where_dai_serves_nobody_nothing_is_compared():
    sweep = run_sweep([SETTING._replace(bandwidth_hz=1.0)], CATALOGUE, DROPS, SEED)
    assert not sweep.served["dai"].any()
    assert np.isnan(sweep.saved).all() and np.isnan(sweep.rho).all()


def test_all_points_see_the_same_drops_and_more_drawn_users_change_nobody_who_asks():
    settings = [SETTING, SETTING._replace(bandwidth_hz=6e7), SETTING]
    sweep = run_sweep(settings, CATALOGUE, DROPS, SEED)
    np.testing.assert_array_equal(sweep.served["exact"][0], sweep.served["exact"][2])
    assert (sweep.served["exact"][1] >= sweep.served["exact"][0]).all()
    few = SETTING._replace(users=2, bandwidth_hz=1e12)
    served = run_sweep([few], CATALOGUE, DROPS, SEED, count=12).served["exact"]
    possible = [np.isfinite(exact(problem).latency_s).sum() for problem in drawn(few)]
    np.testing.assert_array_equal(served[0], possible)
    assert served.max() <= 2


def test_points_of_one_count_share_one_program():
    run_sweep([SETTING], CATALOGUE, DROPS, SEED, count=14)
    compiled = experiment._sweep._cache_size()
    run_sweep([SETTING._replace(users=3, patience=1.5)], CATALOGUE, DROPS, SEED + 1, count=14)
    assert experiment._sweep._cache_size() == compiled


def test_random_orders_differ_between_drops_and_repeat_with_the_seed():
    sweeps = [run_sweep([SETTING], CATALOGUE, 20, seed, ["random_order"]) for seed in (0, 0, 1)]
    served = [sweep.served["random_order"] for sweep in sweeps]
    np.testing.assert_array_equal(served[0], served[1])
    assert (served[0] != served[2]).any() and len(np.unique(served[0])) > 1


@pytest.mark.parametrize(("name", "message"), [("exakt", "did you mean 'exact'"), ("milp", "unknown name")])
def test_a_solver_that_is_unknown_or_has_no_pure_function_is_named(name, message):
    with pytest.raises(InputError, match=f"solvers='{name}'.*{message}"):
        run_sweep([SETTING], CATALOGUE, DROPS, SEED, [name])


def test_fewer_users_drawn_than_ask_are_refused():
    with pytest.raises(InputError, match="12 users ask"):
        run_sweep([SETTING], CATALOGUE, DROPS, SEED, count=11)


def test_a_solver_that_is_redefined_is_compiled_again(monkeypatch):
    served = []
    for solver in (SOLVERS["exact"], SOLVERS["dai"]):
        monkeypatch.setitem(SOLVERS, "mine", solver)
        served.append(run_sweep([SETTING], CATALOGUE, DROPS, SEED, ["mine"]).served["mine"])
    expected = run_sweep([SETTING], CATALOGUE, DROPS, SEED).served
    np.testing.assert_array_equal(served, [expected["exact"], expected["dai"]])
    assert (served[0] != served[1]).any()
