"""One run over several processes: the same results, whoever computes, and a clean end when one is killed."""

import json
import signal
import socket
import time

import pytest
import tiny_run

from launch.peers import EXIT_PEER_LOST

ROUNDS = 4
FIELDS = {
    "client__learning_rate": 0.1,
    "client__optimizer": "sgd",
    "eval__every": 2,
    "fl__clients": 8,
    "fl__clients_per_round": 6,
    "fl__rounds": ROUNDS,
    "budget__fraction": 0.34,
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start_group(size: int, command: list[str]) -> list:
    """Starts a run over so many processes."""
    address = f"--coordinator=localhost:{free_port()}"
    return [
        tiny_run.start([*command, address, f"--processes={size}", f"--process={index}"])
        for index in range(size)
    ]


def end(children: list) -> list[tuple[int, str, str]]:
    results = []
    for child in children:
        out, err = child.communicate(timeout=300)
        results.append((child.returncode, out, err))
    return results


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return tiny_run.write_jsonl(tmp_path_factory.mktemp("texts") / "train.jsonl", tiny_run.texts(90))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, texts):
    """The run in one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    screen = tiny_run.run_apart(tiny_run.arguments(workdir, texts, **FIELDS))
    assert (screen.code, screen.err) == (0, "")
    return workdir


def assert_near(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) == ROUNDS
    for row, expected in zip(one, other, strict=True):
        assert row.keys() == expected.keys()
        for name, text in row.items():
            assert (text == "") == (expected[name] == ""), name
            if text:
                assert float(text) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_metrics_of_one(size, tmp_path, texts, alone):
    workdir = tmp_path / "run"
    results = end(start_group(size, tiny_run.arguments(workdir, texts, **FIELDS)))
    assert [(code, err) for code, _, err in results] == [(0, "")] * size
    assert "test accuracy" in results[0][1]
    assert all(out == "" for _, out, _ in results[1:])  # the first process alone talks
    assert_near(tiny_run.metrics(workdir), tiny_run.metrics(alone))
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (workdir, alone))
    assert summary["test_accuracy_final"] == pytest.approx(expected["test_accuracy_final"], abs=1e-5)
    assert summary["client_rounds"] == expected["client_rounds"]
    assert (workdir / "report.html").exists()


def test_when_one_is_killed_the_others_stop_and_one_process_goes_on(tmp_path, texts):
    rounds = 300
    fields = FIELDS | {"fl__rounds": rounds, "eval__every": rounds, "checkpoint__every": 1}
    workdir = tmp_path / "run"
    command = tiny_run.arguments(workdir, texts, **fields)
    children = start_group(2, command)
    path = workdir / "metrics.csv"
    while children[0].poll() is None and not (path.exists() and path.read_text().count("\n") > 5):
        time.sleep(0.02)
    children[1].send_signal(signal.SIGKILL)
    (code, _, err), _ = end(children)
    assert code == EXIT_PEER_LOST, err
    assert err.count("\n") == 1 and "host 1 of 2" in err and str(workdir / "checkpoints") in err
    done = tiny_run.steps(workdir)[-1]
    assert 0 < done < rounds
    # The same command, on another number of devices: in one process that is interrupted soon.
    child = tiny_run.start(command)
    while child.poll() is None and path.read_text().count("\n") < done + 4:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert f"continuing after round {done} of {rounds}" in out
    numbers = [int(row["round"]) for row in tiny_run.metrics(workdir)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > done
