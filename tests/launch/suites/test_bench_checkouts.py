"""The suite `checkouts`: what is measured of a run is read from the right places, and compared."""

import json
import pathlib

import pytest
import tiny_run

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.metrics import metric_columns
from hfedmoe_jax.tasks import classification
from launch import bench
from launch.suites import checkouts
from launch.suites.checkouts import Run

ENDED = {"ok": 3}


MAIN = """
import csv, json, pathlib, sys
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir()
held = bytearray({megabytes} * 10**6)
for start in range(0, len(held), 4096):
    held[start] = 1
summary = {{"client_steps_per_s": {rate}, "client_rounds": {{"ok": 3}}}}
(workdir / "summary.json").write_text(json.dumps(summary))
rows = [("round", "trained_share"), (1, 0.25), (2, {share})]
with open(workdir / "metrics.csv", "w") as file:
    csv.writer(file).writerows(rows)
"""
"""A command that writes what `checkouts` reads of a run, without computing anything."""


def checkout(directory, **numbers):
    (directory / "launch").mkdir(parents=True)
    (directory / "launch" / "main.py").write_text(MAIN.format(**numbers))
    return directory


def test_a_table_compares_what_the_runs_of_two_checkouts_wrote(tmp_path, monkeypatch):
    this = checkout(tmp_path / "this", rate=30.0, megabytes=300, share=0.75)
    other = checkout(tmp_path / "other", rate=20.0, megabytes=100, share=0.25)
    monkeypatch.setattr(checkouts, "THIS", this)
    monkeypatch.setattr(checkouts, "JOBS", {"tiny": {"fl.rounds": 3}})
    monkeypatch.setattr(bench, "LEAST_REPEATS", 1)
    command = ["--suite=checkouts", f"--against={other}", "--repeats=1", f"--workdir={tmp_path / 'new'}"]
    assert bench.main(command) == 0
    (table,) = json.loads((tmp_path / "new" / "bench.json").read_text())["tables"]
    (row,) = table["rows"]
    assert (row["rate"]["median_hz"], row["over it"], row["trained over it"]) == (30, 1.5, 2)
    # Beside what the interpreter needs, which is the same in both.
    assert row["peak"] - row["other peak"] == pytest.approx(200, rel=0.1)
    assert row["peak over it"] == pytest.approx(row["peak"] / row["other peak"])
    assert "trained_share" in metric_columns(classification)


def test_a_job_that_the_other_checkout_refuses_is_named(tmp_path):
    with pytest.raises(InputError, match=r"exit code 2: error: model\.no_such_field"):
        checkouts.run_job(tiny_run.ROOT, {"model.no_such_field": 1}, tmp_path / "run", tmp_path / "compiled")


def test_checkouts_take_turns_and_the_first_runs_are_not_counted(monkeypatch):
    order = []

    def run(tree, fields, workdir, compiled):
        order.append((tree.name, compiled.name))
        return Run(len(order), 1.0, 1.0, ENDED)

    monkeypatch.setattr(checkouts, "run_job", run)
    trees = {name: pathlib.Path(name) for name in ("a", "b")}
    runs = checkouts.alternate({}, trees, pathlib.Path("folder"), 2)
    assert order == 3 * [("a", "compiled-a"), ("b", "compiled-b")]
    assert [[each.rate_hz for each in runs[name]] for name in trees] == [[3, 5], [4, 6]]


def test_ratios_are_of_medians_ours_over_theirs():
    ours = [Run(rate, peak, 0.5, ENDED) for rate, peak in ((10, 100), (30, 300), (20, 200))]
    theirs = [Run(rate, 400, 0.25, ENDED) for rate in (40, 5, 8)]
    rate, other_rate, over, peak, other_peak, peak_over, trained = checkouts.compare(ours, theirs)
    assert (rate, other_rate.median_hz) == ((20, 15, 25), 8)
    assert (over, peak, other_peak, peak_over, trained) == (2.5, 200, 400, 0.5, 2)


def test_other_ends_of_clients_are_no_equal_work():
    with pytest.raises(AssertionError, match="client rounds"):
        checkouts.compare([Run(1, 1, 1, ENDED)], [Run(1, 1, 1, {"ok": 2})])
