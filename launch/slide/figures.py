"""The figures of a SLIDE run, drawn from the rows of metrics.csv and the arrays of the study.

Letters in shapes: D drops, K users, L layers.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from launch.run import figures
from launch.run.figures import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY, FigureEntry, column, finish
from launch.slide.sweeps import Row, Study, UserTimeline
from slide_jax.experiment import Latencies
from slide_jax.solvers import SOLVERS, sweep_solvers

Rows = Sequence[Row]

LOOKS = {
    # Wide, because others coincide with it and lie on it.
    "exact": {"color": BLUE, "marker": "o", "linewidth": 5, "markersize": 8, "alpha": 0.6},
    "dai": {"color": ORANGE, "marker": "s", "linewidth": 2.4},
    "best_channel_first": {"color": GREEN, "marker": "^"},
    "random_order": {"color": GREY, "marker": "v"},
    "earliest_deadline_first": {"color": PINK, "marker": "D"},
    "proportional_share": {"color": AMBER, "marker": "P"},
    "equal_share": {"color": SKY, "marker": "X"},
    "relaxed": {"color": "black", "marker": ".", "linestyle": ":"},
}

OWN_LOOK = {"color": "black", "marker": "*", "linestyle": "--"}
"""Of solvers that a user added."""

PUBLISHED_SAVING = 0.325
PUBLISHED_GAIN = (0.4, 0.6)
"""The paper's published results: latency saved, and users gained over DAI (arXiv 2512.20946)."""


def write_figures(
    study: Study, user: UserTimeline | None, texts: dict[str, tuple[str, str]], directory: str | os.PathLike
) -> list[FigureEntry]:
    """Draws every figure that has a text, and returns their entries for the report.

    Args:
      study: results of the sweeps.
      user: the typical user; None if nobody is served.
      texts: title and caption by the name of the figure; only these figures are drawn.
      directory: where the PNG files go; created.
    """
    sweeps = study.sweeps
    drawings = {
        "timeline": lambda: timeline(user),
        "served_by_rho": lambda: by_rho(sweeps["rho"]),
        "served_by_bandwidth": lambda: by_bandwidth(sweeps["bandwidth"]),
        "served_by_deadline": lambda: by_deadline(sweeps["patience"]),
        "served_by_users": lambda: by_users(sweeps["users"]),
        "latency_cdf": lambda: latency_cdf(study.latencies),
        "gap": lambda: gap(study.served),
    }
    with figures.house_style():
        return [
            FigureEntry(*text, figures.save(drawings[name](), pathlib.Path(directory, f"{name}.png")))
            for name, text in texts.items()
        ]


def by_bandwidth(rows: Rows) -> Figure:
    """Draws users served and gained by spectrum."""
    megahertz = column(rows, "bandwidth_hz") / 1e6
    return _sweep(rows, megahertz, "spectrum (MHz)")


def by_deadline(rows: Rows) -> Figure:
    """Draws users served and gained by the factor on all deadlines."""
    return _sweep(rows, column(rows, "patience"), "factor on every deadline")


def by_users(rows: Rows) -> Figure:
    """Draws users served and gained by the number of users."""
    users = column(rows, "users")
    figure = _sweep(rows, users, "users who ask")
    for axes in figure.axes:
        figures.whole_numbers(axes, users)
    return figure


