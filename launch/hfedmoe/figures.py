"""The figures of an HFedMoE run, drawn from metrics.csv and the run's record.

Letters in shapes: C clients of the population, M clients of the last round, L layers, E experts a layer.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from launch.run import figures
from launch.run.figures import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY, FigureEntry, column, finish, line

Rows = Sequence[Mapping[str, Any]]
Record = Mapping[str, Any]


def write_figures(rows: Rows, record: Record, directory: str | os.PathLike) -> list[FigureEntry]:
    """Draws all figures of a run and returns their entries for the report.

    Args:
      rows: the rows of metrics.csv.
      record: values and arrays of the run by name: num_layers, num_experts, round_last; metric, the name
        of the task's, baseline and baseline_name, its best constant answer; device_class, budget, union,
        client_scores and client_num_examples [C]; cohort [M]; usage_before and usage_after [M, L, E];
        times_chosen [C, L, E]; expert_load [L, E].
      directory: where the PNG files go; created.
    """
    with figures.house_style():
        drawn = {
            "learning": by_round(rows, record),
            "learning_time": by_time(rows, record),
            "expert_usage": expert_usage(record),
            "expert_choice": expert_choice(record),
            "expert_share": expert_share(rows),
            "budget_union": budget_union(record),
            "client_metric": client_metric(record),
            "routing": routing(rows, record),
            "cost": cost(rows),
        }
        entries = []
        for name, figure in drawn.items():
            words = {"Metric": record["metric"].capitalize(), "many": figures.MANY}
            words["baseline"] = record["baseline_name"]
            title, caption = (text.format(**words) for text in TEXTS[name])
            path = figures.save(figure, pathlib.Path(directory, f"{name}.png"))
            entries.append(FigureEntry(title, caption, path))
        return entries


BEFORE, AFTER = "Before: the client's own model", "After: the aggregated model"
TEXTS = {
    "learning": (
        "{Metric} and loss by round",
        "The global model on the validation data, and the clients' own held-out data: their mean with one "
        "standard deviation (shaded) and the mean of the worst 10%. Scores are by passage; a document is "
        "answered from all of its passages. Dashed: the {baseline} on the test split.",
    ),
    "learning_time": (
        "{Metric} and loss by simulated time",
        "The same against the time that the devices would have taken: computing, sending and, in every "
        "round, waiting for the slowest client.",
    ),
    "expert_usage": (
        "Expert usage before and after aggregation",
        "A row is a client of the last round, a column an expert: the mean gate weight that the client's "
        "samples give it, while the client trained and, on the same batches, with the aggregated model. "
        "White: the client's update did not count. From {many} clients on: their distribution by expert.",
    ),
    "expert_choice": (
        "How many clients chose each expert",
        "Dark bars: in an average round, how many clients trained and sent this expert. Pale bars: how many "
        "clients ever did. Experts whose bars are short learn from few clients.",
    ),
    "expert_share": (
        "Experts activated and trained",
        "Of all experts, the share that the tokens of a batch were routed to, and the share that the "
        "clients' budgets let them train; means over clients and batches.",
    ),
    "budget_union": (
        "Budget against the experts that a batch needs",
        "A point is a client: how many experts, over all layers, its batches were routed to, against how "
        "many its device can train. Above the line the client must select. From {many} clients on: boxes "
        "from 25% to 75% of the clients of a class with that budget, whiskers from 5% to 95%.",
    ),
    "client_metric": (
        "{Metric} client by client",
        "{Metric} by passage of the final global model on each client's own held-out data: sorted, and "
        "against how much data the client has. From {many} clients on: the distribution in each class.",
    ),
    "routing": (
        "Routing",
        "The share of a layer's validation tokens that each expert serves (balanced routing: all cells "
        "equal). By round: routing consistency (equation 18), the tokens dropped for lack of capacity, and "
        "the entropy of the router's probabilities (0: certain; ln of the number of experts: undecided).",
    ),
    "cost": (
        "Traffic, time and failures by round",
        "Bytes sent and received by all clients, simulated time with the mean share of it that clients spent "
        "waiting for the slowest, and what became of the clients of each round.",
    ),
}
"""Title and caption of each figure; {Metric} and {baseline} are names of the task's."""

OUTCOMES = (
    ("clients_ok", "finished", GREEN),
    ("clients_dropped_out", "dropped out", AMBER),
    ("clients_over_budget", "over budget", ORANGE),
    ("clients_nonfinite", "loss not finite", PINK),
)
"""Column, label and colour of each outcome of a client's round."""


def by_round(rows: Rows, record: Record) -> Figure:
    """Draws the task's metric and the loss by round."""
    rounds = column(rows, "round")
    figure = _learning(rows, record, rounds, "round")
    for axes in figure.axes:
        figures.whole_numbers(axes, rounds)
    return figure


def by_time(rows: Rows, record: Record) -> Figure:
    """Draws the task's metric and the loss by simulated time."""
    seconds = column(rows, "simulated_time_s")
    unit, name = figures.time_scale(seconds)
    return _learning(rows, record, seconds / unit, f"simulated time ({name})")


