"""A run that is killed and started again ends as if nothing had happened."""

import re
import shutil
import signal
import time

import pytest
import tiny_run

ROUNDS = 20
# Experts are chosen by chance, so that the keys of every round matter too.
FIELDS = {
    "client__learning_rate": 0.1,
    "client__optimizer": "sgd",
    "eval__every": 2,
    "fl__algorithm": "random",
    "fl__rounds": ROUNDS,
}


def rows_written(workdir) -> int:
    """Returns how many rounds metrics.csv holds, -1 if there is no such file."""
    path = workdir / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def kill_after(command, workdir, rows) -> str:
    """Starts a run, kills it once it has written so many rounds, and returns what it printed."""
    child = tiny_run.start_process(command)
    while rows_written(workdir) < rows and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    out, err = child.communicate(timeout=180)
    assert child.returncode == -signal.SIGKILL, f"it was not killed in time\n{out}{err}"
    assert err == ""
    return out


@pytest.mark.slow
def test_a_run_killed_twice_ends_like_one_that_was_not(tmp_path):
    """At two moments while rounds and checkpoints are being written."""
    train = tiny_run.write_jsonl(tmp_path / "train.jsonl", tiny_run.texts(60))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    screen = tiny_run.run_process(tiny_run.arguments(whole, train, **FIELDS))
    assert (screen.code, screen.err) == (0, "")
    assert f"--config.fl.rounds={ROUNDS}" in (whole / "report.html").read_text(encoding="utf-8")

    command = tiny_run.arguments(killed, train, **FIELDS)
    for rows in (3, 9):
        out = kill_after(command, killed, rows)
        assert ("continuing after round" in out) == (rows == 9)
        assert rows <= rows_written(killed) < ROUNDS
        assert not (killed / "summary.json").exists()
    done = tiny_run.steps(killed)[-1]
    screen = tiny_run.run_process(command)
    assert (screen.code, screen.err) == (0, "")
    assert f"continuing after round {done} of {ROUNDS}" in screen.out
    assert [row["round"] for row in tiny_run.metrics(killed)] == [str(n) for n in range(1, ROUNDS + 1)]
    tiny_run.assert_same_results(killed, whole)


@pytest.mark.slow
def test_a_work_directory_removed_during_the_run_is_one_line(tmp_path):
    """Before the first round, so that Orbax makes a directory again."""
    train = tiny_run.write_jsonl(tmp_path / "train.jsonl", tiny_run.texts(60))
    run = tmp_path / "run"
    child = tiny_run.start_process(tiny_run.arguments(run, train, **FIELDS))
    while not (run / "config.json").exists() and child.poll() is None:
        time.sleep(0.002)
    while rows_written(run) < 0 and child.poll() is None:
        time.sleep(0.002)
    shutil.rmtree(run, ignore_errors=True)
    _, err = child.communicate(timeout=180)
    assert child.returncode == 1, err
    assert re.fullmatch(rf"error: {run}\S*: No such file or directory; put back what was removed .+\n", err)


@pytest.mark.slow
def test_a_run_that_trains_nothing_warns_each_round_and_ends_with_a_code_of_its_own(tmp_path):
    train = tiny_run.write_jsonl(tmp_path / "train.jsonl", tiny_run.texts(60))
    fields = {"fl__rounds": 2, "fl__dropout_probability": 0.999999}
    screen = tiny_run.run_main(tiny_run.arguments(tmp_path / "run", train, **fields))
    assert screen.code == 4
    assert screen.err.splitlines() == [
        "warning: round 1 trained nothing: 3 clients dropped out (fl.dropout_probability)",
        "warning: round 2 trained nothing: 3 clients dropped out (fl.dropout_probability)",
        "error: 2 rounds trained nothing: 6 clients dropped out (fl.dropout_probability)",
    ]
    assert (tmp_path / "run" / "report.html").exists()
