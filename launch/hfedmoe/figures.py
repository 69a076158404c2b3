"""The figures of an HFedMoE run, drawn from metrics.csv and the run's record.

Letters in shapes: C clients of the population, M clients of the last round, L layers, E experts a layer.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from launch.hfedmoe.client_figures import Record, budget_union, client_metric, expert_choice, expert_usage
from launch.run import figures
from launch.run.figures import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    FigureEntry,
    column,
    finish,
    line,
    percent,
)

Rows = Sequence[Mapping[str, Any]]


def write_figures(rows: Rows, record: Record, directory: str | os.PathLike) -> list[FigureEntry]:
    """Draws all figures of a run and returns their entries for the report.

    Args:
      rows: the rows of metrics.csv.
      record: values and arrays of the run by name: num_layers, num_experts, round_last; metric, the name
        of the task's, and unit, what it is a share of; baseline and baseline_name, its best constant
        answer; device_class, budget, union, client_scores and client_num_examples [C]; cohort [M];
        usage_before and usage_after [M, L, E]; times_chosen [C, L, E]; expert_load [L, E].
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
            words |= {"baseline": record["baseline_name"], "unit": record["unit"]}
            title, caption = (text.format(**words) for text in TEXTS[name])
            path = figures.save(figure, pathlib.Path(directory, f"{name}.png"))
            entries.append(FigureEntry(title, caption, path))
        return entries


TEXTS = {
    "learning": (
        "{Metric} and loss by round",
        "The global model on the validation data, and the clients' own held-out data: their mean with one "
        "standard deviation (shaded) and the mean of the worst 10%. All are by {unit}, except the curve by "
        "document: a document is answered from all of its passages. Dashed grey: the {baseline} on the test "
        "split.",
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
        "{Metric} by {unit} of the final global model on each client's own held-out data: sorted, and "
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
"""Title and caption of each figure; {Metric}, {unit} and {baseline} are names of the task's."""

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
    metric, unit = record["metric"], record["unit"]
    mean, spread = column(rows, f"client_{metric}_mean"), column(rows, f"client_{metric}_std")
    figures.band(left, x, np.maximum(mean - spread, 0), np.minimum(mean + spread, 1), SKY)
    line(left, x, column(rows, f"validation_{metric}"), f"validation, by {unit}", BLUE)
    line(left, x, mean, "clients' own data, mean", SKY)
    line(left, x, column(rows, f"client_{metric}_worst10"), "clients' own data, worst 10%", PINK)
    by_document = column(rows, f"validation_document_{metric}")
    ylabel = metric if np.isfinite(by_document).any() else f"{metric} by {unit}"
    line(left, x, by_document, "validation, by document", GREEN, linestyle="--", marker="")
    if np.isfinite(record["baseline"]):
        label = f"{record['baseline_name']}, test split"
        left.axhline(record["baseline"], color=GREY, linestyle="--", label=label, linewidth=1.3)
    percent(left)
    finish(left, metric.capitalize(), xlabel, ylabel, legend_columns=2)
    line(right, x, column(rows, "train_loss"), "training", ORANGE)
    line(right, x, column(rows, "validation_loss"), "validation", BLUE)
    finish(right, "Loss", xlabel, f"cross-entropy by {unit} (nats)", legend_columns=2)
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
    percent(axes)
    axes.set_ylim(0, 1.03)
    finish(axes, "Share of all experts", "round", "experts (%)")
    return figure


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
