"""The HFedMoE run: trains round by round in a work directory, resumes, evaluates and writes all results."""

import contextlib
import hashlib
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax import Experiment, Outcome, RunState, make_mesh
from hfedmoe_jax.checks import check_config
from hfedmoe_jax.data import num_rows
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.adapter_files import adapters_digest
from hfedmoe_jax.models.lora import LORA
from hfedmoe_jax.quality import Quality
from hfedmoe_jax.reports import OK, STATUS_NAMES, failed_clients
from launch.hfedmoe.data_notes import print_data_notes
from launch.hfedmoe.export import can_export, export_adapters, export_model
from launch.hfedmoe.figures import write_figures
from launch.hfedmoe.results import class_tables, introduction, readable, summary_rows
from launch.hfedmoe.run_notes import mixture_line, print_hints, run_line, waiting_line
from launch.hosts.devices import configure_devices, use_compilation_cache
from launch.hosts.distributed import (
    SINGLE_PROCESS,
    Host,
    gather_processes,
    is_first_process,
    start_processes,
    wait_for_processes,
)
from launch.run.checkpoints import Checkpoints, saved_digests
from launch.run.program import NothingTrainedError
from launch.run.progress import Progress, print_summary
from launch.run.report import write_report
from launch.run.workdir import (
    Fingerprint,
    check_workdir,
    hold_workdir,
    open_workdir,
    versions,
    write_json,
)
from launch.run.writers import MetricWriter, parse_metrics, write_rows


def run_experiment(
    config: ConfigDict,
    workdir: pathlib.Path,
    host: Host = SINGLE_PROCESS,
    source: Fingerprint | None = None,
) -> None:
    """Runs or continues the experiment of `config` in `workdir`, and writes everything there.

    With several processes, all of them compute; only the first writes files and prints.

    Raises:
      InputError: the config, the data or the directory cannot be used; nothing was written.
      NothingTrainedError: no update of any client counted; the results are written.
      OSError: the storage failed; it has the path, and a note of the round after which the run continues.
    """
    check_config(config)
    experts = config.mesh.experts
    configure_devices(config.fl.clients_per_round * experts, experts)
    with (
        start_processes(host.coordinator, host.processes, host.process, workdir / "checkpoints"),
        contextlib.nullcontext() if is_first_process() else no_stdout(),
    ):
        state = run_process(config, workdir, host, source)
    check_trained(state)  # here, where the other processes are no longer waited for


@contextlib.contextmanager
def no_stdout() -> Iterator[None]:
    """Discards what is printed in its context."""
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
        yield


def run_process(
    config: ConfigDict, workdir: pathlib.Path, host: Host, source: Fingerprint | None
) -> RunState:
    """Does the part of this process: trains with the others; the first process writes the results.

    Returns:
      The state after the last round.
    """
    check_same_config(config)
    if line := waiting_line(config):
        print(line, flush=True)
    experiment = Experiment(config, make_mesh(experts=config.mesh.experts))
    check_same_data(experiment)
    belongs_to = fingerprints(experiment, source)
    with hold_workdir(workdir) if is_first_process() else contextlib.nullcontext():
        if is_first_process():
            saved = saved_digests(workdir / "checkpoints")
            open_workdir(workdir, config.to_dict(), belongs_to, ["fl.rounds"], saved)
            (workdir / "tokenizer.json").write_text(experiment.data.tokenizer_json, encoding="utf-8")
            use_compilation_cache(host.compiled or workdir / "compiled")
        wait_for_processes()  # the others must not use the directory before it exists
        describe(experiment, workdir)
        state, metrics = train(experiment, workdir, {each.what: each.digest for each in belongs_to})
        outcome = experiment.finish(state)
        if is_first_process():
            write_results(experiment, Saved(state, metrics), outcome, workdir)
    return state


def check_trained(state: RunState) -> None:
    """Raises a `NothingTrainedError` if there were rounds, and no client's update counted in any."""
    counts = np.asarray(state.ledger.status_counts)
    if state.round and not counts[OK]:
        raise NothingTrainedError(f"{int(state.round)} rounds trained nothing: {failed_clients(counts)}")


def fingerprints(experiment: Experiment, source: Fingerprint | None) -> list[Fingerprint]:
    """Returns what the run belongs to beside its config: the config file, and the data as they were read."""
    data = experiment.config.data
    field = "train_path" if data.train_path else "source"
    found = experiment.fingerprint.items()
    of_data = [Fingerprint(f"data.{field}", data[field], what, digest) for what, digest in found]
    if experiment.start:
        what = "the checkpoint, or how experts are made of it,"
        checkpoint = Fingerprint(
            "model.source", experiment.config.model.source, what, experiment.start.digest
        )
        of_data.append(checkpoint)
    if adapters := experiment.config.model.adapters:
        of_data.append(Fingerprint("model.adapters", adapters, "the adapters", adapters_digest(adapters)))
    return [*([source] if source else []), *of_data]


