"""The SLIDE run: solves one cell with every solver, sweeps over random drops, and writes all results."""

import hashlib
import pathlib
import shlex
import sys
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from launch.hosts.devices import use_compilation_cache
from launch.hosts.distributed import SINGLE_PROCESS, Host
from launch.run.progress import print_summary, print_table
from launch.run.report import write_report
from launch.run.workdir import Fingerprint, hold_workdir, open_workdir, versions, write_json
from launch.run.writers import MetricWriter
from launch.slide.figures import write_figures
from launch.slide.report import (
    Solution,
    figure_texts,
    introduction,
    overview,
    solver_table,
    sweep_tables,
    title,
)
from launch.slide.sweeps import (
    Study,
    columns,
    latency_saved,
    mean,
    monte_carlo,
    nearest,
    own_scenario,
    quotient,
    typical_user,
)
from slide_jax.baselines import download_then_infer
from slide_jax.errors import InputError
from slide_jax.experiment import compare_latencies
from slide_jax.problem import REASONS, Allocation, Problem
from slide_jax.scenario import read_scenario, write_allocation, write_scenario
from slide_jax.settings import ALL, check_config, sample_drop
from slide_jax.solvers import SOLVERS, solve
from slide_jax.verification import verify

SCENARIO_USERS = 10_000
"""Users up to which a cell is written to scenario.json; larger files are unwieldy to edit."""


def run_experiment(
    config: ConfigDict,
    workdir: pathlib.Path,
    host: Host = SINGLE_PROCESS,
    source: Fingerprint | None = None,
) -> None:
    """Runs the experiment of `config` and writes everything into `workdir`.

    Raises:
      InputError: the config, the scenario or the directory cannot be used; nothing was written.
    """
    check_single_process(host)
    check_config(config)
    problem = read_scenario(config.scenario.path) if config.scenario.path else sample_drop(config)
    with hold_workdir(workdir):
        open_workdir(workdir, identity(config), [source] if source else [])
        run_cell(config, problem, workdir, host)


def run_cell(config: ConfigDict, problem: Problem, workdir: pathlib.Path, host: Host) -> None:
    """Solves the cell, runs the sweeps and writes the results."""
    begun = time.perf_counter()
    use_compilation_cache(host.compiled or workdir / "compiled")
    print(f"{title(config, problem)}, in {workdir}", flush=True)
    if problem.num_users <= SCENARIO_USERS:
        write_scenario(problem, workdir / "scenario.json")
    solutions = solve_and_print(config, problem)
    allocations = {found.solver: found.allocation for found in solutions if found.allocation}
    chosen = allocations["exact" if config.solver == ALL else config.solver]
    write_allocation(problem, chosen, workdir / "allocation.json")
    study = run_study(config, problem)
    write_metrics(study, workdir)
    summary = summarize(config, problem, allocations, chosen, study)
    user = typical_user(problem, allocations["dai"], allocations["exact"])
    figures = write_figures(study, user, figure_texts(config, problem, study, user), workdir / "figures")
    lines = overview(summary)
    write_report(
        workdir / "report.html",
        title=title(config, problem),
        introduction=introduction(config, study),
        summary={**dict(lines), "versions": summary["versions"]},
        sections=figures,
        command=f"python -m launch.main {shlex.join(sys.argv[1:])}",
        tables=[solver_table(solutions, problem), *sweep_tables(study)],
    )
    write_json(workdir / "summary.json", {**summary, "wall_s": time.perf_counter() - begun})
    print_summary("Summary", [*lines, ("report", workdir / "report.html"), ("everything", workdir)])


def check_single_process(host: Host) -> None:
    """Raises an `InputError` if the command asks for several processes."""
    if host._replace(compiled=None) != SINGLE_PROCESS:
        problem, remedy = "this experiment runs in one process", "leave out the flags of several processes"
        raise InputError("--coordinator", host.coordinator, problem, remedy)


def solve_and_print(config: ConfigDict, problem: Problem) -> list[Solution]:
    """Returns the solutions of all requested solvers, and prints them as a table."""
    print("solving; each solver is compiled first ...", flush=True)
    solutions = solve_all(config, problem)
    table = solver_table(solutions, problem)
    print_table(table.title, table.header, table.rows)
    print(
        "\n  gap: users served fewer than by exact. dai solves another problem and has no gap.\n"
        "  A user who gets just the spectrum that it needs ends at its deadline."
    )
    return solutions


