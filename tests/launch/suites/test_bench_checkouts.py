"""The suite `checkouts`: equal checkouts do equal work; what is measured is read from the right places."""

import json
import math
import pathlib

import pytest
import tiny_run

from hfedmoe_jax.errors import InputError
from launch import bench
from launch.suites import checkouts
from launch.suites.checkouts import Run

ENDED = {"ok": 3}


@pytest.fixture
def job(tmp_path):
    """The fields of a job of three rounds that takes seconds."""
    train_path = tiny_run.write_jsonl(tmp_path / "train.jsonl", tiny_run.texts(60))
    fields = tiny_run.arguments(tmp_path / "run", train_path, budget__fraction=0.34, fl__clients=4)[2:]
    fields = dict(field.removeprefix("--config.").split("=", 1) for field in fields)
    small = {"fl.rounds": 3, "fl.clients_per_round": 3, "fl.local_steps": 2, "data.long_text": "truncate"}
    return fields | small


def test_a_checkout_against_itself_does_equal_work(job, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setattr(checkouts, "JOBS", {"tiny": job})
    monkeypatch.setattr(bench, "LEAST_REPEATS", 1)
    command = [
        "--suite=checkouts",
        f"--against={tiny_run.ROOT}",
        "--repeats=1",
        f"--workdir={tmp_path / 'new'}",
    ]
    assert bench.main(command) == 0
    (table,) = json.loads((tmp_path / "new" / "bench.json").read_text())["tables"]
    (row,) = table["rows"]
    assert row["trained over it"] == 1
    assert row["over it"] == pytest.approx(row["rate"]["median_hz"] / row["other rate"]["median_hz"])
    assert 0 < row["over it"] < math.inf
    # Two processes with the same libraries: no peak of one is that of this one, or a part of it.
    assert row["peak"] > 50 and row["peak over it"] == pytest.approx(1, abs=0.3)


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
