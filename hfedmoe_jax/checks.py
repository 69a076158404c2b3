"""Refuses a config that cannot run, before any data is read."""

from typing import Any

from ml_collections import ConfigDict

from hfedmoe_jax.aggregation.sums import MOST_MEMBERS
from hfedmoe_jax.algorithms import Method, algorithms
from hfedmoe_jax.algorithms.method import refuse_spread_experts
from hfedmoe_jax.data.tokenizers import CHECKPOINT
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelSizes, check_sizes, families
from hfedmoe_jax.models.lora import LORA
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.optimizers import optimizers
from hfedmoe_jax.pretrained import find_source
from hfedmoe_jax.published import PUBLISHED
from hfedmoe_jax.ranges import check_ranges
from hfedmoe_jax.registry import unknown_name
from hfedmoe_jax.schedule import MOST_CHUNK
from hfedmoe_jax.scores import estimates
from hfedmoe_jax.tasks import tasks

CHOICES = {
    "fl.forward": ("routed", "active"),
    "importance.refresh": ("step", "previous", "round"),
    "importance.unit": ("sample", "token"),
}


def lookup(config: ConfigDict, field: str) -> Any:
    """Returns the value at a dotted path.

    Raises:
      InputError: the config has no such field: it is one of another experiment, or incomplete.
    """
    part = config
    for name in field.split("."):
        if name not in part:
            problem = "the config has no such field, which the experiment `hfedmoe` needs"
            raise InputError(
                field, None, problem, "give a config of that experiment, e.g. configs/hfedmoe.py"
            )
        part = part[name]
    return part


def check_config(config: ConfigDict) -> None:
    """Checks ranges and names that no single part of the package owns.

    Raises:
      InputError: the first field at fault.
    """
    check_ranges(lambda field: lookup(config, field))
    for field, known in CHOICES.items():
        if lookup(config, field) not in known:
            raise unknown_name(field, lookup(config, field), list(known))
    if config.fl.chunk > MOST_CHUNK:
        raise InputError("fl.chunk", config.fl.chunk, f"above {MOST_CHUNK}", "use at most that, or 0")
    if config.fl.clients_per_round > MOST_MEMBERS:
        raise InputError(
            "fl.clients_per_round",
            config.fl.clients_per_round,
            f"above {MOST_MEMBERS:,}, the most that exact sums have room for",
            "sample fewer clients a round",
        )
    if config.fl.clients_per_round > config.fl.clients:
        raise InputError(
            "fl.clients_per_round",
            config.fl.clients_per_round,
            f"above fl.clients={config.fl.clients}",
            "sample at most all clients",
        )
    given = config.data.validation_path or config.data.validation_split
    if not (config.data.validation_fraction > 0 or given):
        raise InputError(
            "data.validation_fraction",
            config.data.validation_fraction,
            "no validation split, which chooses the best round",
            "use e.g. 0.1",
        )
    check_sizes(config.model)
    check_source(config)
    experts = families[config.model.family](config.model, ModelSizes(1, 1, 1)).num_experts
    if experts % config.mesh.experts:
        problem = f"does not divide the {experts} experts of a layer"
        raise InputError("mesh.experts", config.mesh.experts, problem, f"use one of {divisors(experts)}")
    check_task(config)
    build = algorithms[config.fl.algorithm](config)
    if isinstance(build, Method):
        refuse_spread_experts(build, config.fl.algorithm, config.mesh.experts)
    estimates[config.importance.estimate]
    if config.client.optimizer not in optimizers:
        raise unknown_name("client.optimizer", config.client.optimizer, list(optimizers))


def check_source(config: ConfigDict) -> None:
    """Raises InputError unless model, checkpoint and tokenizer go together."""
    module = families[config.model.family](config.model, ModelSizes(1, 1, 1))
    pretrained, tokenizer = hasattr(module, "read"), config.data.tokenizer
    if pretrained and config.model.source not in PUBLISHED:
        find_tensors(find_source(config.model.source))  # headers alone, before any data are read
    if config.model.source and not pretrained:
        problem = f"model.family={config.model.family} is trained from scratch"
        raise InputError(
            "model.source", config.model.source, problem, "use model.family=bert, or leave it empty"
        )
    if config.model.train == LORA and not pretrained:
        problem = f"model.family={config.model.family} has no pretrained matrices to adapt"
        raise InputError("model.train", LORA, problem, "use model.family=bert, decoder or switch_t5")
    if config.model.adapters and not (config.model.train == LORA and getattr(module, "names", None)):
        problem = f"model.family={config.model.family} with model.train={config.model.train} reads none"
        raise InputError("model.adapters", config.model.adapters, problem,
                         "use a decoder with model.train=lora, or leave it empty")  # fmt: skip
    if pretrained and tokenizer != CHECKPOINT:
        problem = "is not the one that the checkpoint learned with"
        raise InputError("data.tokenizer", tokenizer, problem, f"use data.tokenizer={CHECKPOINT}")


def check_task(config: ConfigDict) -> None:
    """Raises InputError for a task that does not read what the model's family returns."""
    task, module = tasks[config.task.name], families[config.model.family](config.model, ModelSizes(1, 1, 1))
    if module.output != task.output:
        fitting = [name for name in tasks if tasks[name].output == module.output]
        raise InputError(
            "task.name",
            config.task.name,
            f"reads an output a {task.output}; model.family={config.model.family} has one a {module.output}",
            f"use one of {', '.join(fitting)}" if fitting else "use another family",
        )
    if task.labelled and not config.data.label_column:
        problem = f"is empty, and task.name={config.task.name} asks for labels"
        raise InputError("data.label_column", "", problem, "name the column of the labels")


def divisors(number: int) -> list[int]:
    """Returns all of them, ascending.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [part for part in range(1, number + 1) if number % part == 0]
