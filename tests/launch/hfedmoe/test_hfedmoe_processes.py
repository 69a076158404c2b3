"""One run over several processes: the same results, whoever computes, and a clean end when one is killed."""

import shutil
import signal
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run

from configs.hfedmoe import get_config
from hfedmoe_jax.errors import InputError
from launch.hfedmoe import experiment
from launch.hosts.processes import EXIT_PROCESS_LOST

DEVICES = 4
FIELDS = {
    "client__learning_rate": 0.1,
    "client__optimizer": "sgd",
    "eval__every": 2,
    "fl__clients": 8,
    "fl__clients_per_round": 6,
    "fl__rounds": 4,
    "budget__fraction": 0.34,
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start_group(size: int, devices: int, command: list[str]) -> list:
    """Starts a run over so many processes, on so many devices in all."""
    address = f"--coordinator=localhost:{free_port()}"
    return [
        tiny_run.start_process(
            [*command, address, f"--processes={size}", f"--process={index}"], devices // size
        )
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
    screen = tiny_run.run_process(tiny_run.arguments(workdir, texts, **FIELDS), DEVICES)
    assert (screen.code, screen.err) == (0, "")
    return workdir


@pytest.mark.slow
def test_several_processes_give_the_results_of_one_bit_for_bit(tmp_path, texts, alone):
    """On as many devices."""
    size, workdir = 2, tmp_path / "run"
    results = end(start_group(size, DEVICES, tiny_run.arguments(workdir, texts, **FIELDS)))
    assert [(code, err) for code, _, err in results] == [(0, "")] * size
    assert "test accuracy" in results[0][1]
    assert all(out == "" for _, out, _ in results[1:])  # the first process alone talks
    assert len(tiny_run.metrics(workdir)) == FIELDS["fl__rounds"]
    tiny_run.assert_same_results(workdir, alone)
    assert (workdir / "report.html").exists()


def assert_near(one: list[dict], other: list[dict]) -> None:
    for row, expected in zip(one, other, strict=True):
        assert row.keys() == expected.keys()
        for name, text in row.items():
            assert (text == "") == (expected[name] == ""), name
            if text:
                assert float(text) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-5), name


def test_processes_with_unlike_configs_are_refused(monkeypatch):
    digests = []
    monkeypatch.setattr(experiment, "gather_processes", lambda own: digests.append(own) or np.stack(digests))
    config = get_config("smoke")
    for _ in range(2):
        experiment.check_same_config(config)
    config.seed += 1
    with pytest.raises(InputError, match="process 0 has another config"):
        experiment.check_same_config(config)


def test_processes_that_read_other_data_are_refused(monkeypatch):
    digests = []

    def gather(own):
        digests.append(own)
        return np.stack(digests)

    monkeypatch.setattr(experiment, "gather_processes", gather)
    for texts in ("one text", "one text"):
        assert experiment.process_unlike(texts) is None
    assert experiment.process_unlike("another") == 0
    digests.clear()
    smoke = SimpleNamespace(config=get_config("smoke"), fingerprint={"the texts or labels": "1"}, start=None)
    experiment.check_same_data(smoke)
    smoke.fingerprint = {"the texts or labels": "2"}
    with pytest.raises(InputError, match="the texts or labels of process 0 differ") as caught:
        experiment.check_same_data(smoke)
    assert caught.value.field == "data.source"


@pytest.mark.slow
def test_when_one_is_killed_the_others_stop_and_one_process_goes_on(tmp_path, texts):
    rounds, keep = 300, 4
    fields = FIELDS | {"fl__rounds": rounds, "eval__every": rounds, "checkpoint__keep": keep}
    workdir = tmp_path / "run"
    command = tiny_run.arguments(workdir, texts, **fields)
    children = start_group(2, 2, command)
    path = workdir / "metrics.csv"
    while children[0].poll() is None and len(tiny_run.steps(workdir)) < keep:
        time.sleep(0.02)
    children[1].send_signal(signal.SIGKILL)
    (code, _, err), _ = end(children)
    assert code == EXIT_PROCESS_LOST, err
    assert err.count("\n") == 1 and "host 1 of 2" in err and str(workdir / "checkpoints") in err
    whole = tiny_run.metrics(workdir)
    # Without the newest checkpoints the next run repeats rounds whose metrics are known.
    *_, done, before_last, last = tiny_run.steps(workdir)
    assert last <= len(whole) < rounds
    for step in (before_last, last):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    # The same command, on another number of devices: in one process that is interrupted soon.
    child = tiny_run.start_process(command, 1)
    while child.poll() is None and path.read_text().count("\n") < len(whole) + 2:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 130, err
    assert f"continuing after round {done} of {rounds}" in out
    rows = tiny_run.metrics(workdir)
    assert [int(row["round"]) for row in rows] == list(range(1, len(rows) + 1))
    assert rows[:done] == whole[:done]
    assert_near(rows[: len(whole)], whole)
