"""Tiny runs of the command line for the end-to-end tests: how they start, and what they must leave."""

import base64
import contextlib
import csv
import io
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import matplotlib.image
import numpy as np
from orbax.checkpoint import v1 as ocp
from own_process import QUICK_TO_COMPILE, device_flags
from tensorboardX.proto.event_pb2 import Event

from launch.main import main

ROOT = pathlib.Path(__file__).parents[1]
TOPICS = {
    "law": ["court", "judge", "party", "vote"],
    "money": ["bank", "market", "price", "stock"],
    "sport": ["ball", "goal", "match", "team"],
}
COMMON = ["and", "in", "of", "the", "to", "with"]
REAL_TIME = ("wall_s", "client_steps_per_s")
"""Measured by a clock, so different in two equal runs."""


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Returns distinct documents, a third of each topic, whose words determine the label."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = list(TOPICS)[index % 3]
        words = [rng.choice(TOPICS[label] + COMMON) for _ in range(12)]
        rows.append({"text": " ".join([*words, rng.choice(TOPICS[label])]), "label": label})
    return rows


def write_jsonl(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def arguments(workdir: pathlib.Path, train_path: pathlib.Path, **fields: Any) -> list[str]:
    """Returns the command line of a tiny run, with `section__field=value` replaced or added."""
    fields = {
        "data__source": "file",
        "data__train_path": train_path,
        "data__seq_len": 16,
        "data__vocab_size": 128,
        "model__width": 8,
        "model__num_heads": 2,
        "model__hidden": 6,
        "model__num_experts": 3,
        "fl__batch_size": 4,
        "client__learning_rate": 0.02,
        **fields,
    }
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return [f"--config={ROOT}/configs/hfedmoe.py:smoke", f"--workdir={workdir}", *overrides]


class Screen(NamedTuple):
    """Exit code and output of a finished command."""

    code: int
    out: str
    err: str


def run_main(command: list[str]) -> Screen:
    """Runs a command line in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    return Screen(code, out.getvalue(), err.getvalue())


def start_process(command: list[str], devices: int | None = None) -> subprocess.Popen:
    """Starts a command line in a new process with this many devices; None: as the command chooses."""
    # Compiles quickly, as tests/conftest.py does here; other XLA_FLAGS belong to this process.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["XLA_FLAGS"] = QUICK_TO_COMPILE
    if devices:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_flags(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.main", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_process(command: list[str], devices: int | None = None) -> Screen:
    """Runs a command line in a new process with this many devices; None: as the command chooses."""
    child = start_process(command, devices)
    out, err = child.communicate(timeout=300)
    return Screen(child.returncode, out, err)


def refusal(command: list[str], folder: pathlib.Path) -> str:
    """Returns the one line of a command that ends with exit code 2 and leaves nothing in `folder`."""
    before = sorted(folder.iterdir())
    screen = run_main(command)
    assert (screen.code, screen.out) == (2, "")
    assert sorted(folder.iterdir()) == before
    (line,) = screen.err.splitlines()
    assert re.fullmatch(r"error: [\w.\[\]]+=.+: .+; .+", line)
    return line


def complete_report(workdir: pathlib.Path, figures: set[str]) -> str:
    """Returns report.html, after checking that it shows exactly these figures and loads no other file."""
    html = (workdir / "report.html").read_text(encoding="utf-8")
    paths = list((workdir / "figures").iterdir())
    assert {path.name for path in paths} == {f"{name}.png" for name in figures}
    for path in paths:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.01
        assert base64.b64encode(path.read_bytes()).decode() in html
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)|url\(([^)]+)""", html)
    assert len(addresses) == len(figures)
    assert all(address.startswith("data:image/png;base64,") for address, _ in addresses)
    return html


def metrics(workdir: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv as they are written, without the real time."""
    with open(workdir / "metrics.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in REAL_TIME} for row in csv.DictReader(file)]


def summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns summary.json without the fields that a clock measured."""
    content = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in REAL_TIME}


def steps(workdir: pathlib.Path) -> list[int]:
    """Returns the rounds that have a checkpoint."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def last_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every array of the newest checkpoint by its name, without the real times."""
    path = workdir / "checkpoints" / str(steps(workdir)[-1])
    # As host arrays, wherever they were saved.
    shapes = ocp.metadata(path).metadata
    leaves = ocp.load(path, jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes))["leaves"]
    real = (".ledger.wall_s", ".ledger.train_s", ".ledger.timed_steps")
    state = {
        name.removeprefix(".run"): np.asarray(leaf) for name, leaf in leaves.items() if name != ".metrics"
    }
    return {name: leaf for name, leaf in state.items() if name not in real}


def assert_same_results(one: pathlib.Path, other: pathlib.Path) -> None:
    """Fails unless two runs have the same metrics, summary and last state, bit for bit."""
    assert metrics(one) == metrics(other)
    assert summary(one) == summary(other)
    state, expected = last_state(one), last_state(other)
    assert state.keys() == expected.keys()
    for name, leaf in state.items():
        assert (leaf.dtype, leaf.shape) == (expected[name].dtype, expected[name].shape), name
        assert leaf.tobytes() == expected[name].tobytes(), name


def read_events(directory: pathlib.Path) -> list[tuple[int, str, float]]:
    """Returns the scalars of all TensorBoard files of a directory as (step, name, value)."""
    scalars = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:  # records: length, its checksum, data, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return scalars