def _learning(rows: Rows, record: Record, x: np.ndarray, xlabel: str) -> Figure:
    figure, ((left, right),) = figures.new_figure(1, 2, height_in=4.0)
    metric = record["metric"]
    mean, spread = column(rows, f"client_{metric}_mean"), column(rows, f"client_{metric}_std")
    figures.band(left, x, np.maximum(mean - spread, 0), np.minimum(mean + spread, 1), SKY)
    line(left, x, column(rows, f"validation_{metric}"), "validation", BLUE)
    line(left, x, mean, "clients, mean", SKY)
    line(left, x, column(rows, f"client_{metric}_worst10"), "clients, worst 10%", PINK)
    by_document = column(rows, f"validation_document_{metric}")
    line(left, x, by_document, "validation, by document", GREEN, linestyle="--", marker="")
    if np.isfinite(record["baseline"]):
        left.axhline(
            record["baseline"], color=GREY, linestyle="--", label=record["baseline_name"], linewidth=1.3
        )
    _percent(left)
    finish(left, metric.capitalize(), xlabel, f"{metric} by passage", legend_columns=2)
    line(right, x, column(rows, "train_loss"), "training", ORANGE)
    line(right, x, column(rows, "validation_loss"), "validation", BLUE)
    finish(right, "Loss", xlabel, "cross-entropy (nats)", legend_columns=2)
    return figure


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
    left.set_ylabel("client")
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
    axes.set_xlabel(f"{'' if num_layers <= 4 else 'layer; '}{num_experts} experts a layer, in order")


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


def expert_share(rows: Rows) -> Figure:
    """Draws the share of experts activated and trained by round."""
    figure, ((axes,),) = figures.new_figure(height_in=3.4)
    rounds = column(rows, "round")
    union, trained = column(rows, "union_share"), column(rows, "trained_share")
    line(axes, rounds, union, "activated: in the union of a batch", BLUE)
    line(axes, rounds, trained, "trained: selected within the budget", GREEN)
    figures.band(axes, rounds, trained, union, GREY)
    figures.whole_numbers(axes, rounds)
    _percent(axes)
    axes.set_ylim(0, 1.03)
    finish(axes, "Share of all experts", "round", "experts (%)")
    return figure


def budget_union(record: Record) -> Figure:
    """Draws the budget of each client against the number of experts that its batches use."""
    budget, union = np.asarray(record["budget"], float), np.asarray(record["union"], float)
    figure, ((axes,),) = figures.new_figure(height_in=4.6)
    took_part = np.isfinite(union)
    for name, where, look in _device_classes(record, took_part):
        if took_part.sum() >= figures.MANY:
            _boxes(axes, budget[where], union[where], look["color"], name)
        else:
            axes.scatter(budget[where], union[where], s=42, alpha=0.8, linewidths=0, label=name, **look)
    if took_part.any():
        most = max(budget.max(), union[took_part].max())
        most *= 1.06
        axes.plot([0, most], [0, most], color=GREY, linestyle="--", linewidth=1.3, label="union = budget")
        axes.fill_between([0, most], [0, most], most, color=ORANGE, alpha=0.07, linewidth=0)
        axes.text(0.02, 0.96, "must select", transform=axes.transAxes, va="top", color=ORANGE)
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


