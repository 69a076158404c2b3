"""Texts and tables of a SLIDE run: on the screen, in the report and in the captions of the figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from launch.run.report import Comparison
from launch.slide.figures import PUBLISHED_GAIN, PUBLISHED_SAVING
from launch.slide.sweeps import Row, Study, UserTimeline, mean, nearest
from slide_jax.problem import Allocation, Problem
from slide_jax.settings import model_names
from slide_jax.solvers import SOLVERS

SAME_USERS = "Latency of the same users with the same spectrum"


class Solution(NamedTuple):
    """A solver's allocation of the cell, or the reason why there is none."""

    solver: str
    allocation: Allocation | None
    skipped: str = ""


def title(config: ConfigDict, problem: Problem) -> str:
    """Returns one line that names the cell: users, models, spectrum and source."""
    where = config.scenario.path or "a drawn cell"
    models = len(problem.labels.models)
    return (
        f"SLIDE: {problem.num_users:,} users, {models} {'models' if models > 1 else 'model'}, "
        f"{_hertz(float(problem.bandwidth_hz))}, {where}"
    )


def solver_table(solutions: Sequence[Solution], problem: Problem) -> Comparison:
    """Returns the table of all solvers."""
    best = next(found.throughput for solver, found, _ in solutions if solver == "exact" and found is not None)
    header = ("solver", "served", "mean latency", "spectrum used", "gap", "proven bound", "ms")
    rows = []
    for solver, allocation, skipped in solutions:
        if allocation is None:
            rows.append((solver, skipped, "", "", "", "", ""))
            continue
        spectrum = float(problem.bandwidth_hz)
        latency, bound = mean(allocation.latency_s), allocation.upper_bound
        rows.append(
            (
                solver,
                f"{allocation.throughput:,}",
                "-" if math.isnan(latency) else f"{latency:.2f} s",
                f"{allocation.bandwidth_used_hz / spectrum:.1%}" if spectrum > 0 else "-",
                "-" if SOLVERS[solver].download_first else f"{best - allocation.throughput:,}",
                "-" if math.isnan(bound) else f"{bound:,.0f}",
                f"{1e3 * allocation.solve_s:,.1f}",
            )
        )
    caption = (
        f"Users served of {problem.num_users:,}. The gap is to the optimum under SLIDE. dai is the optimum "
        "of another problem, downloading first and running then, and has none. Mean latency is that of "
        "the users whom a solver serves, who are not the same; where nobody gets more spectrum than it "
        "needs, tasks end at their deadlines. Every answer was replayed layer by layer and checked "
        "against all constraints. Milliseconds are of a second call, without compilation (of the first, "
        "where that took over 5 s)."
    )
    return Comparison("Solvers", caption, header, rows)


def sweep_tables(study: Study) -> list[Comparison]:
    """Returns the table of the gain by rho, if rho was swept."""
    if "rho" not in study.sweeps:
        return []
    header = ("rho", "SLIDE serves", "DAI serves", "more users", "less latency", "at most")
    rows = []
    for row in study.sweeps["rho"]:
        rho = row["rho"]
        rows.append(
            (
                _number(rho),
                _number(row["served_exact"], 1),
                _number(row["served_dai"], 1),
                _percent(row["users_gained"]),
                _percent(row["latency_saved"]),
                _percent(min(rho, 1) / (1 + rho)),
            )
        )
    caption = (
        "Means over all drops. Rho is compute over download of the users whom DAI serves, with DAI's "
        "spectrum and clocks; less latency is what SLIDE saves these users with the same spectrum and "
        "clocks. The last column is the most that any model could save, for neither download nor compute "
        "gets shorter, min(rho, 1) / (1 + rho); infinitely many equal layers would."
    )
    return [Comparison("How the gain depends on rho", caption, header, rows)]


