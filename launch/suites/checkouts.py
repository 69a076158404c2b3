"""The suite `checkouts`: whole jobs of this checkout of the project against those of another.

Each run is a process of `launch.main` in the checkout's directory, and the checkouts take turns. Nothing of
the other one is imported here, so it may be of any commit that has the command and the fields of `JOBS`.
"""

import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hfedmoe_jax.errors import InputError
from launch.suites.population.rounds import SHARE, Size, make_fields
from launch.suites.population.suite import HEAVY, SMALL
from launch.suites.timing import Rate, Table, quartiles

THIS = pathlib.Path(__file__).parents[2]
ROUNDS = 6  # the first compiles and is no part of a rate
# The peak is read in the process itself: what the parent would see includes the parent's own memory.
RUN = """
import re, runpy, sys
try:
    runpy.run_module("launch.main", run_name="__main__", alter_sys=True)
finally:
    print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def suite_job(size: Size, clients: int, **fields: Any) -> dict[str, Any]:
    """Returns the config fields of rounds like those of the suite `population`, on the data of the config."""
    sections = make_fields(size) | {"partition": {"name": "iid"}}
    same = {f"{name}.{field}": value for name, part in sections.items() for field, value in part.items()}
    return same | {"fl.clients": clients, "fl.clients_per_round": clients} | fields


BUDGET = {"budget.fraction": SHARE, "importance.refresh": "previous", "fl.algorithm": "hfedmoe"}
JOBS: dict[str, dict[str, Any]] = {
    # Budgets from the devices may differ between commits; a share of the experts is the same work.
    "default, half of the experts": {"budget.fraction": 0.5},
    "small, all experts": suite_job(SMALL, 16),
    "heavy, all experts": suite_job(HEAVY, 8),
    f"heavy, {SHARE:.0%} routed": suite_job(HEAVY, 8, **BUDGET, **{"fl.forward": "routed"}),
    f"heavy, {SHARE:.0%} active": suite_job(HEAVY, 8, **BUDGET, **{"fl.forward": "active"}),
}
"""Fields of configs/hfedmoe.py by job."""


class Run(NamedTuple):
    """What a run of a job measured.

    Attributes:
      rate_hz: client steps a second.
      peak_mb: most resident memory of its process.
      trained: share of the experts that a client trained, mean over the rounds.
      client_rounds: how many ended which way.
    """

    rate_hz: float
    peak_mb: float
    trained: float
    client_rounds: Mapping[str, int]


def measure(repeats: int, against: str) -> Iterator[Table]:
    """Yields the one table of the suite.

    Args:
      repeats: of each job in each checkout, after a first run that fills the cache of compiled programs.
      against: directory of the other checkout.

    Raises:
      InputError: it is none, or its command refuses a job.
    """
    other = pathlib.Path(against).resolve()
    if not (other / "launch" / "main.py").is_file():
        raise InputError(
            "against", against, "has no launch/main.py", "give a directory of `git worktree add`"
        )
    rows = []
    for name, fields in JOBS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = alternate(fields, {"this": THIS, "other": other}, pathlib.Path(folder), repeats)
        rows.append([name, *compare(runs["this"], runs["other"])])
    yield Table(
        f"Jobs of {ROUNDS} rounds, this checkout and {other.name}; client-steps/s, MB resident",
        ["job", "rate", "other rate", "over it", "peak", "other peak", "peak over it", "trained over it"],
        rows,
        "The checkouts take turns, each run in a process. Programs come from a cache that a first, uncounted "
        "run filled. Ratios are of medians. Equal work trains equal shares of the experts.",
    )


def alternate(
    fields: Mapping[str, Any], trees: Mapping[str, pathlib.Path], folder: pathlib.Path, repeats: int
) -> dict[str, list[Run]]:
    """Returns the runs of a job in each checkout, all but the first of each."""
    runs: dict[str, list[Run]] = {name: [] for name in trees}
    for turn in range(1 + repeats):
        for name, tree in trees.items():
            runs[name].append(run_job(tree, fields, folder / f"{name}{turn}", folder / f"compiled-{name}"))
    return {name: each[1:] for name, each in runs.items()}


def run_job(
    tree: pathlib.Path, fields: Mapping[str, Any], workdir: pathlib.Path, compiled: pathlib.Path
) -> Run:
    """Runs a job in a checkout's directory."""
    fields = {"fl.rounds": ROUNDS, "eval.every": ROUNDS, "checkpoint.every": ROUNDS, **fields}
    command = [f"--workdir={workdir}", f"--compiled={compiled}", "--config=configs/hfedmoe.py"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    child = subprocess.run(
        [sys.executable, "-c", RUN, *command], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    *said, peak = child.stderr.splitlines()
    if child.returncode:
        problem = f"its launch.main ended with exit code {child.returncode}: {' '.join(said[-1:])}"
        raise InputError("against", str(tree), problem, "give a commit that has these fields")
    summary = json.loads((workdir / "summary.json").read_text())
    with open(workdir / "metrics.csv", encoding="utf-8") as file:
        trained = np.mean([float(row["trained_share"]) for row in csv.DictReader(file)])
    rate_hz = summary["client_steps_per_s"]
    return Run(rate_hz, int(peak) / 1e3, float(trained), summary["client_rounds"])


def compare(ours: list[Run], theirs: list[Run]) -> list[Any]:
    """Returns the values of a row: rates, peaks, and ratios of ours over theirs.

    Raises:
      AssertionError: clients ended in other ways, so the work was not the same.
    """
    if ours[0].client_rounds != theirs[0].client_rounds:
        raise AssertionError(f"client rounds {ours[0].client_rounds} here, {theirs[0].client_rounds} there")
    rates = [Rate(*quartiles([run.rate_hz for run in runs])) for runs in (ours, theirs)]
    peaks = [float(np.median([run.peak_mb for run in runs])) for runs in (ours, theirs)]
    trained = ours[0].trained / theirs[0].trained
    return [*rates, rates[0].median_hz / rates[1].median_hz, *peaks, peaks[0] / peaks[1], trained]