def write_results(experiment: Experiment, saved: "Saved", outcome: Outcome, workdir: pathlib.Path) -> None:
    """Writes the figures, the report and summary.json, and prints the summary."""
    config, state = experiment.config, saved.run
    check_workdir(workdir)
    rows = parse_metrics(saved.metrics)
    summary = summarize(experiment, state, outcome)
    figures = write_figures(rows, record(experiment, state, outcome), workdir / "figures") if rows else []
    write_rows(workdir / "clients.csv", client_rows(experiment, state, outcome))
    write_report(
        workdir / "report.html",
        title=f"{config.fl.algorithm} on {config.data.source}",
        introduction=introduction(experiment),
        summary=readable({name: value for name, value in summary.items() if name != "test_by_class"}),
        sections=figures,
        tables=class_tables(summary),
        command=f"python -m launch.main {shlex.join(sys.argv[1:])}",
    )
    if can_export(experiment):
        export_model(experiment, state.best, workdir / "model")
        if state.best.added is not None:
            print(f"no adapters/: {config.fl.algorithm} adds to W in every round; model/ has the sums")
        elif config.model.train == LORA:
            export_adapters(experiment, state.best.params, workdir / "adapters")
    write_json(workdir / "summary.json", summary)
    print_summary("Summary", summary_rows(summary, workdir))


def check_same_config(config: ConfigDict) -> None:
    """Raises an `InputError` if the processes have different configs, which would deadlock them."""
    other = process_unlike(config.to_json(sort_keys=True))
    if other is not None:
        problem = f"process {other} has another config"
        raise InputError("config", config.experiment, problem, "give every process the same --config flags")


def check_same_data(experiment: Experiment) -> None:
    """Raises an `InputError` if the processes have read different data."""
    for field, value, what, digest in fingerprints(experiment, None):
        other = process_unlike(digest)
        if other is not None:
            problem = f"{what} of process {other} differ"
            raise InputError(field, value, problem, "give every host the same data")


def process_unlike(text: str) -> int | None:
    """Returns the first process that has another text than this one; every process must call it."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    different = np.flatnonzero((gather_processes(digest) != digest).any(axis=1))
    return int(different[0]) if len(different) else None


class Saved(NamedTuple):
    """What a checkpoint holds: the state, and the rows of metrics.csv up to it."""

    run: RunState
    metrics: str


def train(experiment: Experiment, workdir: pathlib.Path, digests: dict[str, str]) -> Saved:
    """Returns the state and rows after the last round; resumes from the newest checkpoint if there is one.

    Args:
      digests: of what the run belongs to, kept in its checkpoints.
    """
    config, task = experiment.config, experiment.task
    state, kept = experiment.init(), ""
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep, digests) as checkpoints:
        restored = checkpoints.restore(Saved(state, kept))
        if restored:
            state, kept = restored[1]
        first = int(state.round)
        if restored and first == config.fl.rounds:
            print("this run is finished: its results are written again; another --workdir starts a new one")
        elif restored:
            print(f"continuing after round {first} of {config.fl.rounds}")
        writer: Any = contextlib.nullcontext()
        if is_first_process():
            writer = MetricWriter(workdir, experiment.columns[1:], kept)
            if 0 < first < config.fl.rounds and not experiment.is_scheduled(first):
                writer.forget_evaluation()  # it was evaluated as the last round, which it no longer is
        with writer, Progress(config.fl.rounds, "rounds", initial=first) as progress:
            for number in range(first + 1, config.fl.rounds + 1):
                state, row, failures = experiment.step(state)
                if is_first_process():
                    check_workdir(workdir)
                    writer.write(number, row)
                    for failure in failures:
                        print(f"warning: {failure}", file=sys.stderr)
                if number % config.checkpoint.every == 0 or number == config.fl.rounds:
                    checkpoints.save(number, Saved(state, writer.text if is_first_process() else ""))
                score = {task.metric_name: row.get(f"validation_{task.metric}")}
                progress.update(number, **score, loss=row["train_loss"])
    return Saved(state, writer.text if is_first_process() else "")


def describe(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Prints the data and the expert budgets before the first round."""
    data, config = experiment.data, experiment.config
    sizes = (
        len(data.client_train),
        experiment.num_passages,
        num_rows(data.validation),
        num_rows(data.test),
    )
    print(f"{run_line(config)}, in {workdir}")
    print(f"{sizes[0]} clients; {sizes[1]:,} training, {sizes[2]:,} validation, {sizes[3]:,} test passages; "
          f"{len(data.label_names)} labels, vocabulary {data.vocab_size:,}")  # fmt: skip
    if experiment.start and experiment.start.report:
        print(mixture_line(experiment))
    budgets = budget_by_class(experiment)
    print(f"experts that a client can train, of {experiment.cost.all_experts}: "
          + ", ".join(f"{name} {budget}" for name, budget in budgets.items()))  # fmt: skip
    if is_first_process():
        print_data_notes(data.facts, len(data.client_train), config)
    print_hints(experiment)
    if config.fl.rounds:
        print("compiling the first round ...", flush=True)