def introduction(config: ConfigDict, study: Study) -> str:
    """Returns the report's opening paragraph."""
    opening = (
        "A device runs each layer of a model while the next ones download (SLIDE); the convention is to "
        "download first and infer then (DAI). Both are solved to the optimum, the most users who finish "
        "in time. "
    )
    if config.scenario.path:
        return (
            opening
            + "The scenario is the user's own; the sweep gives it parts and multiples of its spectrum."
        )
    plain, rows = study.sweeps["plain"][0], study.sweeps["rho"]
    half = nearest(rows, 0.5)
    low, high = (end(rows, key=lambda row: row["compute_min"]) for end in (min, max))
    low_gain, high_gain = PUBLISHED_GAIN
    return opening + (
        f"Over {config.monte_carlo.drops:,} drops of {config.monte_carlo.users:,} users SLIDE brings "
        f"{_gain(plain)} at a mean rho, compute over download under DAI, of {_number(plain['rho'])}; the "
        f"paper is quoted with {low_gain:.0%} to {high_gain:.0%} more users and {PUBLISHED_SAVING:.1%} "
        "less latency (arXiv 2512.20946). The gain is a matter of rho: with a rho of "
        f"{_number(half['rho'])} for everyone it is {_gain(half)}, at {_number(low['rho'])} {_gain(low)}, "
        f"and at {_number(high['rho'])} {_gain(high)}."
    )


def figure_texts(
    config: ConfigDict, problem: Problem, study: Study, user: UserTimeline | None
) -> dict[str, tuple[str, str]]:
    """Returns title and caption of every figure of a study; a caption names its setting."""
    texts = _scenario_texts(problem, study) if config.scenario.path else _drops_texts(config, study)
    setting = _cell(problem)
    if not config.scenario.path:
        setting += f" at {config.setting.bits_per_parameter:g} bits a parameter; {_deadlines(config)}"
    who = f"Its rho is {_number(user.rho)}." if user else "Nobody is served."
    caption = (
        "One user with the same spectrum and clock under both, each bar a layer: of the users whom DAI "
        f"serves, the one with the median saving. {who} {setting}."
    )
    return {"timeline": ("Timeline of one user", caption), **texts}


def _scenario_texts(problem: Problem, study: Study) -> dict[str, tuple[str, str]]:
    cell, mean_rho = _cell(problem), f"mean rho {_number(study.sweeps['plain'][0]['rho'])}"
    return {
        "served_by_bandwidth": (
            "Users served against bandwidth",
            f"Parts and multiples of the scenario's spectrum. {cell}; {mean_rho} with all of it.",
        ),
        "latency_cdf": (SAME_USERS, f"The users whom DAI serves, at its clocks. {cell}; {mean_rho}."),
    }


def _drops_texts(config: ConfigDict, study: Study) -> dict[str, tuple[str, str]]:
    setting, deadlines = config.setting, _deadlines(config)
    users = f"{config.monte_carlo.users:,} users"
    spectrum = f"{_hertz(setting.bandwidth_hz)} ({setting.rate_model} rates)"
    mean_rho = f"mean rho {_number(study.sweeps['plain'][0]['rho'])}"
    compute = f"compute {setting.compute_min:.0%} to {setting.compute_max:.0%} of them ({mean_rho})"
    models = f"{', '.join(model_names(config))} at {setting.bits_per_parameter:g} bits a parameter"
    accuracy = f"accuracy of at least {setting.accuracy_min:g} to {setting.accuracy_max:g}"
    rest = f"{models}, {accuracy}; {_channel(config.cell)}; {config.monte_carlo.drops:,} drops"
    means = "Means over drops with 95% intervals, shaded."
    return {
        "served_by_rho": (
            "What SLIDE gains, by compute over download",
            f"{means} Latency is that of the users whom DAI serves, with its spectrum and clocks. Grey and "
            f"amber: what the paper is quoted with. Setting: {users}, {spectrum}, {deadlines}, compute at "
            f"the top clock the same share of all deadlines at a point, rho / (1 + rho); {rest}.",
        ),
        "served_by_bandwidth": (
            "Users served against bandwidth",
            f"{means} Setting: {users}, {deadlines}, {compute}; {rest}.",
        ),
        "served_by_deadline": (
            "Users served against the deadline",
            f"{means} Devices stay as fast as they are when their deadlines move, so rho is lower where "
            f"there is more time. Setting at factor 1: {users}, {spectrum}, {deadlines}, {compute}; {rest}.",
        ),
        "served_by_users": (
            "Users served against users who ask",
            f"{means} Setting: {spectrum}, {deadlines}, {compute[:-1]} with {users}); {rest}.",
        ),
        "latency_cdf": (
            SAME_USERS,
            "All users whom DAI serves, with DAI's spectrum and clocks, at which they finish just in time. "
            f"Setting: {users}, {spectrum}, {deadlines}, {compute}; {rest}.",
        ),
        "gap": (
            "Optimality gap of every heuristic",
            "Of the users whom the optimum serves, how many fewer: mean (bars), 5% to 95% of the drops "
            "(lines). Both shares take the users of least need first, as the optimum does, and give them "
            f"more than that. Setting: {users}, {spectrum}, {deadlines}, {compute}; {rest}.",
        ),
    }