def run_study(config: ConfigDict, problem: Problem) -> Study:
    """Returns the sweeps: of the user's scenario over its spectrum, else over random drops."""
    if config.scenario.path:
        print("\nsolving the scenario again with parts and multiples of its spectrum ...", flush=True)
        return own_scenario(problem, config.monte_carlo.bandwidth_factors)
    print("\nsweeps over random drops; their two programs are compiled first ...", flush=True)
    return monte_carlo(config)


def write_metrics(study: Study, workdir: pathlib.Path) -> None:
    """Writes metrics.csv and TensorBoard events, a row a point of the sweeps."""
    with MetricWriter(workdir, columns(), index="point") as writer:
        for number, row in enumerate(study.rows, 1):
            writer.write(number, row)


def identity(config: ConfigDict) -> dict[str, Any]:
    """Returns what identifies a run in its work directory: the config, and the scenario file's digest."""
    fields = config.to_dict()
    if config.scenario.path:
        content = pathlib.Path(config.scenario.path).read_bytes()
        fields["scenario"]["sha256"] = hashlib.sha256(content).hexdigest()
    return fields


def solve_all(config: ConfigDict, problem: Problem) -> list[Solution]:
    """Returns the solution of every requested solver, each verified against all constraints.

    The exact optimum and DAI are always among them, because every result is reported relative to both.
    """
    requested = (
        list(SOLVERS) if config.solver == ALL else list(dict.fromkeys(["exact", "dai", config.solver]))
    )
    available = {
        "left_over": config.left_over,
        "time_limit_s": config.milp.time_limit_s,
        "seed": config.seed,
    }
    solutions = []
    for solver in requested:
        most = SOLVERS[solver].max_users
        if config.solver == ALL and problem.num_users > most:
            solutions.append(Solution(solver, None, f"skipped: more than {most:,} users"))
            continue
        options = {name: available[name] for name in SOLVERS[solver].options if name in available}
        solve(problem, solver, **options)  # compiles
        allocation = solve(problem, solver, **options)
        check_feasible(problem, allocation)
        solutions.append(Solution(solver, allocation))
    return solutions


def check_feasible(problem: Problem, allocation: Allocation) -> None:
    """Raises a `RuntimeError` for an allocation that violates a constraint: it must not be reported."""
    judged = download_then_infer(problem) if SOLVERS[allocation.solver].download_first else problem
    violations = verify(judged, allocation)
    if violations:
        more = f" and {len(violations) - 1} more" if len(violations) > 1 else ""
        raise RuntimeError(f"the solver {allocation.solver} violates a constraint: {violations[0]}{more}")


def summarize(
    config: ConfigDict, problem: Problem, allocations: dict[str, Allocation], chosen: Allocation, study: Study
) -> dict[str, Any]:
    """Returns the content of summary.json without the wall time."""
    best, conventional = allocations["exact"].throughput, allocations["dai"].throughput
    latencies = compare_latencies(problem, allocations["dai"])
    counts = np.bincount(chosen.reason, minlength=len(REASONS))
    summary = {
        "seed": config.seed,
        "solver": chosen.solver,
        "scenario": config.scenario.path or None,
        "users": problem.num_users,
        "models": problem.labels.models,
        "rate_model": problem.rate_model,
        "bandwidth_hz": float(problem.bandwidth_hz),
        "reasons": {REASONS[code]: int(count) for code, count in enumerate(counts) if code and count},
        "served": {name: found.throughput for name, found in allocations.items()},
        "gap": {
            name: best - found.throughput
            for name, found in allocations.items()
            if not SOLVERS[name].download_first
        },
        "upper_bound": {name: found.upper_bound for name, found in allocations.items()},
        "mean_latency_s": {name: mean(found.latency_s) for name, found in allocations.items()},
        "bandwidth_used_hz": {name: found.bandwidth_used_hz for name, found in allocations.items()},
        "solve_s": {name: found.solve_s for name, found in allocations.items()},
        "against_dai": {
            "users_gained": quotient(best, conventional) - 1,
            "latency_saved": latency_saved(latencies),
            "rho": mean(latencies.rho),
        },
        "versions": versions(),
    }
    if not config.scenario.path:
        summary["monte_carlo"] = {
            "drops": config.monte_carlo.drops,
            "plain": study.sweeps["plain"][0],
            "rho_half": nearest(study.sweeps["rho"], 0.5),
        }
    return summary
