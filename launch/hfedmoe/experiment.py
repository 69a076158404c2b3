"""Runs a federated experiment in a work directory: progress, metrics, checkpoints, figures, report."""

import contextlib
import hashlib
import os
import pathlib
import shlex
import sys
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax import COLUMNS, Experiment, Outcome, RunState, make_mesh
from hfedmoe_jax.checks import check_config
from hfedmoe_jax.client import STATUS_NAMES
from hfedmoe_jax.errors import InputError
from launch.hfedmoe.figures import write_figures
from launch.hosts.devices import configure_devices, use_compilation_cache
from launch.hosts.distributed import (
    SINGLE_PROCESS,
    Host,
    gather_processes,
    is_first_process,
    start_processes,
    wait_for_processes,
)
from launch.run.checkpoints import Checkpoints
from launch.run.progress import Progress, format_seconds, format_value, print_summary
from launch.run.report import write_report
from launch.run.workdir import open_workdir, versions, write_json
from launch.run.writers import MetricWriter, read_metrics


def run_experiment(config: ConfigDict, workdir: pathlib.Path, host: Host = SINGLE_PROCESS) -> None:
    """Runs or continues the experiment of `config` in `workdir`, and writes everything there.

    Of several processes every one computes; the first alone writes and prints.

    Raises:
      InputError: the config, the data or the directory cannot be used; nothing was written.
    """
    check_config(config)
    experts = config.mesh.experts
    configure_devices(config.fl.clients_per_round * experts, experts)
    with start_processes(host.coordinator, host.processes, host.process, workdir / "checkpoints"):
        if is_first_process():
            run_here(config, workdir, host)
        else:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                run_here(config, workdir, host)


def run_here(config: ConfigDict, workdir: pathlib.Path, host: Host) -> None:
    """Runs this process's part."""
    check_same_everywhere(config)
    experiment = Experiment(config, make_mesh(experts=config.mesh.experts))
    writes = is_first_process()
    if writes:
        open_workdir(workdir, config.to_dict())
        (workdir / "tokenizer.json").write_text(experiment.data.tokenizer_json, encoding="utf-8")
        use_compilation_cache(host.compiled or workdir / "compiled")
    wait_for_processes()  # the directory is there
    describe(experiment, workdir)
    state = train(experiment, workdir)
    outcome = experiment.finish(state)
    if not writes:
        return
    rows = read_metrics(workdir / "metrics.csv")
    summary = summarize(experiment, state, outcome)
    figures = write_figures(rows, record(experiment, state, outcome), workdir / "figures")
    command = f"python -m launch.main {shlex.join(sys.argv[1:])}"
    write_report(
        workdir / "report.html",
        title=f"{config.fl.algorithm} on {config.data.source}",
        introduction=introduction(experiment),
        summary=summary,
        sections=figures,
        command=command,
    )
    write_json(workdir / "summary.json", summary)
    print_summary("Summary", summary_rows(summary, workdir))


def check_same_everywhere(config: ConfigDict) -> None:
    """Refuses processes that were given unlike configs: they would wait for each other for ever."""
    digest = np.frombuffer(hashlib.sha256(config.to_json(sort_keys=True).encode()).digest(), np.uint8)
    unlike = np.flatnonzero((gather_processes(digest) != digest).any(axis=1))
    if len(unlike):
        problem = f"process {unlike[0]} has another config"
        raise InputError("config", config.experiment, problem, "give every process the same --config flags")


def train(experiment: Experiment, workdir: pathlib.Path) -> RunState:
    """Returns the state after the last round, continuing from the newest checkpoint if there is one."""
    config = experiment.config
    state = experiment.init()
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore(state)
        if restored:
            state = restored[1]
        first = int(state.round)
        if first == config.fl.rounds:
            print("this run is finished: its results are written again; another --workdir starts a new one")
        elif restored:
            print(f"continuing after round {first} of {config.fl.rounds}")
        writer = contextlib.nullcontext()
        if is_first_process():
            writer = MetricWriter(workdir, COLUMNS[1:], resume_after=first if restored else None)
        with writer, Progress(config.fl.rounds, "rounds", initial=first) as progress:
            for number in range(first + 1, config.fl.rounds + 1):
                state, row, failures = experiment.step(state)
                if is_first_process():
                    writer.write(number, row)
                    for failure in failures:
                        print(f"warning: {failure}", file=sys.stderr)
                if number % config.checkpoint.every == 0 or number == config.fl.rounds:
                    checkpoints.save(number, state)
                progress.update(number, accuracy=row.get("validation_accuracy"), loss=row["train_loss"])
    return state


