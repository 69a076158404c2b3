"""The figures of an HFedMoE run that show clients one by one, or many of them by their distribution.

Letters in shapes: C clients of the population, M clients of the last round, L layers, E experts a layer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from launch.run import figures
from launch.run.figures import BLUE, GREY, ORANGE, SKY, finish, line, percent

Record = Mapping[str, Any]

BEFORE, AFTER = "Before: the client's own model", "After: the aggregated model"


def expert_usage(record: Record) -> Figure:
    """Draws the clients' expert usage before and after aggregation, with one colour scale."""
    clients = np.asarray(record["cohort"])
    before, after = (np.asarray(record[name], float) for name in ("usage_before", "usage_after"))
    figure, ((left, right),) = figures.new_figure(
        1, 2, height_in=np.clip(1.6 + 0.16 * len(clients), 2.6, 9), sharey=True
    )
    if before.size == 0 or not np.isfinite(before).any():
        for axes, title in ((left, BEFORE), (right, AFTER)):
            finish(axes, title, "expert", "client")
        return figure
    largest = np.nanmax([np.nanmax(before), np.nanmax(after, initial=0)])
    columns = before[0].size
    if len(clients) >= figures.MANY:
        figure.set_size_inches(figures.WIDTH_IN, 4.2)
        for axes, title, usage in ((left, BEFORE, before), (right, AFTER, after)):
            known = usage.reshape(len(clients), columns)
            figures.quantile_bands(axes, np.arange(columns), known, BLUE)
            _layer_columns(axes, record["num_layers"], record["num_experts"], "#BBBBBB")
            finish(axes, title, axes.get_xlabel(), "usage (mean gate weight)" if axes is left else "")
        left.set_ylim(0, 1.05 * largest)
        return figure
    look = {"cmap": "viridis", "norm": PowerNorm(0.5, 0, largest), "aspect": "auto"}
    # With more columns than pixels, average them instead of leaving some out.
    look["interpolation"] = "nearest" if columns <= 500 else "antialiased"
    for axes, title, usage in ((left, BEFORE, before), (right, AFTER, after)):
        image = axes.imshow(usage.reshape(len(clients), columns), **look)
        _layer_columns(axes, record["num_layers"], record["num_experts"])
        axes.set_title(title)
    every = int(np.ceil(len(clients) / 40))
    left.set_yticks(range(0, len(clients), every), clients[::every])
    left.set_ylabel("client of the last round")
    figure.colorbar(image, ax=[left, right], label="usage (mean gate weight)", pad=0.01)
    return figure


def _layer_columns(axes: Axes, num_layers: int, num_experts: int, color: str = "white") -> None:
    axes.grid(False)
    for layer in range(1, num_layers):
        axes.axvline(layer * num_experts - 0.5, color=color, linewidth=2)
    every = int(np.ceil(num_layers / 12))
    layers = np.arange(0, num_layers, every)
    axes.set_xticks(
        (layers + 0.5) * num_experts - 0.5, [f"layer {n}" if num_layers <= 4 else str(n) for n in layers]
    )
    axes.set_xlabel(f"{'' if num_layers <= 4 else 'layer; '}experts 0 to {num_experts - 1} of each layer")


def expert_choice(record: Record) -> Figure:
    """Draws for each layer how many clients chose each expert."""
    times_chosen = np.asarray(record["times_chosen"])
    num_layers, num_experts = record["num_layers"], record["num_experts"]
    a_round = times_chosen.sum(0) / max(1, record["round_last"])
    ever = (times_chosen > 0).sum(0)
    columns = min(num_layers, 4 if num_experts <= 16 else 2)
    lines = int(np.ceil(num_layers / columns))
    figure, grid = figures.new_figure(lines, columns, height_in=0.9 + 2.1 * lines, sharex=True, sharey=True)
    experts = np.arange(num_experts)
    for layer, axes in enumerate(grid.flat):
        if layer >= num_layers:
            axes.remove()
            continue
        axes.bar(experts, ever[layer], color=SKY, alpha=0.45, width=0.8, label="in any round")
        axes.bar(experts, a_round[layer], color=BLUE, width=0.5, label="in an average round")
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_title(f"Layer {layer}")
    grid[0, 0].set_ylim(0, 1.08 * max(1, ever.max()))
    figure.supxlabel("expert", fontsize=9.5)
    figure.supylabel("clients", fontsize=9.5)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def budget_union(record: Record) -> Figure:
    """Draws the budget of each client against the number of experts that its batches use."""
    budget, union = np.asarray(record["budget"], float), np.asarray(record["union"], float)
    figure, ((axes,),) = figures.new_figure(height_in=4.6)
    took_part = np.isfinite(union)
    for name, where, look in _device_classes(record, took_part):
        if took_part.sum() >= figures.MANY:
            _boxes(axes, budget[where], union[where], look, name)
        else:
            axes.scatter(budget[where], union[where], s=42, alpha=0.8, linewidths=0, label=name, **look)
    if took_part.any():
        most = max(budget.max(), union[took_part].max())
        most *= 1.06
        axes.plot(
            [0, most],
            [0, most],
            color=GREY,
            linestyle="--",
            linewidth=1.3,
            label="needs as many as it can train",
        )
        axes.fill_between([0, most], [0, most], most, color=ORANGE, alpha=0.07, linewidth=0)
        axes.text(
            0.02,
            0.96,
            "must select",
            transform=axes.transAxes,
            va="top",
            color=ORANGE,
        )
        axes.text(0.98, 0.04, "everything fits", transform=axes.transAxes, ha="right", color=GREY)
        axes.set(xlim=(0, most), ylim=(0, most))
    finish(
        axes,
        "",
        "budget (experts over all layers)",
        "experts that a batch is routed to (mean)",
        legend_columns=5,
    )
    return figure


