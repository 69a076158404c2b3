"""The common style of all figures, and plotting functions that they share."""

import os
import pathlib
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# The palette of Okabe and Ito for colour-blind readers, without yellow, which is invisible on white.
BLUE, ORANGE, GREEN, PINK, AMBER, SKY, GREY = PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#6B6B6B",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 9.5,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a label such as $x_{$ is text
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
WIDTHS = (3.4, 2.4, 1.6, 1.1)
"""Of the curves of a panel, in the order of drawing: of two that coincide both are seen."""

MANY = 100
"""Clients from which on a panel shows their distribution instead of a mark for each."""

WIDTH_IN = 9.0
DOTS_PER_INCH = 150


class FigureEntry(NamedTuple):
    """A figure with its title and caption in the report."""

    title: str
    caption: str
    path: pathlib.Path


def house_style() -> AbstractContextManager[None]:
    """Returns a context in which figures are drawn and saved; matplotlib's global settings are kept."""
    settings: Any = {**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}
    return matplotlib.rc_context(settings)


def new_figure(
    rows: int = 1, columns: int = 1, height_in: float = 3.6, **layout: Any
) -> tuple[Figure, np.ndarray]:
    """Returns a figure of the common width and its axes as an array [rows, columns]."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, nothing to close
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def save(figure: Figure, path: str | os.PathLike) -> pathlib.Path:
    """Writes a figure as a PNG file, creating its directory in one that is there, and returns the path."""
    path = pathlib.Path(path)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Returns a column of metrics as floats, nan for a missing value.

    >>> column([{"loss": 1}, {"loss": None}, {}], "loss")
    array([ 1., nan, nan])
    """
    return np.array([np.nan if row.get(name) is None else row[name] for row in rows], float)


KNOWN_LOOKS = {"phone": 0, "tablet": 1, "laptop": 2}
"""Places in the palette of the device classes of the default config."""


def looks_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns the colour and the marker of each device class: by its name, so alike in all runs.

    Grey is left to reference lines. Of two names of a run that would have the same colour, the second in the
    alphabet gets the next one of the palette; with more names than colours, each further turn through the
    palette has other markers.

    >>> looks_of(["phone"])
    {'phone': {'color': '#0072B2', 'marker': 'o'}}
    """
    colors, found, used = [color for color in PALETTE if color != GREY], {}, Counter()
    for name in sorted(set(names), key=lambda name: (name not in KNOWN_LOOKS, name)):
        first = KNOWN_LOOKS.get(name, zlib.crc32(name.encode("utf-8", "surrogatepass")))
        places = [(first + step) % len(colors) for step in range(len(colors))]
        place = min(places, key=lambda place: used[place])
        marker = MARKERS[(place + used[place]) % len(MARKERS)]
        used[place] += 1
        found[name] = {"color": colors[place], "marker": marker}
    return found


def line(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, color: str, **style: Any) -> None:
    """Draws a line through the finite points, thinner than those before it (`WIDTHS`).

    If there are no points, there is no line and no legend entry.
    """
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return
    width = WIDTHS[min(len(axes.lines), len(WIDTHS) - 1)]
    style = {"linewidth": width, **style}
    if "marker" not in style and known.sum() <= 40:
        style |= {"marker": "o", "markersize": 1.5 + 1.2 * width}
    axes.plot(x[known], y[known], label=label, color=color, **style)


def quantile_bands(axes: Axes, x: np.ndarray, values: np.ndarray, color: str) -> None:
    """Draws the distribution over rows: the median, and from 25% to 75% and from 5% to 95% of them shaded.

    Args:
      x: [N].
      values: [rows, N]; NaN where a row is not known, and a row at least is known everywhere.
    """
    low, first, middle, third, high = np.nanquantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, label="5% to 95%")
    axes.fill_between(x, first, third, color=color, alpha=0.35, linewidth=0, label="25% to 75%")
    axes.plot(x, middle, color=color, linewidth=1.6, label="median")


def band(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str) -> None:
    """Shades what lies between two curves where both are known."""
    known = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
    if not known.any():
        return
    axes.fill_between(x[known], low[known], high[known], color=color, alpha=0.15, linewidth=0)


def finish(axes: Axes, title: str, xlabel: str, ylabel: str, legend_columns: int = 3) -> None:
    """Adds title, labels and a legend below the axes; axes without data get a note instead."""
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color=GREY)
        axes.set(xticks=[], yticks=[])
    elif axes.get_legend_handles_labels()[0]:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
        axes.legend(ncols=legend_columns, **below)


def whole_numbers(axes: Axes, values: np.ndarray) -> None:
    """Sets integer ticks on an x axis that spans `values`, even a single one."""
    if not axes.has_data():
        return
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    margin = max(0.5, 0.03 * (values.max() - values.min()))
    axes.set_xlim(values.min() - margin, values.max() + margin)


def from_zero(axes: Axes) -> None:
    """Starts the y axis at zero, with a margin above the data."""
    highest = axes.dataLim.ymax if axes.has_data() else 1.0
    axes.set_ylim(0, 1.08 * highest if highest > 0 else 1.0)


def percent(axes: Axes) -> None:
    """Labels a y axis of shares in whole percent."""
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def time_scale(seconds: np.ndarray) -> tuple[float, str]:
    """Returns a suitable unit of time for these durations, in seconds, and its name.

    >>> time_scale(np.array([30.0, 7300.0]))
    (3600.0, 'h')
    """
    return _scale(seconds, [(3600.0, "h"), (60.0, "min"), (1.0, "s")], 2.0)


def byte_scale(count: np.ndarray) -> tuple[float, str]:
    """Returns a suitable unit for these sizes, in bytes, and its name.

    >>> byte_scale(np.array([12e6]))
    (1000000.0, 'MB')
    """
    return _scale(count, [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")], 1.0)


def _scale(values: np.ndarray, units: list[tuple[float, str]], at_least: float) -> tuple[float, str]:
    largest = np.max(values, initial=0.0, where=np.isfinite(values))
    return next((unit for unit in units if largest >= at_least * unit[0]), units[-1])
