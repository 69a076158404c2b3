"""A round's row of metrics.csv.

Axes: M clients of a round's cohort.
"""

from typing import Any

import numpy as np

from hfedmoe_jax.algorithms import RoundMetrics
from hfedmoe_jax.reports import OK, OVER_BUDGET, STATUS_NAMES
from hfedmoe_jax.tasks import Task

EVALUATION = ("validation_", "client_")
"""How the columns of an evaluation begin; those that count clients begin with clients_."""


def round_row(metrics: RoundMetrics, num_experts: int) -> dict[str, float | None]:
    """Returns a round's row of metrics: means over the clients whose update counted, and counts.

    `union_share` includes the clients that failed for it.
    """
    report = metrics.report
    ok = report.status == OK

    def mean(values: Any, among: np.ndarray = ok) -> float | None:
        value = np.mean(np.asarray(values, np.float64)[among]) if among.any() else np.nan
        return None if np.isnan(value) else float(value)

    counts = np.bincount(report.status, minlength=len(STATUS_NAMES))
    return dict(
        train_loss=mean(report.loss),
        **{f"train_{name}": mean(values) for name, values in report.scores.items()},
        union_share=mean(report.union_size / num_experts, ok | (report.status == OVER_BUDGET)),
        trained_share=mean(report.trained_size / num_experts),
        routing_consistency=mean(metrics.consistency),
        router_entropy=mean(report.router_entropy),
        dropped_tokens_share=mean(report.dropped),
        padding_tokens_share=mean(report.padding),
        empty_slots_share=mean(report.empty_slots),
        **{f"clients_{name}": int(count) for name, count in zip(STATUS_NAMES, counts, strict=True)},
    )


def metric_columns(task: Task) -> tuple[str, ...]:
    """Returns the columns of metrics.csv, in order.

    The task's scores are of passages, those of whole documents are named so.
    """
    scores, metric = task.scores, task.metric
    return (
        "round",
        "train_loss",
        *(f"train_{name}" for name in task.train_scores),
        *(f"validation_{name}" for name in (*scores, *task.document_scores)),
        "validation_loss",
        "validation_router_entropy",
        *(f"client_{metric}_{part}" for part in ("mean", "std", "worst10")),
        "simulated_time_s",
        "round_time_s",
        "waiting_share",
        "bytes_up",
        "bytes_down",
        "union_share",
        "trained_share",
        "routing_consistency",
        "router_entropy",
        "dropped_tokens_share",
        "padding_tokens_share",
        "empty_slots_share",
        "empty_places_share",
        *(f"clients_{name}" for name in STATUS_NAMES),
        "wall_s",
    )


def without_evaluation(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without the columns that only an evaluated round has."""
    return {name: value for name, value in row.items() if not name.startswith(EVALUATION)}