def describe(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Prints what is about to run."""
    data, config = experiment.data, experiment.config
    sizes = (
        len(data.client_train),
        experiment.num_passages,
        len(data.validation.labels),
        len(data.test.labels),
    )
    print(f"{config.fl.algorithm} on {config.data.source}, in {workdir}")
    print(f"{sizes[0]} clients; {sizes[1]:,} training, {sizes[2]:,} validation, {sizes[3]:,} test texts; "
          f"{len(data.label_names)} labels, vocabulary {data.vocab_size:,}")  # fmt: skip
    budgets = budget_by_class(experiment)
    print(f"experts that a client can train, of {experiment.cost.num_experts}: "
          + ", ".join(f"{name} {budget}" for name, budget in budgets.items()))  # fmt: skip
    selects = experiment.algorithm.composition.score != "none"
    if selects and min(experiment.budgets) == experiment.cost.num_experts:
        print("note: every client can train all experts, so nothing is selected: give the devices less "
              "memory, or set budget.fraction, e.g. 0.25")  # fmt: skip
    if config.fl.chunk > experiment.chunk:
        print(f"note: fl.chunk={config.fl.chunk} is for accelerators: a CPU computes clients one at a time, "
              "which is faster there")  # fmt: skip
    print("compiling the first round ...", flush=True)


def budget_by_class(experiment: Experiment) -> dict[str, int]:
    """Returns each device class's expert budget, for the classes that have clients."""
    return {
        profile.name: int(budget)
        for profile, budget in sorted(zip(experiment.profiles, experiment.budgets, strict=True))
    }


def summarize(experiment: Experiment, state: RunState, outcome: Outcome) -> dict[str, Any]:
    """Returns the content of summary.json."""
    config, ledger = experiment.config, state.ledger
    return {
        "algorithm": config.fl.algorithm,
        "parts": experiment.algorithm.composition._asdict(),
        "data": config.data.source,
        "seed": config.seed,
        "rounds": int(state.round),
        "test_accuracy_final": outcome.final.accuracy,
        "test_loss_final": outcome.final.loss,
        "test_accuracy_best": outcome.best.accuracy,
        "test_loss_best": outcome.best.loss,
        "best_round": int(state.best_round),
        "validation_accuracy_best": float(state.best_accuracy),
        "majority_accuracy": experiment.majority_accuracy(),
        "client_accuracy": dict(zip(("mean", "std", "worst10"), outcome.client_spread, strict=True)),
        "expert_budget": budget_by_class(experiment),
        "experts": experiment.cost.num_experts,
        "client_rounds": dict(zip(STATUS_NAMES, ledger.status_counts.tolist(), strict=True)),
        "bytes_up": float(ledger.bytes_up),
        "bytes_down": float(ledger.bytes_down),
        "simulated_time_s": float(ledger.simulated_time_s),
        # None after a single round, which compiles.
        "client_steps_per_s": float(ledger.timed_steps / ledger.train_s) if ledger.timed_steps else None,
        "wall_s": float(ledger.wall_s),
        "versions": versions(),
    }


def record(experiment: Experiment, state: RunState, outcome: Outcome) -> dict[str, Any]:
    """Returns the arrays that the figures draw, beside the metrics by round."""
    records = state.server.records
    rounds = np.asarray(records.rounds_measured)
    union = np.where(rounds > 0, np.asarray(records.union_total) / np.maximum(rounds, 1), np.nan)
    return {
        "num_layers": experiment.model.num_layers,
        "num_experts": experiment.model.num_experts,
        "device_class": [profile.name for profile in experiment.profiles],
        "budget": experiment.budgets,
        "union": union,
        "cohort": experiment.cohort(int(state.round)),
        "usage_before": outcome.usage_before,
        "usage_after": outcome.usage_after,
        "times_chosen": np.asarray(records.times_trained),
        "client_accuracy": outcome.client_accuracy,
        "client_num_examples": experiment.sizes,
        "expert_load": outcome.expert_load,
        "round_last": int(state.round),
        "majority_accuracy": experiment.majority_accuracy(),
    }


def introduction(experiment: Experiment) -> str:
    """Returns the report's opening sentence."""
    config = experiment.config
    return (
        f"{config.fl.rounds} rounds of {config.fl.algorithm} with {config.fl.clients_per_round} of "
        f"{experiment.num_clients} clients a round. The model has {experiment.model.num_layers} layers of "
        f"{experiment.model.num_experts} experts. Validation accuracy chose the best round; the test split "
        "was read once, at the end."
    )


def summary_rows(summary: dict[str, Any], workdir: pathlib.Path) -> list[tuple[str, Any]]:
    """Returns the lines of the table that the run prints at its end."""
    spread, speed = summary["client_accuracy"], summary["client_steps_per_s"]
    budgets = ", ".join(f"{name} {budget}" for name, budget in summary["expert_budget"].items())
    return [
        ("test accuracy", f"{summary['test_accuracy_final']:.4f} after the last round"),
        ("", f"{summary['test_accuracy_best']:.4f} of round {summary['best_round']}, the best on validation"),
        ("majority vote", f"{summary['majority_accuracy']:.4f}"),
        ("clients' own data", "{mean:.4f} mean, {std:.4f} std, {worst10:.4f} worst 10%".format(**spread)),
        ("expert budget", f"{budgets} of {summary['experts']}"),
        ("client rounds", ", ".join(f"{k} {v}" for k, v in summary["client_rounds"].items() if v)),
        ("sent", f"{summary['bytes_up'] / 1e6:,.1f} MB up, {summary['bytes_down'] / 1e6:,.1f} MB down"),
        ("simulated time", format_seconds(summary["simulated_time_s"])),
        ("speed", f"{format_value(speed)} client steps/s, {format_seconds(summary['wall_s'])} in all"),
        ("report", workdir / "report.html"),
        ("everything", workdir),
    ]