def by_rho(rows: Rows) -> Figure:
    """Draws users served, users gained and latency saved by compute over download."""
    figure, ((left, middle, right),) = figures.new_figure(1, 3, height_in=4.0)
    rho = column(rows, "rho")
    _served(left, rows, rho, ["exact", "dai"])
    _gained(middle, rows, rho)
    middle.axhspan(*PUBLISHED_GAIN, color=GREY, alpha=0.15, linewidth=0, label="published: 40-60%")
    _with_band(right, rho, rows, "latency_saved", "measured", color=BLUE, marker="o")
    known = rho[np.isfinite(rho)]
    if known.size:
        fine = np.geomspace(known.min(), known.max(), 200)
        ideal = np.minimum(fine, 1) / (1 + fine)
        right.plot(fine, ideal, color=GREY, linestyle="--", label="most for any model: min(ρ, 1) / (1 + ρ)")
    right.axhline(PUBLISHED_SAVING, color=AMBER, linewidth=1.4, label="published: 32.5%")
    for axes in (middle, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figures.from_zero(axes)
    for axes in (left, middle, right):
        _log_scale(axes, known)
    xlabel = "ρ: compute / download time under DAI"
    finish(left, "Users served", xlabel, "users", legend_columns=1)
    finish(middle, "More users than DAI", xlabel, "users gained over DAI", legend_columns=1)
    finish(right, "Latency saved", xlabel, "share of DAI's latency", legend_columns=1)
    return figure


def latency_cdf(latencies: Latencies) -> Figure:
    """Draws the distributions of latency under DAI and SLIDE and of each user's saving."""
    figure, ((left, right),) = figures.new_figure(1, 2, height_in=3.9)
    known = np.isfinite(latencies.dai_s)
    before, after = latencies.dai_s[known], latencies.slide_s[known]
    for seconds, label, color in ((after, "SLIDE", BLUE), (before, "download, then infer", ORANGE)):
        if seconds.size:
            _distribution(left, seconds, f"{label}: mean {seconds.mean():.2f} s", color)
            left.axvline(seconds.mean(), color=color, linewidth=1, linestyle=":")
    if before.size:
        with np.errstate(divide="ignore", invalid="ignore"):
            saved = np.where(before > 0, 1 - after / before, 0.0)
        _distribution(right, saved, "", GREEN)
        right.xaxis.set_major_formatter(PercentFormatter(1))
        right.set_xlim(left=0)
        left.set_xlim(left=0)
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(left, "Latency", "latency (s)", "users with at most that", legend_columns=2)
    finish(right, "Saved by each user", "share of DAI's latency saved", "users with at most that")
    return figure


def timeline(user: UserTimeline | None) -> Figure:
    """Draws when the layers of one user are downloaded and run, under DAI and under SLIDE."""
    figure, grid = figures.new_figure(2, 1, height_in=4.2, sharex=True)
    above, below = grid[:, 0]
    if user is None:
        for axes, title in ((above, "Download, then infer"), (below, "SLIDE")):
            finish(axes, title, "", "")
        return figure
    begins = np.concatenate([[user.start_s], user.arrival_s[:-1]])
    panels = (
        (above, "Download, then infer", user.dai_begin_s, user.dai_end_s),
        (below, "SLIDE: a layer runs as soon as it has arrived", user.slide_begin_s, user.slide_end_s),
    )
    for axes, title, run_begins, run_ends in panels:
        _chain(axes, 1, begins, user.arrival_s, SKY)
        _chain(axes, 0, run_begins, run_ends, GREEN)
        end = run_ends[-1]
        axes.axvline(end, color=BLUE, linewidth=1.6)
        axes.axvline(user.deadline_s, color=ORANGE, linestyle="--", linewidth=1.6)
        axes.set_yticks([1, 0], ["download", "inference"])
        axes.set_ylim(-0.6, 1.6)
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{title} — done after {end - user.start_s:.2f} s")
    # One legend for both panels.
    above.plot([], [], color=BLUE, label="done")
    above.plot([], [], color=ORANGE, linestyle="--", label="deadline")
    latest = max(user.deadline_s, user.dai_end_s[-1])
    below.set_xlim(user.start_s, latest + 0.03 * (latest - user.start_s))
    below.set_xlabel("time (s)")
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def gap(served: Mapping[str, np.ndarray]) -> Figure:
    """Draws the share of the optimum's users that every other method leaves unserved."""
    figure, ((axes,),) = figures.new_figure(height_in=3.6)
    best = served["exact"].astype(float)
    some = best > 0
    lost = {
        method: 1 - counts[some] / best[some]
        for method, counts in served.items()
        if method != "exact" and not SOLVERS[method].download_first
    }
    order = sorted(lost, key=lambda method: lost[method].mean() if some.any() else 0.0, reverse=True)
    for place, method in enumerate(order if some.any() else []):
        _loss_bar(axes, place, lost[method])
    if axes.has_data():
        axes.set_yticks(range(len(order)), [_name(method).removeprefix("SLIDE, ") for method in order])
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.55)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(axes, "", "users lost against the optimum", "")
    return figure