def overview(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the summary of the screen and the report as (name, text) lines."""
    solver, versus = summary["solver"], summary["against_dai"]
    served = summary["served"]
    reasons = sorted(summary["reasons"].items(), key=lambda reason: -reason[1])
    lines = [
        ("users served", f"{served[solver]:,} of {summary['users']:,} by {solver}"),
        ("not served", "; ".join(f"{count:,}: {reason}" for reason, count in reasons) or "nobody"),
        ("download, then infer", f"{served['dai']:,}; SLIDE serves {_percent(versus['users_gained'])} more"),
        (
            "their latency",
            f"{_percent(versus['latency_saved'])} less under SLIDE with the same spectrum and clocks "
            f"(rho {_number(versus['rho'])})",
        ),
    ]
    if "monte_carlo" in summary:
        drops, half = summary["monte_carlo"]["drops"], summary["monte_carlo"]["rho_half"]
        plain = summary["monte_carlo"]["plain"]
        lines += [
            (
                f"{drops:,} drops",
                f"of {plain['users']:,} users: {_gain(plain)} (rho {_number(plain['rho'])})",
            ),
            (f"at rho {_number(half['rho'])}", f"{_gain(half)}"),
        ]
    return lines


def _gain(row: Row) -> str:
    return f"{_percent(row['users_gained'])} more users, {_percent(row['latency_saved'])} less latency"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _number(value: float, decimals: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def _hertz(hertz: float) -> str:
    units = ((1e9, "GHz"), (1e6, "MHz"), (1e3, "kHz"))
    size, unit = next((unit for unit in units if hertz >= unit[0]), (1.0, "Hz"))
    return f"{hertz / size:,.4g} {unit}"


def _cell(problem: Problem) -> str:
    spectrum = f"{_hertz(float(problem.bandwidth_hz))} ({problem.rate_model} rates)"
    names = problem.labels.models
    models = ", ".join(names) if len(names) <= 6 else f"{len(names)} models"
    return f"Setting: {problem.num_users:,} users, {spectrum}, {models}"


def _deadlines(config: ConfigDict) -> str:
    setting = config.setting
    factor = "" if setting.patience == 1 else f" times {setting.patience:g}"
    return f"deadlines of {setting.deadline_min_s:g} to {setting.deadline_max_s:g} s{factor}"


def _channel(cell: ConfigDict) -> str:
    fading = "Rayleigh fading" if cell.rician_k == 0 else f"Rician fading (K = {cell.rician_k:g})"
    shadowing = f", shadowing of {cell.shadowing_db:g} dB" if cell.shadowing_db else ""
    return (
        f"radius {cell.radius_m:g} m, {cell.power_dbm:g} dBm over {_hertz(cell.reference_bandwidth_hz)}, "
        f"{fading}{shadowing}"
    )