def _boxes(axes: Axes, x: np.ndarray, y: np.ndarray, look: Mapping[str, str], label: str) -> None:
    """Draws a box of the distribution of y at each value of x, the median as a mark."""
    color, marker = look["color"], look["marker"]
    for place in np.unique(x):
        low, first, middle, third, high = np.quantile(y[x == place], [0.05, 0.25, 0.5, 0.75, 0.95])
        axes.plot([place, place], [low, high], color=color, linewidth=1.4)
        axes.plot([place, place], [first, third], color=color, linewidth=9, solid_capstyle="butt", alpha=0.6)
        axes.plot(place, middle, color=color, marker=marker, markersize=8, markeredgecolor="white")
    axes.plot(
        [], [], color=color, linewidth=3, marker=marker, markersize=8, label=f"{label}, {len(x)} clients"
    )


def client_metric(record: Record) -> Figure:
    """Draws the spread of the task's metric over the clients."""
    value = np.asarray(record["client_scores"], float)
    examples = np.asarray(record["client_num_examples"], float)
    known = np.isfinite(value)
    rank = np.full(len(value), np.nan)
    rank[known] = 1 + np.argsort(np.argsort(value[known], kind="stable"))
    figure, ((left, right),) = figures.new_figure(1, 2, height_in=4.2, sharey=True, width_ratios=[3, 2])
    many = known.sum() >= figures.MANY
    for name, where, look in _device_classes(record, known):
        if many:  # curves of a share of the class each, and medians over tenths of the clients by data
            share = np.linspace(0, 1, 101)
            style = {"markevery": 20, "markersize": 7, "marker": look["marker"]}
            line(left, 100 * share, np.quantile(value[where], share), name, look["color"], **style)
            _tenths(right, examples[where], value[where], look)
        else:
            style = {"s": 34, "alpha": 0.85, "linewidths": 0, **look}
            left.scatter(rank[where], value[where], label=name, zorder=3, **style)
            right.scatter(examples[where], value[where], zorder=3, **style)
    if known.any():
        mean, spread = value[known].mean(), value[known].std()
        worst = np.sort(value[known])[: int(np.ceil(0.1 * known.sum()))].mean()
        left.axhspan(max(0, mean - spread), min(1, mean + spread), color=GREY, alpha=0.12, linewidth=0)
        left.axhline(mean, color=GREY, linewidth=1.5, label=f"mean {mean:.1%} ± {spread:.1%}")
        left.axhline(worst, color=GREY, linewidth=1.5, linestyle="--", label=f"worst 10%: {worst:.1%}")
        if examples[known].max() > 20 * max(1, examples[known].min()):
            right.set_xscale("log")
            decades = np.log10(examples[known].max() / max(1, examples[known].min()))
            right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
            right.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
            right.xaxis.set_minor_locator(NullLocator())
        if not many:
            figures.whole_numbers(left, rank[known])
    percent(left)
    xlabel = "clients of the class, from worst to best (%)" if many else "clients, from worst to best"
    finish(left, "Sorted", xlabel, f"{record['metric']} by {record['unit']} on its own data")
    finish(right, "By amount of data", "training passages of the client", "")
    return figure


def _tenths(axes: Axes, x: np.ndarray, y: np.ndarray, look: Mapping[str, str]) -> None:
    """Draws the median of y, and from 25% to 75% of it, in each tenth of the points by x."""
    for part in np.array_split(np.argsort(x, kind="stable"), min(10, len(x))):
        low, middle, high = np.quantile(y[part], [0.25, 0.5, 0.75])
        place = np.median(x[part])
        axes.plot([place, place], [low, high], color=look["color"], linewidth=1.4)
        axes.plot(place, middle, markersize=6, color=look["color"], marker=look["marker"])


def _device_classes(record: Record, among: np.ndarray) -> list[tuple[str, np.ndarray, dict[str, str]]]:
    """Returns (name, mask of its clients, look) of each device class, the largest budget first."""
    device_class, budget = np.asarray(record["device_class"]), np.asarray(record["budget"])
    names = sorted(set(device_class.tolist()), key=lambda name: (-budget[device_class == name].mean(), name))
    looks = figures.looks_of(names)
    classes = [(name, (device_class == name) & among, looks[name]) for name in names]
    return [entry for entry in classes if entry[1].any()]
