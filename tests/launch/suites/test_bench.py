"""The benchmark command: what it measures agrees, what it writes can be read, mistakes are named."""

import json
import types

import numpy as np
import pytest

from launch import bench
from launch.suites import timing
from launch.suites.slide import suite
from launch.suites.slide.peers import solve_dense, solve_hull
from slide_jax.exact import exact


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suite, "USERS", (40, 60))
    monkeypatch.setattr(suite, "MILP_USERS", 40)
    monkeypatch.setattr(suite, "LAYERS", 5)
    monkeypatch.setattr(suite, "MODELS", 3)
    monkeypatch.setattr(suite, "QUANTISED", ((("lstm",), (0.3, 0.5)),))
    monkeypatch.setattr(suite, "QUANTISED_USERS", 8)


@pytest.mark.slow
def test_the_suite_writes_its_tables(small, tmp_path, capsys):
    assert bench.main(["--suite=slide", "--repeats=3", f"--workdir={tmp_path / 'new'}"]) == 0
    record = json.loads((tmp_path / "new" / "bench.json").read_text())
    titles = [table["title"].split(",")[0] for table in record["tables"]]
    assert titles == [
        "Exact optimum",
        "Latency",
        "Relaxed optimizer",
        "Bits by layer at the noise of 8 everywhere",
    ]
    exact_rows, latency_rows, relaxed_rows, quantised_rows = (table["rows"] for table in record["tables"])
    assert [row["users"] for row in exact_rows] == [40, 60]
    assert exact_rows[0]["HiGHS"]["median_s"] > 0 and exact_rows[1]["HiGHS"] is None
    row = exact_rows[1]
    fastest = min(row["NumPy dense"]["median_s"], row["NumPy hull"]["median_s"])
    assert row["NumPy / exact"] == pytest.approx(fastest / row["exact"]["median_s"])
    assert {row["kernel"] for row in latency_rows} == {
        "latency",
        "latency_closed_form",
        "latency_associative",
    }
    assert all(row["certified gap"] >= row["gap to exact"] >= 0 for row in relaxed_rows)
    assert [row["equal bits"] for row in quantised_rows] == ["4.0"]  # half of the users, by construction
    printed = capsys.readouterr().out
    assert "Exact optimum" in printed and "bench.json" in printed


@pytest.mark.parametrize("users", [1, 37, 500])
def test_the_peers_decide_as_the_exact_solver_does(users):
    problem = suite.random_problem(users)
    ours = exact(problem)
    for peer in (solve_dense, solve_hull):
        served, who, model, clock, bandwidth = peer(problem)
        assert served == ours.throughput
        np.testing.assert_array_equal(who, ours.served)
        np.testing.assert_array_equal(model[who], ours.model[who])
        np.testing.assert_allclose(clock[who], ours.frequency_hz[who], rtol=1e-12)
        np.testing.assert_allclose(bandwidth[who], ours.bandwidth_hz[who], rtol=1e-9)


def test_a_peer_that_disagrees_stops_the_suite(small, monkeypatch):
    monkeypatch.setattr(suite, "solve_hull", lambda problem: (0,))
    with pytest.raises(AssertionError, match="'hull': 0"):
        suite.exact_table(3)


def test_calls_take_turns_and_the_first_round_is_not_counted():
    calls = []
    times = timing.time_together(3, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == ["a", "b"] * 4
    assert set(times) == {"a", "b"}
    assert all(low <= median <= high for median, low, high in times.values())


@pytest.mark.parametrize(
    "arguments, field",
    [
        ([], "suite"),
        (["--suite=slid"], "did you mean 'slide'"),
        (["--suite=slide", "--repeats=2"], "repeats=2"),
        (["--suite=slide", "--repeats=x"], "repeats"),
        (["--suite=slide", "extra"], "argument='extra'"),
        (["--suite=slide", "--peers"], "peers=True: is no option of the suite slide"),
        (["--suite=population", "--against=."], "against='.': is no option of the suite population"),
        (["--suite=checkouts"], "against='': the suite checkouts needs it"),
        (["--suite=checkouts", "--against=configs"], "against='configs': has no launch/main.py"),
        (["--suite=slide", "--wordir=x"], "wordir"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, field, capsys):
    assert bench.main(arguments) == 2
    message = capsys.readouterr().err
    assert field in message and message.count("\n") == 1


@pytest.mark.parametrize("flag, options", [([], {}), (["--peers"], {"peers": True})])
def test_a_suite_is_told_of_peers(flag, options, monkeypatch, tmp_path):
    told = []
    table = timing.Table("T", ["who", "how many"], [["us", timing.rate(timing.Timing(2.0, 1.0, 4.0), 8)]])
    monkeypatch.setattr(
        bench.importlib,
        "import_module",
        lambda name: types.SimpleNamespace(
            measure=lambda *args, **kwargs: told.append((args, kwargs)) or [table]
        ),
    )
    assert bench.main(["--suite=population", f"--workdir={tmp_path}", *flag]) == 0
    assert told == [((9,), options)]
    (row,) = json.loads((tmp_path / "bench.json").read_text())["tables"][0]["rows"]
    assert row == {"who": "us", "how many": {"median_hz": 4, "low_hz": 2, "high_hz": 8}}


def test_a_rate_falls_as_the_time_grows():
    found = timing.rate(timing.each_of(timing.Timing(2.0, 1.0, 4.0), 4), 3)
    assert found == (6, 3, 12) and timing.cell(found) == "6 (3-12)"


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench.main(["--suite=slide", f"--workdir={tmp_path / 'file' / 'below'}"]) == 2
    assert "workdir" in capsys.readouterr().err


def test_help_names_the_flags(capsys):
    assert bench.main(["--help"]) == 0
    assert "--suite" in capsys.readouterr().out
