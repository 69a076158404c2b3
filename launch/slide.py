"""Solves a cell with every solver, draws thousands more, and writes what there is to see into a directory."""

import hashlib
import pathlib
import shlex
import sys
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from launch.distributed import HERE, Host, keep_compiled
from launch.progress import print_summary, print_table
from launch.report import write_report
from launch.slide_figures import write_figures
from launch.slide_report import (
    Solution,
    figure_texts,
    introduction,
    overview,
    solver_table,
    sweep_tables,
    title,
)
from launch.slide_sweeps import (
    Study,
    columns,
    latency_saved,
    mean,
    monte_carlo,
    nearest,
    one_user,
    own_scenario,
    quotient,
)
from launch.workdir import open_workdir, versions, write_json
from launch.writers import MetricWriter
from slide_jax.baselines import download_then_infer
from slide_jax.errors import InputError
from slide_jax.experiment import compare_latencies
from slide_jax.problem import REASONS, Allocation, Problem
from slide_jax.scenario import read_scenario, write_allocation, write_scenario
from slide_jax.settings import ALL, check_config, sample_drop
from slide_jax.solvers import SOLVERS, solve
from slide_jax.verification import verify

SCENARIO_USERS = 10_000
"""The most users of a cell that is written as a scenario file, for editing."""

PATIENCE_S = 5.0
"""A solver that took longer, compilation included, is not called again to be timed without."""


def run(config: ConfigDict, workdir: pathlib.Path, host: Host = HERE) -> None:
    """Runs the experiment of `config` and writes everything into `workdir`.

    Raises:
      InputError: the config, the scenario or the directory cannot be used; nothing was written.
    """
    begun = time.perf_counter()
    if host[1:] != HERE[1:]:
        problem = "this experiment runs in one process"
        raise InputError(
            "--coordinator", host.coordinator, problem, "leave out the flags of several processes"
        )
    check_config(config)
    problem = read_scenario(config.scenario.path) if config.scenario.path else sample_drop(config)
    open_workdir(workdir, identity(config))
    keep_compiled(host.compiled or workdir / "compiled")
    print(f"{title(config, problem)}, in {workdir}", flush=True)
    if problem.num_users <= SCENARIO_USERS:
        write_scenario(problem, workdir / "scenario.json")
    print("solving; each solver is compiled first ...", flush=True)
    solutions = solve_all(config, problem)
    table = solver_table(solutions, problem)
    print_table(table.title, table.header, table.rows)
    print(
        "\n  gap: to exact; dai solves another problem; whoever gets just what it needs ends at its deadline"
    )
    allocations = {found.solver: found.allocation for found in solutions if found.allocation}
    chosen = allocations["exact" if config.solver == ALL else config.solver]
    write_allocation(problem, chosen, workdir / "allocation.json")

    if config.scenario.path:
        print("\nthe same with parts and multiples of the spectrum ...", flush=True)
        study = own_scenario(problem, config.monte_carlo.bandwidth_factors)
    else:
        print("\nsweeps over drops; their two programs are compiled first ...", flush=True)
        study = monte_carlo(config)
    with MetricWriter(workdir, columns(), resume_after=None, index="point") as writer:
        for number, row in enumerate(study.rows, 1):
            writer.write(number, row)
    summary = summarize(config, problem, allocations, chosen, study)
    bars = one_user(problem, allocations["dai"], allocations["exact"])
    texts = figure_texts(config, problem, study, bars)
    sections = write_figures(study, bars, texts, workdir / "figures")
    lines = overview(summary)
    write_report(
        workdir / "report.html",
        title=title(config, problem),
        introduction=introduction(config, study),
        summary={**dict(lines), "versions": summary["versions"]},
        sections=sections,
        command=f"python -m launch.main {shlex.join(sys.argv[1:])}",
        tables=[table, *sweep_tables(study)],
    )
    write_json(workdir / "summary.json", {**summary, "wall_s": time.perf_counter() - begun})
    print_summary("Summary", [*lines, ("report", workdir / "report.html"), ("everything", workdir)])


def identity(config: ConfigDict) -> dict[str, Any]:
    """Returns what a work directory belongs to: the config, and the content of the scenario file."""
    fields = config.to_dict()
    if config.scenario.path:
        content = pathlib.Path(config.scenario.path).read_bytes()
        fields["scenario"]["sha256"] = hashlib.sha256(content).hexdigest()
    return fields


def solve_all(config: ConfigDict, problem: Problem) -> list[Solution]:
    """Returns what the solvers make of a problem, each answer verified.

    The optimum and DAI are always among them: what any solver does is told in relation to these.
    """
    asked = list(SOLVERS) if config.solver == ALL else list(dict.fromkeys(["exact", "dai", config.solver]))
    available = {
        "left_over": config.left_over,
        "time_limit_s": config.milp.time_limit_s,
        "seed": config.seed,
    }
    solutions = []
    for solver in asked:
        most = SOLVERS[solver].max_users
        if config.solver == ALL and problem.num_users > most:
            solutions.append(Solution(solver, None, f"skipped: more than {most:,} users"))
            continue
        options = {name: available[name] for name in SOLVERS[solver].options}
        allocation = solve(problem, solver, **options)
        if allocation.solve_s <= PATIENCE_S:
            allocation = solve(problem, solver, **options)
        refuse_infeasible(problem, allocation)
        solutions.append(Solution(solver, allocation))
    return solutions


def refuse_infeasible(problem: Problem, allocation: Allocation) -> None:
    """Stops the run at an answer that breaks a constraint: a bug, never to be reported as a result."""
    judged = download_then_infer(problem) if SOLVERS[allocation.solver].download_first else problem
    violations = verify(judged, allocation)
    if violations:
        more = f" and {len(violations) - 1} more" if len(violations) > 1 else ""
        raise RuntimeError(f"the solver {allocation.solver} breaks a constraint: {violations[0]}{more}")


def summarize(
    config: ConfigDict, problem: Problem, allocations: dict[str, Allocation], chosen: Allocation, study: Study
) -> dict[str, Any]:
    """Returns the content of summary.json, but for the time that everything took."""
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
