"""Whole runs of the SLIDE command: every promised file, numbers that agree, a scenario of one's own."""

import dataclasses
import json
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import slide_run
import slide_strategies
import tiny_run

from launch.main import main
from launch.run.command import read_command
from launch.run.writers import read_metrics
from launch.slide import experiment
from launch.slide.sweeps import columns
from slide_jax.baselines import download_then_infer
from slide_jax.errors import InputError
from slide_jax.scenario import read_allocation, read_scenario
from slide_jax.settings import sample_drop
from slide_jax.solvers import SOLVERS, solve
from slide_jax.verification import verify

FIGURES = {
    "gap",
    "latency_cdf",
    "served_by_bandwidth",
    "served_by_deadline",
    "served_by_rho",
    "served_by_users",
    "timeline",
}


class Finished(NamedTuple):
    """A run of `slide_run.arguments(workdir)`, with compiled programs of its own; nobody changes it."""

    workdir: Any
    screen: tiny_run.Screen


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        return Finished(workdir, tiny_run.run_main(slide_run.arguments(workdir)))


@pytest.fixture(scope="module")
def own(finished, tmp_path_factory) -> Finished:
    """A run on the scenario that the other run wrote, solved by one heuristic."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    path = finished.workdir / "scenario.json"
    command = slide_run.arguments(workdir, scenario__path=path, solver="best_channel_first")
    return Finished(workdir, tiny_run.run_main(command))


def test_a_run_ends_well_and_says_where_everything_is(finished):
    code, out, err = finished.screen
    assert (code, err) == (0, "")
    assert out.startswith(f"SLIDE: 8 users, 3 models, 100 MHz, a drawn cell, in {finished.workdir}\n")
    table = out.partition("Solvers\n")[2].partition("\n\n")[0].splitlines()
    assert table[0].split() == [
        "solver",
        "served",
        "mean",
        "latency",
        "spectrum",
        "used",
        "gap",
        "proven",
        "bound",
        "ms",
    ]
    assert [line.split()[0] for line in table[1:]] == list(SOLVERS)
    assert re.search(r"points (\d+)/\1 ", out) and str(finished.workdir / "report.html") in out
    assert {path.name for path in finished.workdir.iterdir()} == {
        ".lock",
        "allocation.json",
        "config.json",
        "figures",
        "fingerprints.json",
        "metrics.csv",
        "compiled",
        "report.html",
        "scenario.json",
        "summary.json",
        "tensorboard",
    }


def test_the_allocation_answers_the_scenario_and_the_summary_counts_it(finished):
    problem = read_scenario(finished.workdir / "scenario.json")
    allocation = read_allocation(problem, finished.workdir / "allocation.json")
    assert verify(problem, allocation) == []
    summary = slide_run.read(finished.workdir, "summary")
    assert allocation.solver == summary["solver"] == "exact"
    assert allocation.throughput == summary["served"]["exact"] == summary["upper_bound"]["exact"]
    assert problem.num_users == summary["users"] == 8
    assert sum(summary["reasons"].values()) == 8 - allocation.throughput
    assert summary["mean_latency_s"]["exact"] == pytest.approx(np.nanmean(allocation.latency_s))
    assert summary["bandwidth_used_hz"]["exact"] == pytest.approx(allocation.bandwidth_used_hz)
    assert set(summary["served"]) == set(SOLVERS)
    for solver, gap in summary["gap"].items():
        assert 0 <= gap == summary["served"]["exact"] - summary["served"][solver]
    assert summary["gap"]["milp"] == summary["gap"]["relaxed"] == 0
    assert "dai" not in summary["gap"]


def test_the_gain_over_dai_is_that_of_the_same_users_at_the_same_spectrum(finished):
    """Replayed from the definition: the latency of every user that DAI serves, layer by layer."""
    problem = read_scenario(finished.workdir / "scenario.json")
    dai = solve(problem, "dai")
    dai_s, slide_s, rho = 0.0, 0.0, []
    for k in np.flatnonzero(dai.served):
        model, users = dai.model[k], problem.users
        download = problem.catalogue.layer_bits[model] / (
            dai.bandwidth_hz[k] * users.spectral_efficiency_bps_hz[k]
        )
        compute = problem.catalogue.layer_flop[model] / (dai.frequency_hz[k] * users.flop_per_cycle[k])
        arrived = done = 0.0
        for layer_download, layer_compute in zip(download, compute, strict=True):
            arrived += layer_download
            done = max(arrived, done) + layer_compute
        dai_s, slide_s = dai_s + download.sum() + compute.sum(), slide_s + done
        rho.append(compute.sum() / download.sum())
    versus = slide_run.read(finished.workdir, "summary")["against_dai"]
    assert versus["latency_saved"] == pytest.approx(1 - slide_s / dai_s)
    assert versus["rho"] == pytest.approx(np.mean(rho))
    served = slide_run.read(finished.workdir, "summary")["served"]
    assert versus["users_gained"] == pytest.approx(served["exact"] / served["dai"] - 1)


def test_metrics_have_a_row_a_point(finished):
    rows = read_metrics(finished.workdir / "metrics.csv")
    assert [tuple(row) for row in rows] == [("point", *columns())] * 6
    assert [row["point"] for row in rows] == list(range(1, 7))
    # The plain setting, which is a point of three sweeps, stands there once.
    plain, bandwidth, *rho, users = rows
    assert (plain["bandwidth_hz"], plain["patience"], plain["users"]) == (1e8, 1.0, 6)
    assert (bandwidth["bandwidth_hz"], users["users"]) == (5e7, 3)
    for row in rows:
        assert row["served_exact"] == row["served_relaxed"] >= row["served_random_order"]
        assert row["served_exact"] >= row["served_dai"]
        if row["served_dai"]:
            assert row["users_gained"] == pytest.approx(row["served_exact"] / row["served_dai"] - 1)
    # DAI fills the deadline, so that the share of compute that was drawn fixes rho.
    assert [row["rho"] for row in rho] == pytest.approx([0.25, 0.5, 2.0], rel=1e-6)
    for row in rho:
        assert 0 < row["latency_saved"] <= min(row["rho"], 1) / (1 + row["rho"]) + 1e-9


def test_tensorboard_has_the_same_numbers(finished):
    rows = read_metrics(finished.workdir / "metrics.csv")
    events = {
        (step, name): value for step, name, value in tiny_run.read_events(finished.workdir / "tensorboard")
    }
    for row in rows:
        assert events[row["point"], "served_dai"] == pytest.approx(row["served_dai"])


def test_the_summary_quotes_the_sweep(finished):
    found = slide_run.read(finished.workdir, "summary")["monte_carlo"]
    rows = read_metrics(finished.workdir / "metrics.csv")
    known = {name: value for name, value in found["plain"].items() if value is not None}
    assert known == {name: rows[0][name] for name in known}
    assert found["drops"] == 5
    assert found["rho_half"]["rho"] == pytest.approx(0.5, rel=1e-6)


def test_figures_open_and_the_report_needs_no_other_file(finished):
    html = tiny_run.complete_report(finished.workdir, FIGURES)
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", html, re.DOTALL)
    assert len(captions) == len(FIGURES)
    assert all("Setting" in caption and "rho" in caption and "users" in caption for caption in captions)
    for text in ("40% to 60% more users", "32.5% less latency", "How the gain depends on rho"):
        assert text in html


def test_the_same_command_again_gives_the_same_results(finished, tmp_path):
    def content(workdir):
        metrics = (workdir / "metrics.csv").read_bytes()
        names = ("scenario", "allocation", "summary", "config")
        return metrics, [slide_run.read(workdir, name) for name in names]

    before = content(finished.workdir)
    assert tiny_run.run_main(slide_run.arguments(finished.workdir)).code == 0
    assert content(finished.workdir) == before


def test_a_scenario_of_ones_own_is_solved_as_it_stands(finished, own):
    code, out, err = own.screen
    assert (code, err) == (0, "")
    assert f"8 users, 3 models, 100 MHz, {finished.workdir / 'scenario.json'}" in out
    # The solver that was asked for, and the two that it is compared with.
    table = out.partition("Solvers\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["exact", "dai", "best_channel_first"]
    drawn, summary = (slide_run.read(run.workdir, "summary") for run in (finished, own))
    assert summary["solver"] == "best_channel_first" and "monte_carlo" not in summary
    for solver in ("exact", "dai", "best_channel_first"):
        assert summary["served"][solver] == drawn["served"][solver]
    allocation = slide_run.read(own.workdir, "allocation")
    assert allocation["throughput"] == drawn["served"]["best_channel_first"]
    rows = read_metrics(own.workdir / "metrics.csv")
    assert [row["bandwidth_hz"] for row in rows] == [1e8, 5e7]
    assert rows[0]["served_exact"] == drawn["served"]["exact"] >= rows[1]["served_exact"]
    assert {path.stem for path in (own.workdir / "figures").iterdir()} == {
        "latency_cdf",
        "served_by_bandwidth",
        "timeline",
    }
    kept = [(run.workdir / "scenario.json").read_bytes() for run in (finished, own)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth_hz": 0.0},
        {"users": []},
        {"rate_model": "shannon"},
    ],
    ids=["no spectrum", "nobody", "shannon"],
)
def test_extreme_scenarios_are_ordinary(finished, tmp_path, change):
    scenario = json.loads((finished.workdir / "scenario.json").read_text()) | change
    path = tmp_path / "cell.json"
    path.write_text(json.dumps(scenario))
    fields = {"scenario__path": path, "monte_carlo__bandwidth_factors": (1.0,)}
    screen = tiny_run.run_main(slide_run.arguments(tmp_path / "run", **fields))
    assert (screen.code, screen.err) == (0, "")
    summary = slide_run.read(tmp_path / "run", "summary")
    if change != {"rate_model": "shannon"}:
        assert set(summary["served"].values()) == {0}
    problem = read_scenario(path)
    assert verify(problem, read_allocation(problem, tmp_path / "run" / "allocation.json")) == []


def test_a_drawn_cell_without_spectrum_is_ordinary_too(tmp_path):
    screen = tiny_run.run_main(slide_run.arguments(tmp_path / "run", setting__bandwidth_hz=0.0))
    assert (screen.code, screen.err) == (0, "")
    summary = slide_run.read(tmp_path / "run", "summary")
    assert set(summary["served"].values()) == {0}
    assert summary["reasons"] == {"needs more than the whole spectrum": 8}
    assert summary["monte_carlo"]["plain"]["users_gained"] is None
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "nan" not in re.sub('base64,[^"]*', "", html)


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_solver_is_run_by_name(tmp_path, solver):
    config, *_ = read_command(slide_run.arguments(tmp_path, solver=solver))
    problem = sample_drop(config)
    found = {name: allocation for name, allocation, _ in experiment.solve_all(config, problem)}
    assert list(found) == list(dict.fromkeys(["exact", "dai", solver]))
    assert found[solver].solver == solver and math.isfinite(found[solver].solve_s)


def test_the_second_call_is_timed_however_long_the_first_took(tmp_path, monkeypatch):
    calls = []

    def timed(problem, solver, **options):
        calls.append(solver)
        seconds = 1000.0 if calls.count(solver) == 1 else 0.25
        return dataclasses.replace(solve(problem, solver, **options), solve_s=seconds)

    monkeypatch.setattr(experiment, "solve", timed)
    config, *_ = read_command(slide_run.arguments(tmp_path, solver="exact"))
    solutions = experiment.solve_all(config, sample_drop(config))
    assert [found.allocation.solve_s for found in solutions] == [0.25, 0.25]
    assert calls == ["exact", "exact", "dai", "dai"]


def test_left_over_spectrum_is_handed_out(tmp_path):
    config, *_ = read_command(slide_run.arguments(tmp_path, solver="exact", left_over="proportional"))
    problem = sample_drop(config)
    (exact, dai) = (found.allocation for found in experiment.solve_all(config, problem))
    for allocation in (exact, dai):
        assert allocation.bandwidth_used_hz == pytest.approx(float(problem.bandwidth_hz))


def test_slow_solvers_are_left_out_of_all_but_not_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(SOLVERS, "milp", SOLVERS["milp"]._replace(max_users=7))
    config, *_ = read_command(slide_run.arguments(tmp_path))
    problem = sample_drop(config)
    found = {solution.solver: solution for solution in experiment.solve_all(config, problem)}
    assert found["milp"].allocation is None and "more than 7 users" in found["milp"].skipped
    table = experiment.solver_table(list(found.values()), problem)
    assert [row[1] for row in table.rows if row[0] == "milp"] == [found["milp"].skipped]
    config, *_ = read_command(slide_run.arguments(tmp_path, solver="milp"))
    assert experiment.solve_all(config, problem)[-1].allocation.solver == "milp"


def test_an_infeasible_answer_is_never_reported(tmp_path):
    config, *_ = read_command(slide_run.arguments(tmp_path))
    problem = sample_drop(config)
    best = solve(problem, "exact")
    wrong = dataclasses.replace(best, bandwidth_hz=0.5 * best.bandwidth_hz)
    with pytest.raises(RuntimeError, match="the solver exact violates a constraint: u"):
        experiment.check_feasible(problem, wrong)
    # DAI's latencies are not those of SLIDE: they are judged by their own rules.
    dai = solve(problem, "dai")
    assert verify(problem, dai) and not verify(download_then_infer(problem), dai)
    experiment.check_feasible(problem, dai)


def test_a_large_cell_is_solved_without_a_scenario_file(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "SCENARIO_USERS", 7)
    monkeypatch.setattr(experiment, "monte_carlo", lambda config: pytest.fail())
    with pytest.raises(pytest.fail.Exception):
        tiny_run.run_main(slide_run.arguments(tmp_path / "run"))
    assert not (tmp_path / "run" / "scenario.json").exists()
    assert len(slide_run.read(tmp_path / "run", "allocation")["users"]) == 8


def test_a_wrong_file_of_the_user_is_the_users_affair(tmp_path):
    config, *_ = read_command(slide_run.arguments(tmp_path, scenario__path="none.json"))
    with pytest.raises(InputError, match=r"scenario='none.json': no such file"):
        experiment.run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_work_directory_belongs_to_the_scenario_files_content(tmp_path, capsys):
    path, workdir = tmp_path / "cell.json", tmp_path / "run"
    arguments = [
        "--config=configs/slide.py:smoke",
        f"--config.scenario.path={path}",
        "--config.solver=exact",
        f"--workdir={workdir}",
    ]
    path.write_text(json.dumps(slide_strategies.scenario()))
    assert main(arguments) == 0
    answer = (workdir / "allocation.json").read_text()
    path.write_text(json.dumps({**slide_strategies.scenario(), "bandwidth_hz": 1.0}))
    capsys.readouterr()
    assert main(arguments) == 2
    assert "scenario.sha256" in capsys.readouterr().err
    assert (workdir / "allocation.json").read_text() == answer
    # What was solved can be solved again.
    again = [argument.replace(str(path), str(workdir / "scenario.json")) for argument in arguments[:-1]]
    assert main([*again, f"--workdir={tmp_path / 'again'}"]) == 0
    served = [
        json.loads((tmp_path / name / "summary.json").read_text())["served"] for name in ("run", "again")
    ]
    assert served[0] == served[1]
