import os
import pty
import re
import subprocess
import sys

import pytest

from launch.run import progress
from launch.run.progress import Progress, print_summary, print_table


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_show_count_numbers_and_time_left(clock, capsys):
    with Progress(10, "rounds") as bar:
        clock[0] += 60  # compiles
        bar.update(1, accuracy=None, loss=1.23456)
        clock[0] += 10
        bar.update(2, accuracy=0.5, loss=1.0)
        clock[0] += 10
        bar.update(3, accuracy=None, loss=0.5)
    assert capsys.readouterr().out.splitlines() == [
        "rounds  1/10  loss 1.235  1:00 elapsed",
        "rounds  2/10  accuracy 0.5  loss 1  1:10 elapsed, ETA 1:20",
        "rounds  3/10  accuracy 0.5  loss 0.5  1:20 elapsed, ETA 1:10",
    ]


def test_time_left_after_a_resume_counts_only_this_process(clock, capsys):
    with Progress(100, "rounds", initial=90) as bar:
        clock[0] += 5
        bar.update(91)
        clock[0] += 2
        bar.update(92)
    assert capsys.readouterr().out.splitlines()[-1] == "rounds  92/100  0:07 elapsed, ETA 0:16"


@pytest.mark.parametrize(("total", "initial"), [(1, 0), (7, 0), (40, 0), (1000, 0), (1000, 990), (40, 39)])
def test_few_lines_over_a_run_and_always_the_first_and_the_last(clock, capsys, total, initial):
    with Progress(total, "rounds", initial) as bar:
        for completed in range(initial + 1, total + 1):
            clock[0] += 1
            bar.update(completed)
    counts = [int(re.search(r"(\d+)/", line)[1]) for line in capsys.readouterr().out.splitlines()]
    assert counts[0] == initial + 1 and counts[-1] == total
    assert len(counts) == len(set(counts)) <= 20
    assert len(counts) >= min(total - initial, 10)


ON_A_TERMINAL = """
import sys
from launch.run.progress import Progress
with Progress(4, "rounds", initial=2) as bar:
    bar.update(3, accuracy=0.8125, loss=0.123456)
    print("warning: client 7", file=sys.stderr)
    bar.update(4, accuracy=0.875, loss=0.1)
"""


def test_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    os.close(ours)
    assert child.wait() == 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()))
    assert "warning: client 7" in [line.strip() for line in lines]
    last = next(line for line in reversed(lines) if "rounds" in line)
    assert re.fullmatch(r"rounds ━+ 4/4 accuracy 0.875  loss 0.1 0:0\d elapsed", last.strip())
    assert all(len(line) <= 80 for line in lines)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux: the other end was closed
        return b""


def test_summary_is_plain_and_keeps_paths_whole_when_piped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = "/home/" + "x" * 90 + "/report.html"
    text = "phone [small] 3, tablet 6, laptop 12, workstation 16 of 16 experts, and a little more text"
    print_summary("Done", [("accuracy", 0.81234), ("budget", text), ("report", path), ("best", None)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[1] == "Done"
    assert f"  report    {path}" in lines
    assert "  accuracy  0.8123" in lines and "  best      -" in lines
    assert "phone [small] 3" in out
    assert all(len(line) <= 80 for line in lines if path not in line)


def test_a_table_is_aligned_and_not_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    rows = [("exact", "1,234", "[red] 0.5 s"), ("milp", "skipped: too many users", "")]
    print_table("Solvers", ("solver", "served", "mean latency"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Solvers",
        "  solver                   served  mean latency",
        "  exact                     1,234   [red] 0.5 s",
        "  milp    skipped: too many users",
    ]
