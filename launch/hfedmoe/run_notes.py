"""Lines about a run before its first round: what it starts from, and what of its config has no effect."""

from ml_collections import ConfigDict

from hfedmoe_jax import Experiment

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
    return (
        f"experts made of {model.source} by {model.upcycling}: squared error {report['relative_error']:.1%} "
        f"of the dense output; the best quarter by topic has {report['best_quarter']:.0%} of the gate mass "
        f"(overlap of topics {report['overlap']:.2f}, usage entropy {report['usage_entropy']:.2f}, "
        f"Gini {report['usage_gini']:.2f})"
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


def print_hints(experiment: Experiment) -> None:
    """Prints where the config asks for something that has no effect here."""
    fraction = experiment.config.budget.fraction
    if fraction and experiment.algorithm.selects:
        print(f"note: budget.fraction={fraction:g} sets every budget; the devices' memory is not asked")
    if experiment.algorithm.selects and min(experiment.budgets) == experiment.cost.all_experts:
        print("note: every client can train all experts, so nothing is selected: give the devices less "
              "memory, or set budget.fraction, e.g. 0.25")  # fmt: skip
    chunk = experiment.config.fl.chunk
    if chunk > experiment.chunk:
        print(f"note: fl.chunk={chunk} is for accelerators: a CPU computes clients one at a time, "
              "which is faster there")  # fmt: skip
