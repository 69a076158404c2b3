"""Sweeps of SLIDE's gain over DAI by bandwidth, deadlines, users and rho; each point is a row of metrics.csv.

rho is a user's compute time over its download time under DAI. Letters in shapes: D drops, K users, L layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from launch.run.progress import Progress
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
"""Half-width of a 95% confidence interval, in standard errors of the mean."""

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
    """Results of all sweeps.

    Attributes:
      sweeps: rows by the name of the sweep: `plain` (one row), `bandwidth`, `patience`, `users`, `rho`. A
        scenario file has `plain` and `bandwidth` only.
      served: users served [D] in the plain setting, by method; empty for a scenario file.
      latencies: of the users that DAI serves, under DAI and SLIDE, in the plain setting or the scenario.
    """

    sweeps: Mapping[str, list[Row]]
    served: Mapping[str, np.ndarray]
    latencies: Latencies

    @property
    def rows(self) -> list[Row]:
        """Rows of metrics.csv; a point that several sweeps share is one row."""
        return list({id(row): row for rows in self.sweeps.values() for row in rows}.values())


class UserTimeline(NamedTuple):
    """When one user's layers arrive and run under SLIDE and under DAI, with the same spectrum and clock.

    Attributes:
      arrival_s: end of each layer's download [L], the same under both.
      slide_begin_s, slide_end_s: begin and end of each layer's compute under SLIDE [L].
      dai_begin_s, dai_end_s: the same under DAI [L].
      start_s, deadline_s: start of the download, and deadline.
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
        """Compute time over download time; infinite where there is nothing to download."""
        downloading = self.arrival_s[-1] - self.start_s
        computing = self.dai_end_s[-1] - self.arrival_s[-1]
        return float(computing / downloading) if downloading > 0 else float("inf")


def sweep_points(config: ConfigDict) -> dict[str, list[Setting]]:
    """Returns the points of each sweep over random drops; sweeps share some."""
    grids = config.monte_carlo
    plain = read_setting(config)._replace(users=grids.users)
    return {
        "plain": [plain],
        "bandwidth": [plain._replace(bandwidth_hz=x * plain.bandwidth_hz) for x in grids.bandwidth_factors],
        "patience": [plain._replace(patience=x * plain.patience) for x in grids.patience],
        "rho": [_with_rho(plain, rho) for rho in grids.rhos],
        "users": [plain._replace(users=count) for count in grids.user_counts],
    }


def monte_carlo(config: ConfigDict) -> Study:
    """Returns the results of all methods over random drops at every point, with a progress bar."""
    grids, points = config.monte_carlo, sweep_points(config)
    (plain,) = points["plain"]
    catalogue, _ = read_models_of(config)
    # Every drop has the users of the largest point, so that one program computes all points.
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
    rows = {setting: point_row(setting, result) for setting, result in results.items()}
    served = {method: counts[0] for method, counts in results[plain].served.items()}
    return Study({name: [rows[x] for x in several] for name, several in points.items()}, served, latencies)


def own_scenario(problem: Problem, factors: tuple[float, ...]) -> Study:
    """Returns SLIDE and DAI on one problem with its spectrum multiplied by each factor."""

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
    return Study({"plain": [row], "bandwidth": sweep}, {}, latencies)


def latency_saved(latencies: Latencies) -> float:
    """Returns the share of the total latency under DAI that SLIDE saves; nan where DAI serves nobody."""
    return 1 - quotient(np.nansum(latencies.slide_s), np.nansum(latencies.dai_s))


def nearest(rows: list[Row], rho: float) -> Row:
    """Returns the row whose rho is nearest on a log scale; the first row if no rho is positive."""
    return min(rows, key=lambda row: abs(np.log(row["rho"] / rho)) if row["rho"] > 0 else np.inf)


def typical_user(problem: Problem, conventional: Allocation, best: Allocation) -> UserTimeline | None:
    """Returns the timeline of the user with the median latency saving among those that DAI serves.

    If DAI serves nobody, it is the first user that SLIDE serves; None if nobody is served.
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
    return UserTimeline(
        arrival_s=lines.arrival_s,
        slide_begin_s=lines.begin_s,
        slide_end_s=lines.completion_s,
        dai_begin_s=np.concatenate([lines.arrival_s[-1:], dai_end_s[:-1]]),
        dai_end_s=dai_end_s,
        start_s=float(users.start_s[k]),
        deadline_s=float(users.deadline_s[k]),
    )


def _with_rho(setting: Setting, rho: float) -> Setting:
    """Returns the setting in which a user who finishes exactly at its deadline under DAI has this rho."""
    share = rho / (1 + rho)
    return setting._replace(compute_min=share, compute_max=share)


def point_row(setting: Setting, sweep: Sweep) -> Row:
    """Returns the row of one point: means over its drops with the half-widths of their 95% intervals."""
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
    """Returns the mean of the finite values and the half-width of its 95% interval; nan where undefined."""
    known = values[np.isfinite(values)].astype(float)
    spread = known.std(ddof=1) if len(known) > 1 else np.nan
    return mean(known), float(INTERVAL * spread / np.sqrt(max(1, len(known))))


def mean(values: np.ndarray) -> float:
    """Returns the mean of the finite values; nan if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def quotient(numerator: float, denominator: float) -> float:
    """Returns a quotient; nan where the denominator is not above 0."""
    return float(numerator / denominator) if denominator > 0 else float("nan")
