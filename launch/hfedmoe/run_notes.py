"""Lines about a run before its first round: what it starts from, and what of its config has no effect."""

import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax import Experiment
from hfedmoe_jax.models.adapter_files import BASE, read_adapter_config
from hfedmoe_jax.specialisation import DEEPSEEK

REPLACING = ("fl.score", "fl.expert_rule", "fl.gating_rule", "server.optimizer")
"""Fields that replace a part of the algorithm."""


def run_line(config: ConfigDict) -> str:
    """Returns what a run is: its algorithm, the parts of it that the config replaces, and the data.

    >>> from configs.hfedmoe import get_config
    >>> config = get_config()
    >>> config.fl.score = "frequency"
    >>> run_line(config)
    'hfedmoe with fl.score=frequency on bbc_news'
    """
    replaced = [f"{field}={value}" for field in REPLACING if (value := _value(config, field))]
    parts = f" with {', '.join(replaced)}" if replaced else ""
    return f"{config.fl.algorithm}{parts} on {config.data.source}"


def _value(config: ConfigDict, field: str) -> str:
    group, name = field.split(".")
    return config[group][name]


def mixture_line(experiment: Experiment) -> str:
    """Returns what distinguishes the mixtures that a run starts from, on held-out public text."""
    assert experiment.start is not None
    model, report = experiment.config.model, experiment.start.report
    change = report["loss"] / report["dense_loss"] - 1
    place = "above" if change > 0 else "below"
    return (
        f"experts made of {model.source} by {model.upcycling}: held-out loss {report['loss']:.3f}, "
        f"{abs(change):.1%} {place} the dense model's; squared error {report['relative_error']:.1%}\n"
        f"{mass_line(report)}; DeepSeek-V2-Lite by task {mass_line(DEEPSEEK)}"
    )


def mass_line(report: dict[str, Any]) -> str:
    """Returns figures of gate mass, numbers or pairs of least and largest.

    >>> mass_line(dict(best_quarter=0.57, overlap=0.4, usage_entropy=(0.8, 0.9), usage_gini=0.3))
    'best quarter of the experts 0.57 of the gate mass, overlap 0.40, usage entropy 0.80-0.90, Gini 0.30'
    """
    best, overlap, entropy, gini = (
        "-".join(f"{each:.2f}" for each in np.atleast_1d(report[name]))
        for name in ("best_quarter", "overlap", "usage_entropy", "usage_gini")
    )
    return (
        f"best quarter of the experts {best} of the gate mass, overlap {overlap}, "
        f"usage entropy {entropy}, Gini {gini}"
    )


def waiting_line(config: ConfigDict) -> str:
    """Returns what takes minutes before the first round; "" if nothing does.

    >>> from configs.hfedmoe import get_config
    >>> waiting_line(get_config("agnews_minilm"))
    'reading minilm; then its frozen layers read every passage once (model.cache_trunk), which takes minutes'
    """
    if not config.model.cache_trunk:
        return ""
    reads = "then its frozen layers read every passage once (model.cache_trunk), which takes minutes"
    return f"reading {config.model.source}; {reads}"


def adapters_note(directory: str | os.PathLike) -> str:
    """Returns that nobody can check which base adapters belong to; "" if their config has its digest."""
    config = read_adapter_config(directory)
    if config.get(BASE):
        return ""
    known = config.get("base_model_name_or_path")
    return f"model.adapters={directory} names its base only ({known}); the run takes model.source for it"


def print_hints(experiment: Experiment) -> None:
    """Prints what of the config has no effect here, or could not be checked."""
    model, fraction = experiment.config.model, experiment.config.budget.fraction
    if model.source and not hasattr(experiment.model.module, "networks"):
        print(f"note: {experiment.model.num_layers} layers of {experiment.model.num_experts} experts, "
              f"{experiment.model.top_k} a token, are the checkpoint's; model.num_layers, num_experts, top_k "
              "and upcycling have no effect")  # fmt: skip
    if model.adapters and (note := adapters_note(model.adapters)):
        print(f"note: {note}")
    if fraction and experiment.algorithm.selects:
        print(f"note: budget.fraction={fraction:g} sets every budget; the devices' memory is not asked")
    if experiment.algorithm.selects and min(experiment.budgets) == experiment.cost.all_experts:
        print("note: every client can train all experts, so nothing is selected: give the devices less "
              "memory, or set budget.fraction, e.g. 0.25")  # fmt: skip
    chunk = experiment.config.fl.chunk
    if chunk > experiment.chunk:
        print(f"note: fl.chunk={chunk} is for accelerators: a CPU computes clients one at a time, "
              "which is faster there")  # fmt: skip
