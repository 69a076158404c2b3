"""Whole runs over real kinds of data files, and one whose training diverges."""

import csv
import re

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_run

from hfedmoe_jax import load_federated
from hfedmoe_jax.tasks import classification
from launch.run.command import read_command
from launch.run.writers import read_metrics

NUM_FIGURES = 9
OWNERS = ["Zürich", "東京", "a, b", "Łódź"]


def real_rows(count, seed=0):
    """Returns documents as people have them: long, empty, in other scripts, quoted, over several lines."""
    rows = tiny_run.texts(count, seed)
    rows[0]["text"] = ""
    rows[1]["text"] = 'naïve "quoted", 市場 🚀\nsecond line'
    rows[2]["text"] = "ball goal " * 200
    return [row | {"owner": OWNERS[index % 4]} for index, row in enumerate(rows)]


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


WRITERS = {"parquet": write_parquet, "csv": write_csv, "jsonl": tiny_run.write_jsonl}


def test_every_kind_of_file_gives_the_same_data(tmp_path):
    numbers = dict(zip(tiny_run.TOPICS, [10, 2, 7], strict=True))
    loaded = []
    for suffix, write in WRITERS.items():
        path = tmp_path / f"train.{suffix}"
        write(path, [row | {"label": numbers[row["label"]]} for row in real_rows(48)])
        fields = {"data__client_column": "owner", "partition__name": "column"}
        config, *_ = read_command(tiny_run.arguments(tmp_path / "run", path, **fields))
        loaded.append(load_federated(config, classification.prepare))
    assert loaded[0].label_names == ("2", "7", "10")
    assert set(loaded[0].client_names) == set(OWNERS)
    for other in loaded[1:]:
        jax.tree.map(np.testing.assert_array_equal, vars(other), vars(loaded[0]))


@pytest.mark.slow
def test_local_models_of_owners_from_parquet_run_to_the_end(tmp_path):
    """Whole numbers as labels, owners as clients, a test file of its own, a model a client."""
    train, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    numbers = dict(zip(tiny_run.TOPICS, [10, 2, 7], strict=True))
    write_parquet(train, [row | {"label": numbers[row["label"]]} for row in real_rows(48)])
    write_parquet(test, [row | {"label": numbers[row["label"]]} for row in tiny_run.texts(9, seed=1)])
    fields = {
        "client__optimizer": "sgd",
        "data__client_column": "owner",
        "data__test_path": test,
        "fl__algorithm": "local",
        "fl__rounds": 2,
        "partition__name": "column",
    }
    screen = tiny_run.run_main(tiny_run.arguments(tmp_path / "run", train, **fields))
    assert (screen.code, screen.err) == (0, "")
    assert "4 clients; 42 training, 6 validation, 9 test passages; 3 labels" in screen.out
    summary = tiny_run.summary(tmp_path / "run")
    assert summary["rounds"] == 2 and summary["client_rounds"]["ok"] == 6
    assert summary["bytes_up"] == summary["bytes_down"] == 0 < summary["simulated_time_s"]
    assert 0 <= summary["test_accuracy_final"] <= 1 and summary["test_loss_final"] > 0
    assert len(list((tmp_path / "run" / "figures").iterdir())) == NUM_FIGURES


@pytest.mark.slow
def test_a_diverging_run_over_csv_goes_on_drops_the_updates_and_says_so(tmp_path):
    """With a learning rate of 1e30 every client's loss ends as NaN: the model stays as it was."""
    train = tmp_path / "train.csv"
    words = dict(zip(tiny_run.TOPICS, ["größe", "Sport", "法"], strict=True))
    write_csv(train, [row | {"label": words[row["label"]]} for row in real_rows(60)])
    fields = {
        "client__learning_rate": 1e30,
        "client__optimizer": "sgd",
        "data__tokenizer": "bpe",
        "data__vocab_size": 300,
        "fl__algorithm": "fedavg",
    }
    screen = tiny_run.run_main(tiny_run.arguments(tmp_path / "run", train, **fields))
    assert screen.code == 4
    *warnings, error = screen.err.splitlines()
    cause = "clients had a loss or a score that is not finite (client.learning_rate, fl.score)"
    assert error == f"error: 3 rounds trained nothing: 9 {cause}"
    rounds = [line for line in warnings if "trained nothing" in line]
    assert rounds == [f"warning: round {number} trained nothing: 3 {cause}" for number in (1, 2, 3)]
    warnings = [line for line in warnings if line not in rounds]
    found = [re.fullmatch(r"warning: client (\d), round (\d): .* dropped", line) for line in warnings]
    assert len({match.groups() for match in found}) == len(warnings) == 9
    assert [match[2] for match in found] == list("111222333")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [(row["clients_ok"], row["clients_nonfinite"], row["bytes_up"]) for row in rows] == [(0, 3, 0)] * 3
    assert [row["train_loss"] for row in rows] == [None] * 3
    assert len({row["validation_loss"] for row in rows}) == 1 and np.isfinite(rows[0]["validation_loss"])
    summary = tiny_run.summary(tmp_path / "run")
    assert summary["client_rounds"] == {"ok": 0, "dropped_out": 0, "over_budget": 0, "nonfinite": 9}
    assert np.isfinite(summary["test_loss_final"])
    assert len(list((tmp_path / "run" / "figures").iterdir())) == NUM_FIGURES
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
