"""How the results of an HFedMoE run read, on the screen and in the report.

A score is named by what it is a share of: "accuracy by passage", "by token" or "by document". In files
`accuracy` is by passage or by token, the task's `unit`, and `document_accuracy` is by document.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from hfedmoe_jax import Experiment
from launch.run.progress import format_seconds, format_value
from launch.run.report import Comparison

TEST_SCORE = re.compile(r"test_(?:document_)?(\w+)_final")
SCORE = re.compile(
    r"(?P<split>test|validation|client|baseline)_(?P<whole>document_)?(?P<score>\w+?)(_(?P<model>final|best))?"
)
"""Names in summary.json, of which those of scores are by passage, by token or by document."""


def readable(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a summary whose scores are named by what they are a share of.

    >>> list(readable({"unit": "passage", "test_document_accuracy_final": 0.9, "client_accuracy": {}}))
    ['unit', 'test accuracy by document, final', 'client accuracy by passage']
    """
    scores = {match[1] for name in summary if (match := TEST_SCORE.fullmatch(name))}

    def name_of(name: str) -> str:
        match = SCORE.fullmatch(name)
        if match is None or match["score"] not in scores:
            return name
        what = f"{match['split']} {match['score']} by {'document' if match['whole'] else summary['unit']}"
        return f"{what}, {match['model']}" if match["model"] else what

    return {name_of(name): value for name, value in summary.items()}


def class_tables(summary: dict[str, Any]) -> list[Comparison]:
    """Returns the report's table of scores by label, if the task has them."""
    scores = summary["test_by_class"]
    if not scores:
        return []
    rows = [
        [label, f"{of['documents']:.0f}", *(f"{of[name]:.3f}" for name in ("precision", "recall", "f1"))]
        for label, of in scores.items()
    ]
    caption = "The last model; a document is answered from the mean of its passages' log-probabilities."
    return [Comparison("Test documents by label", caption, CLASS_HEADER, rows)]


CLASS_HEADER = ("label", "documents", "precision", "recall", "F1")


def introduction(experiment: Experiment) -> str:
    """Returns the report's opening sentence."""
    config = experiment.config
    return (
        f"{config.fl.rounds} rounds of {config.fl.algorithm} with {config.fl.clients_per_round} of "
        f"{experiment.num_clients} clients a round. The model has {experiment.model.num_layers} layers of "
        f"{experiment.model.num_experts} experts. The {experiment.task.metric_name} on the validation split "
        "chose the best round; the test split was read once, at the end."
    )


def summary_rows(summary: dict[str, Any], workdir: pathlib.Path) -> list[tuple[str, Any]]:
    """Returns the summary as (name, text) lines for the screen."""
    metric, unit, speed = summary["metric"], summary["unit"], summary["client_steps_per_s"]
    spread = summary[f"client_{metric}"]
    budgets = ", ".join(f"{name} {budget}" for name, budget in summary["expert_budget"].items())
    best = summary["best_round"]
    return [
        (f"test {metric}", f"{score_text(summary, 'final')} after the last round"),
        ("", f"{score_text(summary, 'best')} of round {best}, the best on validation"),
        *perplexity_rows(summary),
        (summary["baseline"], f"{summary[f'baseline_{metric}']:.4f} by {unit}, the best constant answer"),
        (
            "clients' own data",
            "{mean:.4f} mean by {unit}, {std:.4f} std, {worst10:.4f} worst 10%".format(unit=unit, **spread),
        ),
        ("expert budget", f"{budgets} of {summary['experts']}"),
        ("client rounds", ", ".join(f"{k} {v}" for k, v in summary["client_rounds"].items() if v) or "none"),
        ("sent", f"{summary['bytes_up'] / 1e6:,.1f} MB up, {summary['bytes_down'] / 1e6:,.1f} MB down"),
        *([("privacy spent", privacy_text(summary["privacy"]))] if "privacy" in summary else []),
        ("simulated time", format_seconds(summary["simulated_time_s"])),
        ("speed", f"{format_value(speed)} client steps/s, {format_seconds(summary['wall_s'])} in all"),
        ("report", workdir / "report.html"),
        ("everything", workdir),
    ]


def perplexity_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the lines of the test perplexity, of tasks that have one."""
    if "test_perplexity_final" not in summary:
        return []
    last, best = (summary[f"test_perplexity_{model}"] for model in ("final", "best"))
    return [("test perplexity", f"{last:.4g} by token after the last round, {best:.4g} of the best")]


def score_text(summary: dict[str, Any], model: str) -> str:
    """Returns the test score of the final or the best model, by passage or token, and by document."""
    metric, unit = summary["metric"], summary["unit"]
    of_passages, of_documents = f"test_{metric}_{model}", f"test_document_{metric}_{model}"
    if of_documents not in summary:
        return f"{summary[of_passages]:.4f} by {unit}"
    return f"{summary[of_passages]:.4f} by {unit}, {summary[of_documents]:.4f} by document,"


def privacy_text(privacy: dict[str, Any]) -> str:
    """Returns the privacy spent, for the screen."""
    return "epsilon {epsilon:.3g} at delta {delta:g}, of a client".format(**privacy)