def _loss_bar(axes: Axes, place: int, lost: np.ndarray) -> None:
    """Draws the mean of a share over drops as a bar, and the range from 5% to 95% of the drops as a line."""
    mean, (low, high) = lost.mean(), np.quantile(lost, [0.05, 0.95])
    axes.barh(place, mean, color=SKY, height=0.6)
    axes.plot([low, high], [place, place], color=GREY, linewidth=1.5, marker="|", markersize=9)
    axes.annotate(
        f"mean {mean:.1%}, optimal in {np.mean(lost == 0):.1%} of drops",
        (max(mean, high), place),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def _sweep(rows: Rows, x: np.ndarray, xlabel: str) -> Figure:
    figure, ((left, right),) = figures.new_figure(1, 2, height_in=4.5, width_ratios=[3, 2])
    _served(left, rows, x, _curves())
    _gained(right, rows, x)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figures.from_zero(right)
    finish(left, "Users served", xlabel, "users", legend_columns=2)
    finish(right, "SLIDE serves more users than DAI", xlabel, "users gained over DAI")
    return figure


def _curves() -> list[str]:
    """Returns the solvers that sweeps draw: those of `LOOKS` in its order, then those that a user added."""
    order = {name: place for place, name in enumerate(LOOKS)}
    return sorted(sweep_solvers(), key=lambda name: (order.get(name, len(order)), name))


def _name(method: str) -> str:
    """Returns the label of a curve; a solver without a label goes by its name."""
    return SOLVERS[method].label or f"SLIDE, {method.replace('_', ' ')}"


def _served(axes: Axes, rows: Rows, x: np.ndarray, methods: Sequence[str]) -> None:
    for method in methods:
        _with_band(axes, x, rows, f"served_{method}", _name(method), **LOOKS.get(method, OWN_LOOK))
    figures.from_zero(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _gained(axes: Axes, rows: Rows, x: np.ndarray) -> None:
    _with_band(axes, x, rows, "users_gained", "", color=BLUE, marker="o")


def _with_band(axes: Axes, x: np.ndarray, rows: Rows, name: str, label: str, **look: Any) -> None:
    """Draws a mean and its 95% interval."""
    order = np.argsort(x)
    mean, half = column(rows, name)[order], column(rows, f"{name}_ci95")[order]
    figures.line(axes, x[order], mean, label, **{"linewidth": 1.4, "markersize": 4, **look})
    figures.band(axes, x[order], mean - half, mean + half, look["color"])


def _distribution(axes: Axes, values: np.ndarray, label: str, color: str) -> None:
    share = np.linspace(0, 1, 501)
    axes.plot(np.quantile(values, share, method="inverted_cdf"), share, label=label, color=color)


def _chain(axes: Axes, height: float, begins: np.ndarray, ends: np.ndarray, color: str) -> None:
    """Draws one bar a layer, in two alternating shades."""
    shades = np.where(np.arange(len(begins)) % 2, 0.55, 1.0)
    bars = axes.barh(height, ends - begins, left=begins, height=0.62, color=color, linewidth=0)
    for bar, shade in zip(bars, shades, strict=True):
        bar.set_alpha(float(shade))


def _log_scale(axes: Axes, values: np.ndarray) -> None:
    """Makes the x axis logarithmic, with ticks at round values."""
    if not values.size:
        return
    axes.set_xscale("log")
    ticks = [
        tick for tick in (0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if values.min() <= tick <= values.max()
    ]
    axes.xaxis.set_major_locator(FixedLocator(ticks or [float(values[0])]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