def _boxes(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    """Draws a box of the distribution of y at each value of x."""
    for place in np.unique(x):
        low, first, middle, third, high = np.quantile(y[x == place], [0.05, 0.25, 0.5, 0.75, 0.95])
        axes.plot([place, place], [low, high], color=color, linewidth=1.4)
        axes.plot([place, place], [first, third], color=color, linewidth=9, solid_capstyle="butt", alpha=0.6)
        axes.plot(place, middle, color=color, marker="_", markersize=13)
    axes.plot([], [], color=color, linewidth=6, alpha=0.6, label=f"{label}, {len(x)} clients")


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
            line(left, 100 * share, np.quantile(value[where], share), name, look["color"], marker="")
            _tenths(right, examples[where], value[where], look)
        else:
            style = {"s": 34, "alpha": 0.85, "linewidths": 0, **look}
            left.scatter(rank[where], value[where], label=name, zorder=3, **style)
            right.scatter(examples[where], value[where], zorder=3, **style)
    if known.any():
        mean, spread = value[known].mean(), value[known].std()
        worst = np.sort(value[known])[: int(np.ceil(0.1 * known.sum()))].mean()
        left.axhspan(max(0, mean - spread), min(1, mean + spread), color=SKY, alpha=0.15, linewidth=0)
        left.axhline(mean, color=BLUE, linewidth=1.5, label=f"mean {mean:.1%} ± {spread:.1%}")
        left.axhline(worst, color=PINK, linewidth=1.5, linestyle="--", label=f"worst 10%: {worst:.1%}")
        if examples[known].max() > 20 * max(1, examples[known].min()):
            right.set_xscale("log")
            decades = np.log10(examples[known].max() / max(1, examples[known].min()))
            right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
            right.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
            right.xaxis.set_minor_locator(NullLocator())
        if not many:
            figures.whole_numbers(left, rank[known])
    _percent(left)
    xlabel = "clients of the class, from worst to best (%)" if many else "clients, from worst to best"
    finish(left, "Sorted", xlabel, f"{record['metric']} on the client's own data")
    finish(right, "By amount of data", "training passages of the client", "")
    return figure


def _tenths(axes: Axes, x: np.ndarray, y: np.ndarray, look: Mapping[str, str]) -> None:
    """Draws the median of y, and from 25% to 75% of it, in each tenth of the points by x."""
    for part in np.array_split(np.argsort(x, kind="stable"), min(10, len(x))):
        low, middle, high = np.quantile(y[part], [0.25, 0.5, 0.75])
        place = np.median(x[part])
        axes.plot([place, place], [low, high], color=look["color"], linewidth=1.4)
        axes.plot(place, middle, markersize=6, color=look["color"], marker=look["marker"])


def routing(rows: Rows, record: Record) -> Figure:
    """Draws the load of the experts, and by round routing consistency, dropped tokens and router entropy."""
    load = np.asarray(record["expert_load"], float)
    rounds = column(rows, "round")
    figure, ((left, consistency), (dropped, entropy)) = figures.new_figure(2, 2, height_in=6.2)
    if np.isfinite(load).any():
        image = left.imshow(load, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        left.grid(False)
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.colorbar(image, ax=left, format=PercentFormatter(1), label="tokens of the layer")
    finish(left, "Load: share of tokens", "expert", "layer")
    line(consistency, rounds, column(rows, "routing_consistency"), "", BLUE)
    line(dropped, rounds, column(rows, "dropped_tokens_share"), "", ORANGE)
    for axes in (consistency, dropped):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    consistency.set_ylim(-0.03, 1.03)
    figures.from_zero(dropped)
    finish(consistency, "Routing consistency (18)", "round", "consistency (%)")
    finish(dropped, "Tokens dropped in training", "round", "token-expert pairs (%)")
    line(entropy, rounds, column(rows, "router_entropy"), "", GREEN)
    experts = record["num_experts"]
    if entropy.has_data():
        undecided = {"color": GREY, "linestyle": "--", "linewidth": 1.3}
        entropy.axhline(
            np.log(experts), label=f"undecided: ln {experts} = {np.log(experts):.2f}", **undecided
        )
        entropy.set_ylim(0, 1.08 * np.log(experts))
    finish(entropy, "Router entropy", "round", "entropy (nats)")
    for axes in (consistency, dropped, entropy):
        figures.whole_numbers(axes, rounds)
    return figure


def cost(rows: Rows) -> Figure:
    """Draws traffic, simulated time and failed clients by round."""
    figure, grid = figures.new_figure(3, 1, height_in=7.2, sharex=True)
    traffic, seconds, clients = grid[:, 0]
    _traffic(traffic, rows)
    _round_time(seconds, rows)
    _outcomes(clients, rows)
    figures.whole_numbers(clients, column(rows, "round"))
    clients.set_xlabel("round")
    return figure


def _traffic(axes: Axes, rows: Rows) -> None:
    rounds, up, down = (column(rows, name) for name in ("round", "bytes_up", "bytes_down"))
    unit, name = figures.byte_scale(np.concatenate([up, down]))
    line(axes, rounds, down / unit, "down (server to clients)", BLUE)
    line(axes, rounds, up / unit, "up (clients to server)", ORANGE)
    figures.from_zero(axes)
    _finish_with_legend_at_right(axes, "Traffic of a round", f"sent ({name})")


def _round_time(axes: Axes, rows: Rows) -> None:
    rounds, length, waiting = (column(rows, name) for name in ("round", "round_time_s", "waiting_share"))
    unit, name = figures.time_scale(length)
    line(axes, rounds, length / unit, "whole round", BLUE)
    line(axes, rounds, length * waiting / unit, "of it waiting, mean client", PINK)
    figures.from_zero(axes)
    _finish_with_legend_at_right(axes, "Simulated time of a round", f"time ({name})")


def _outcomes(axes: Axes, rows: Rows) -> None:
    rounds = column(rows, "round")
    bottom = np.zeros(len(rounds))
    width = 0.85 if len(rounds) <= 60 else 1.02  # with very many bars, the gaps would cause moiré
    for field, label, color in OUTCOMES:
        count = np.nan_to_num(column(rows, field))
        if count.any():
            axes.bar(rounds, count, bottom=bottom, width=width, color=color, label=label)
        bottom += count
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    _finish_with_legend_at_right(axes, "Clients", "clients")


def _finish_with_legend_at_right(axes: Axes, title: str, ylabel: str) -> None:
    finish(axes, title, "", ylabel)
    if axes.get_legend():
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _device_classes(record: Record, among: np.ndarray) -> list[tuple[str, np.ndarray, dict[str, str]]]:
    """Returns (name, mask of its clients, look) of each device class, the largest budget first."""
    device_class, budget = np.asarray(record["device_class"]), np.asarray(record["budget"])
    names = sorted(set(device_class.tolist()), key=lambda name: (-budget[device_class == name].mean(), name))
    classes = [(name, (device_class == name) & among, figures.look_of(name)) for name in names]
    return [entry for entry in classes if entry[1].any()]
