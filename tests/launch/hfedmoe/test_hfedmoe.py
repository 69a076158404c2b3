"""A whole run of the command line: every promised file, the same bits again, a damaged checkpoint."""

import csv
import json
import math
import pathlib
import re
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import tiny_run
from tokenizers import Tokenizer

from hfedmoe_jax import Experiment, Outcome, make_mesh, tasks
from hfedmoe_jax.accounting import Ledger
from hfedmoe_jax.experiment import metric_columns
from hfedmoe_jax.quality import Quality
from launch.hfedmoe.experiment import summarize
from launch.run.command import read_command
from launch.run.writers import read_metrics

COLUMNS = metric_columns(tasks["classification"])
EVALUATION = {name for name in COLUMNS if name.startswith(("validation_", "client_accuracy_"))}
FIGURES = {
    "budget_union",
    "client_metric",
    "cost",
    "expert_choice",
    "expert_share",
    "expert_usage",
    "learning",
    "learning_time",
    "routing",
}


class Finished(NamedTuple):
    """A run of `tiny_run.arguments(workdir, train_path, **FIELDS)`, which nobody changes."""

    workdir: pathlib.Path
    train_path: pathlib.Path
    screen: tiny_run.Screen


FIELDS = {"fl__rounds": 6, "fl__local_steps": 4, "fl__chunk": 2, "partition__name": "iid", "eval__every": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    train_path = tiny_run.write_jsonl(folder / "train.jsonl", tiny_run.texts(90))
    screen = tiny_run.run_main(tiny_run.arguments(folder / "run", train_path, **FIELDS))
    return Finished(folder / "run", train_path, screen)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, and the command that made it."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    return tmp_path / "run", tiny_run.arguments(tmp_path / "run", finished.train_path, **FIELDS)


def test_a_run_ends_well_and_says_where_everything_is(finished):
    code, out, err = finished.screen
    assert (code, err) == (0, "")
    assert f"hfedmoe on file, in {finished.workdir}" in out
    assert "4 clients; 66 training, 12 validation, 12 test passages; 3 labels" in out
    assert "laptop 3, phone 3, tablet 3" in out
    assert "note: fl.chunk=2 is for accelerators" in out
    assert re.search(r"rounds 6/6  accuracy by passage [\d.]+  loss [\d.e-]+  .*elapsed", out)
    assert "Summary" in out and str(finished.workdir / "report.html") in out
    assert {path.name for path in finished.workdir.iterdir()} == {
        ".lock",
        "checkpoints",
        "clients.csv",
        "config.json",
        "figures",
        "fingerprints.json",
        "metrics.csv",
        "report.html",
        "summary.json",
        "tensorboard",
        "tokenizer.json",
    }


def test_the_config_is_kept_whole(finished):
    kept = json.loads((finished.workdir / "config.json").read_text())
    command = tiny_run.arguments(finished.workdir, finished.train_path, **FIELDS)
    config, *_ = read_command(command)
    assert kept == json.loads(config.to_json())
    assert (kept["fl"]["rounds"], kept["model"]["width"]) == (6, 8)


def test_metrics_have_a_row_a_round(finished):
    rows = read_metrics(finished.workdir / "metrics.csv")
    assert [tuple(row) for row in rows] == [COLUMNS] * 6
    assert [row["round"] for row in rows] == list(range(1, 7))
    for row in rows:
        empty = {name for name, value in row.items() if value is None}
        assert empty == (set() if row["round"] % 2 == 0 else EVALUATION)
        assert all(math.isfinite(value) for value in row.values() if value is not None)
        assert row["clients_ok"] == 3


def test_every_client_has_a_row(finished):
    with open(finished.workdir / "clients.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"client_{index}" for index in range(4)]
    assert [row["client"] for row in rows] == list("0123")
    summary = tiny_run.summary(finished.workdir)
    assert sum(int(row["training_passages"]) for row in rows) <= 66
    assert sum(int(row["rounds"]) for row in rows) == summary["client_rounds"]["ok"]
    assert {row["expert_budget"] for row in rows} == {"3"}
    accuracy = [float(row["passage_accuracy"]) for row in rows]
    assert np.mean(accuracy) == pytest.approx(summary["client_accuracy"]["mean"])


def test_scores_by_label_are_in_the_summary_and_the_report(finished):
    summary = tiny_run.summary(finished.workdir)
    by_class = summary["test_by_class"]
    assert list(by_class) == ["law", "money", "sport"]
    assert sum(scores["documents"] for scores in by_class.values()) == 12
    macro = np.mean([scores["f1"] for scores in by_class.values()])
    assert summary["test_document_macro_f1_final"] == pytest.approx(macro)
    right = sum(scores["recall"] * scores["documents"] for scores in by_class.values())
    assert summary["test_document_accuracy_final"] == pytest.approx(right / 12)
    page = (finished.workdir / "report.html").read_text(encoding="utf-8")
    assert "Test documents by label" in page and "<td>sport</td>" in page.replace('<th scope="row">', "<td>")
    assert "test accuracy by document, best" in page and "client accuracy by passage" in page
    for line in (
        r"test accuracy +[\d.]+ by passage, [\d.]+ by document,",
        r"majority class +[\d.]+ by passage",
        r"clients' own data +[\d.]+ mean by passage",
    ):
        assert re.search(line, finished.screen.out)


def test_tensorboard_has_the_same_numbers(finished):
    rows = read_metrics(finished.workdir / "metrics.csv")
    expected = {
        (row["round"], name): value
        for row in rows
        for name, value in row.items()
        if name != "round" and value is not None
    }
    events = {
        (step, name): value for step, name, value in tiny_run.read_events(finished.workdir / "tensorboard")
    }
    assert events.keys() == expected.keys()
    assert all(events[key] == pytest.approx(expected[key], rel=1e-6) for key in expected)


def test_the_newest_checkpoints_are_kept_and_the_last_holds_the_end(finished):
    assert tiny_run.steps(finished.workdir) == [4, 5, 6]
    state = tiny_run.last_state(finished.workdir)
    assert state[".round"] == 6
    assert state[".ledger.bytes_up"] == tiny_run.summary(finished.workdir)["bytes_up"]


def test_the_summary(finished):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    rows = read_metrics(finished.workdir / "metrics.csv")
    assert (summary["algorithm"], summary["seed"], summary["rounds"]) == ("hfedmoe", 0, 6)
    assert (summary["task"], summary["metric"]) == ("classification", "accuracy")
    assert summary["expert_budget"] == {"laptop": 3, "phone": 3, "tablet": 3}
    for name in ("bytes_up", "bytes_down"):
        assert summary[name] == sum(row[name] for row in rows) > 0
    for name in ("simulated_time_s", "wall_s"):
        assert summary[name] == rows[-1][name] > 0
    assert summary["client_steps_per_s"] > 0
    assert summary["client_rounds"] == {"ok": 18, "dropped_out": 0, "over_budget": 0, "nonfinite": 0}
    assert summary["client_accuracy"]["mean"] == rows[-1]["client_accuracy_mean"]
    scores = {row["round"]: row["validation_accuracy"] or -1 for row in rows}
    assert summary["best_round"] == max(scores, key=scores.get)
    assert summary["validation_accuracy_best"] == max(scores.values())
    for which in ("final", "best"):
        assert 0 <= summary[f"test_accuracy_{which}"] <= 1 and summary[f"test_loss_{which}"] > 0
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "device"} <= set(summary["versions"])


def test_the_summary_takes_every_figure_from_its_place(finished):
    command = tiny_run.arguments(finished.workdir, finished.train_path, **FIELDS)
    experiment = Experiment(read_command(command)[0], make_mesh())
    numbers = np.arange(10, 17).astype(np.float64)
    ledger = Ledger(*numbers)._replace(status_counts=np.array([1, 2, 3, 4]))
    state = experiment.init()._replace(round=5, best_round=2, best_score=0.6, ledger=ledger)
    final, best = (Quality(dict(accuracy=a, loss=b), None, 0.0, {}) for a, b in ((0.1, 0.2), (0.3, 0.4)))
    outcome = Outcome(final, best, 0.7, 3, None, (0.5, 0.6, 0.7), None, None, None)
    summary = summarize(experiment, state, outcome)
    assert [summary[f"test_{name}_final"] for name in ("accuracy", "loss")] == [0.1, 0.2]
    assert [summary[f"test_{name}_best"] for name in ("accuracy", "loss")] == [0.3, 0.4]
    assert (summary["rounds"], summary["best_round"], summary["validation_accuracy_best"]) == (5, 3, 0.7)
    assert summary["client_accuracy"] == {"mean": 0.5, "std": 0.6, "worst10": 0.7}
    totals = (summary[name] for name in ("simulated_time_s", "bytes_up", "bytes_down", "wall_s"))
    assert tuple(totals) == (10, 11, 12, 16)
    assert list(summary["client_rounds"].values()) == [1, 2, 3, 4]
    assert summary["client_steps_per_s"] == 15 / 14


def test_a_run_learns(finished):
    """Three topics of distinct words: far above the third that a constant answer has, from no knowledge."""
    summary = tiny_run.summary(finished.workdir)
    assert summary["baseline_accuracy"] == pytest.approx(1 / 3)
    assert summary["test_accuracy_final"] > 0.75
    assert summary["client_accuracy"]["mean"] > 0.75
    rows = read_metrics(finished.workdir / "metrics.csv")
    assert rows[-1]["train_loss"] < 0.6 < rows[0]["train_loss"]


def test_figures_open_and_the_report_needs_no_other_file(finished):
    html = tiny_run.complete_report(finished.workdir, FIGURES)
    for text in ("hfedmoe on file", "expert budget", "python -m launch.main", "orbax-checkpoint"):
        assert text in html


def test_the_tokenizer_is_kept(finished):
    tokenizer = Tokenizer.from_file(str(finished.workdir / "tokenizer.json"))
    assert len(tokenizer.encode("the judge").ids) == 2


def test_the_same_command_elsewhere_gives_the_same_bits(finished, tmp_path):
    command = tiny_run.arguments(tmp_path / "again", finished.train_path, **FIELDS)
    assert tiny_run.run_main(command).code == 0
    tiny_run.assert_same_results(tmp_path / "again", finished.workdir)


def test_a_run_belongs_to_its_data(finished, copy, tmp_path):
    """The same path with other texts: a first half of the file, and the labels of another."""
    workdir, command = copy
    train_path = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in finished.train_path.read_text().splitlines()]
    before = {
        path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"
    }
    relabelled = [row | {"label": rows[index - 1]["label"]} for index, row in enumerate(rows)]
    for other in (rows[: len(rows) // 2], relabelled):
        if other is relabelled:  # the checkpoints know too
            (workdir / "fingerprints.json").unlink()
        tiny_run.write_jsonl(train_path, other)
        moved = [argument.replace(str(finished.train_path), str(train_path)) for argument in command]
        kept = (workdir / "config.json").read_text()
        (workdir / "config.json").write_text(kept.replace(str(finished.train_path), str(train_path)))
        screen = tiny_run.run_main(moved)
        assert screen.code == 2
        assert screen.err.startswith(
            f"error: data.train_path='{train_path}': the texts or labels changed since"
        )
        assert screen.err.endswith("was started; restore them, or give another --workdir\n")
        (workdir / "config.json").write_text(kept)
    del before[workdir / "fingerprints.json"]
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
def test_more_rounds_continue_a_finished_run(finished, copy, tmp_path):
    """The first run's last round, which a longer one does not evaluate, leaves no trace in it."""
    fresh = tiny_run.arguments(tmp_path / "fresh", finished.train_path, **FIELDS)
    assert tiny_run.run_main([*fresh, "--config.fl.rounds=7"]).code == 0
    workdir, command = copy
    for rounds in (7, 8):  # 7 is evaluated as the last round, and then no longer
        screen = tiny_run.run_main([*command, f"--config.fl.rounds={rounds}"])
        assert screen.code == 0 and f"continuing after round {rounds - 1} of {rounds}" in screen.out
        if rounds == 7:
            tiny_run.assert_same_results(workdir, tmp_path / "fresh")
    assert [row["round"] for row in read_metrics(workdir / "metrics.csv") if row["validation_loss"]] == [
        2,
        4,
        6,
        8,
    ]
    screen = tiny_run.run_main(command)
    assert screen.code == 2 and "fl.rounds=6: the run in" in screen.err


def test_a_finished_run_is_not_trained_again(finished, copy):
    workdir, command = copy
    screen = tiny_run.run_main(command)
    assert (screen.code, screen.err) == (0, "")
    assert "this run is finished" in screen.out
    assert "rounds 6/6" in finished.screen.out and "rounds 6/6" not in screen.out
    for name in ("metrics.csv", "summary.json", "config.json", "tokenizer.json"):
        assert (workdir / name).read_bytes() == (finished.workdir / name).read_bytes(), name
    tiny_run.assert_same_results(workdir, finished.workdir)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(finished, copy):
    workdir, command = copy
    # Which file holds what is Orbax's affair, so each loses its second half.
    for path in (workdir / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    screen = tiny_run.run_main(command)
    assert screen.code == 0
    (warning,) = screen.err.splitlines()
    assert "checkpoint 6 is damaged" in warning and "continuing from checkpoint 5" in warning
    assert "continuing after round 5 of 6" in screen.out
    tiny_run.assert_same_results(workdir, finished.workdir)


def test_a_conflicting_config_names_the_field_and_changes_nothing(finished, copy):
    workdir, command = copy
    screen = tiny_run.run_main([*command, "--config.client.learning_rate=0.5"])
    assert screen.code == 2
    (line,) = screen.err.splitlines()
    assert line.startswith(
        f"error: client.learning_rate=0.5: the run in {workdir} was started with 0.02; give that value"
    )
    assert screen.out == ""
    tiny_run.assert_same_results(workdir, finished.workdir)
