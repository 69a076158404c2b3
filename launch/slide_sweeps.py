"""What becomes of the gain when bandwidth, deadlines, users or rho change: one row of metrics.csv a point.

rho is compute over download under DAI. Letters in shapes: D drops, K users.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from launch.progress import Progress
from slide_jax.baselines import dai
from slide_jax.exact import exact
from slide_jax.experiment import Latencies, Sweep, compare_latencies, run_sweep, sample_latencies
from slide_jax.latency import timeline
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import rate_of
from slide_jax.sampling import Setting
from slide_jax.settings import read_models_of, read_setting
from slide_jax.solvers import sweep_solvers

INTERVAL = 1.96
"""Standard errors to either side of a mean that hold the truth 95 times in 100."""

QUANTITIES = (
    "bandwidth_hz",
    "patience",
    "users",
    "compute_min",
    "compute_max",
    "rho",
    "latency_saved",
    "latency_saved_ci95",
    "users_gained",
    "users_gained_ci95",
)
"""Columns of metrics.csv after `point`: the setting, and what SLIDE gains over DAI."""

Row = Mapping[str, Any]


def columns() -> tuple[str, ...]:
    """Returns the columns of metrics.csv after `point`: `QUANTITIES`, then users served by solver."""
    return (*QUANTITIES, *(f"served_{name}{what}" for name in sweep_solvers() for what in ("", "_ci95")))


class Study(NamedTuple):
    """What the figures draw.

    Attributes:
      sweeps: rows by sweep: `plain` (one row), `bandwidth`, `patience`, `users`, `rho`, those that were run.
      served: users served in every drop of the plain setting, by method; None for a user's own scenario.
      latencies: under DAI and SLIDE of the users that DAI serves, in the plain setting or the scenario.
    """

    sweeps: Mapping[str, list[Row]]
    served: Mapping[str, np.ndarray] | None
    latencies: Latencies

    @property
    def rows(self) -> list[Row]:
        """Rows of metrics.csv: a point that several sweeps share stands there once."""
        return list({id(row): row for rows in self.sweeps.values() for row in rows}.values())


class Bars(NamedTuple):
    """One user's time line under SLIDE and under DAI, at one spectrum and clock.

    Attributes:
      arrival_s: when each layer has arrived [L].
      slide_begin_s, slide_end_s: when each layer runs under SLIDE [L].
      dai_begin_s, dai_end_s: and under DAI [L].
      start_s, deadline_s: of the user.
    """

    arrival_s: np.ndarray
    slide_begin_s: np.ndarray
    slide_end_s: np.ndarray
    dai_begin_s: np.ndarray
    dai_end_s: np.ndarray
    start_s: float
    deadline_s: float

    @property
    def rho(self) -> float:
        """Compute over download; infinite where there is nothing to download."""
        downloading = self.arrival_s[-1] - self.start_s
        computing = self.dai_end_s[-1] - self.arrival_s[-1]
        return float(computing / downloading) if downloading > 0 else float("inf")


def monte_carlo(config: ConfigDict) -> Study:
    """Returns what all methods do over the drops of every sweep, showing how far it is."""
    grids = config.monte_carlo
    plain = read_setting(config)._replace(users=grids.users)
    catalogue, _ = read_models_of(config)
    points = {
        "plain": [plain],
        "bandwidth": [plain._replace(bandwidth_hz=x * plain.bandwidth_hz) for x in grids.bandwidth_factors],
        "patience": [plain._replace(patience=x * plain.patience) for x in grids.patience],
        "rho": [_with_rho(plain, rho) for rho in grids.rhos],
    }
    points["users"] = [plain._replace(users=count) for count in grids.user_counts]
    # Drawn for the largest crowd everywhere: one program serves all points.
    count = max(grids.users, *grids.user_counts)
    drawn = (catalogue, grids.drops, config.seed)
    settings = dict.fromkeys(setting for several in points.values() for setting in several)
    with Progress(len(settings) + 1, "points") as progress:
        results = {}
        for setting in settings:
            results[setting] = run_sweep([setting], *drawn, sweep_solvers(), config.setting.rate_model, count)
            progress.update(len(results))
        latencies = sample_latencies(plain, *drawn, config.setting.rate_model)
        progress.update(len(settings) + 1)
    rows = {setting: _row(setting, result) for setting, result in results.items()}
    served = {method: counts[0] for method, counts in results[plain].served.items()}
    return Study({name: [rows[x] for x in several] for name, several in points.items()}, served, latencies)


def own_scenario(problem: Problem, factors: tuple[float, ...]) -> Study:
    """Returns what SLIDE and DAI make of a problem as it is and with these parts of its spectrum."""

    def solved(factor: float) -> tuple[Row, Latencies]:
        changed = dataclasses.replace(problem, bandwidth_hz=factor * problem.bandwidth_hz)
        best, conventional = exact(changed), dai(changed)
        latencies = compare_latencies(changed, conventional)
        served = {"exact": best.throughput, "dai": conventional.throughput}
        row = {
            "bandwidth_hz": float(changed.bandwidth_hz),
            "users": problem.num_users,
            "rho": mean(latencies.rho),
            "latency_saved": latency_saved(latencies),
            "users_gained": quotient(served["exact"], served["dai"]) - 1,
            **{f"served_{method}": count for method, count in served.items()},
        }
        return row, latencies

    row, latencies = solved(1.0)
    sweep = [row if factor == 1 else solved(factor)[0] for factor in factors]
    return Study({"plain": [row], "bandwidth": sweep}, None, latencies)


def latency_saved(latencies: Latencies) -> float:
    """Returns what SLIDE saves of the sum of the latencies under DAI; nan where DAI serves nobody."""
    return 1 - quotient(np.nansum(latencies.slide_s), np.nansum(latencies.dai_s))


def nearest(rows: list[Row], rho: float) -> Row:
    """Returns the row whose rho is nearest on a log scale; the first where none is known."""
    return min(rows, key=lambda row: abs(np.log(row["rho"] / rho)) if row["rho"] > 0 else np.inf)


def one_user(problem: Problem, conventional: Allocation, best: Allocation) -> Bars | None:
    """Returns the time line of a user: of those that DAI serves the one with the median saving.

    Where DAI serves nobody it is the first that SLIDE serves, and None where that serves nobody either.
    """
    latencies = compare_latencies(problem, conventional)
    saved = 1 - latencies.slide_s / np.where(latencies.dai_s > 0, latencies.dai_s, 1.0)
    users = np.flatnonzero(np.isfinite(saved))
    if users.size:
        allocation, k = conventional, users[np.argsort(saved[users], kind="stable")[users.size // 2]]
    elif best.served.any():
        allocation, k = best, np.argmax(best.served)
    else:
        return None
    catalogue, users = problem.catalogue, problem.users
    with jax.enable_x64(True):
        rate = np.asarray(rate_of(allocation.bandwidth_hz, users, problem.rate_model))[k]
        speed = allocation.frequency_hz[k] * users.flop_per_cycle[k]
        model = allocation.model[k]
        layers = slice(0, catalogue.num_layers[model])
        bits, flop = catalogue.layer_bits[model, layers], catalogue.layer_flop[model, layers]
        lines = jax.tree.map(np.asarray, timeline(bits, flop, rate, speed, users.start_s[k]))
    dai_end_s = lines.arrival_s[-1] + np.cumsum(flop) / speed
    return Bars(
        arrival_s=lines.arrival_s,
        slide_begin_s=lines.begin_s,
        slide_end_s=lines.completion_s,
        dai_begin_s=np.concatenate([lines.arrival_s[-1:], dai_end_s[:-1]]),
        dai_end_s=dai_end_s,
        start_s=float(users.start_s[k]),
        deadline_s=float(users.deadline_s[k]),
    )


def _with_rho(setting: Setting, rho: float) -> Setting:
    """Returns the setting in which a user who fills its deadline under DAI has this rho."""
    share = rho / (1 + rho)
    return setting._replace(compute_min=share, compute_max=share)


def _row(setting: Setting, sweep: Sweep) -> Row:
    """Returns means over the drops of a single point, each with the half-width of its 95% interval."""
    numbers = ("bandwidth_hz", "patience", "users", "compute_min", "compute_max")
    row = {name: getattr(setting, name) for name in numbers}
    row["rho"] = mean(sweep.rho[0])
    row["latency_saved"], row["latency_saved_ci95"] = _with_interval(sweep.saved[0])
    best, conventional = (sweep.served[method][0].astype(float) for method in ("exact", "dai"))
    # The ratio of two means over the same drops, and its interval to first order.
    ratio = quotient(best.mean(), conventional.mean())
    row["users_gained"] = ratio - 1
    error = best - ratio * conventional
    row["users_gained_ci95"] = quotient(_with_interval(error)[1], conventional.mean())
    for method, served in sweep.served.items():
        row[f"served_{method}"], row[f"served_{method}_ci95"] = _with_interval(served[0])
    return row


def _with_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean of what is known and the half-width of its 95% interval; nan: too little is known."""
    known = values[np.isfinite(values)].astype(float)
    spread = known.std(ddof=1) if len(known) > 1 else np.nan
    return mean(known), float(INTERVAL * spread / np.sqrt(max(1, len(known))))


def mean(values: np.ndarray) -> float:
    """Returns the mean of what is known; nan where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def quotient(numerator: float, denominator: float) -> float:
    """Returns a quotient; nan where the denominator is not above 0."""
    return float(numerator / denominator) if denominator > 0 else float("nan")