def budget_by_class(experiment: Experiment) -> dict[str, int]:
    """Returns each device class's expert budget, for the classes that have clients."""
    return {
        profile.name: int(budget)
        for profile, budget in sorted(zip(experiment.profiles, experiment.budgets, strict=True))
    }


def summarize(experiment: Experiment, state: RunState, outcome: Outcome) -> dict[str, Any]:
    """Returns the content of summary.json."""
    config, ledger, metric = experiment.config, state.ledger, experiment.task.metric
    results = {
        f"test_{name}_{model}": value
        for model, quality in (("final", outcome.final), ("best", outcome.best))
        for name, value in quality.scores.items()
    }
    return {
        "algorithm": config.fl.algorithm,
        "task": config.task.name,
        "metric": metric,
        "unit": experiment.task.unit,
        "data": config.data.source,
        "seed": config.seed,
        "rounds": int(state.round),
        **results,
        "test_by_class": by_class(experiment.data.label_names, outcome.final),
        "best_round": outcome.best_round,
        f"validation_{metric}_best": outcome.best_score,
        "baseline": experiment.task.baseline_name,
        f"baseline_{metric}": experiment.baseline,
        f"client_{metric}": dict(zip(("mean", "std", "worst10"), outcome.client_spread, strict=True)),
        "expert_budget": budget_by_class(experiment),
        "experts": experiment.cost.all_experts,
        "client_rounds": dict(zip(STATUS_NAMES, ledger.status_counts.tolist(), strict=True)),
        "bytes_up": float(ledger.bytes_up),
        "bytes_down": float(ledger.bytes_down),
        "simulated_time_s": float(ledger.simulated_time_s),
        # None after a single round: its time is mostly compilation.
        "client_steps_per_s": float(ledger.timed_steps / ledger.train_s) if ledger.timed_steps else None,
        "wall_s": float(ledger.wall_s),
        **experiment.algorithm.summary(int(state.round)),
        **({"mixtures": report} if experiment.start and (report := experiment.start.report) else {}),
        "versions": versions(),
    }


def by_class(label_names: Sequence[str], quality: Quality) -> dict[str, dict[str, float]]:
    """Returns the scores of whole documents by label."""
    scores = quality.by_class
    return {
        label: {name: float(values[index]) for name, values in scores.items()}
        for index, label in enumerate(label_names)
        if scores
    }


def client_rows(experiment: Experiment, state: RunState, outcome: Outcome) -> list[dict[str, Any]]:
    """Returns the rows of clients.csv."""
    data, records, metric = experiment.data, state.server.records, experiment.task.metric
    trained = np.asarray(records.times_trained)
    return [
        {
            "client": client,
            "name": data.client_names[client],
            "device": experiment.profiles[client].name,
            "expert_budget": int(experiment.budgets[client]),
            "training_passages": int(experiment.sizes[client]),
            "rounds": int(records.rounds_measured[client]),
            "experts_aggregated": int((trained[client] > 0).sum()),
            f"{experiment.task.unit}_{metric}": float(outcome.client_scores[client]),
        }
        for client in range(experiment.num_clients)
    ]


def record(experiment: Experiment, state: RunState, outcome: Outcome) -> dict[str, Any]:
    """Returns the arrays that the figures need besides metrics.csv; see `figures.write_figures`."""
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
        "metric": experiment.task.metric,
        "unit": experiment.task.unit,
        "client_scores": outcome.client_scores,
        "client_num_examples": experiment.sizes,
        "expert_load": outcome.expert_load,
        "round_last": int(state.round),
        "baseline": experiment.baseline,
        "baseline_name": experiment.task.baseline_name,
    }
