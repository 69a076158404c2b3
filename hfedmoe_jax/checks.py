"""Refuses a config that cannot run, before any data is read."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hfedmoe_jax.aggregation.sums import MOST_MEMBERS
from hfedmoe_jax.algorithms import Method, algorithms
from hfedmoe_jax.algorithms.method import refuse_spread_experts
from hfedmoe_jax.devices import read_profiles
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelSizes, families
from hfedmoe_jax.optimizers import optimizers
from hfedmoe_jax.registry import unknown_name
from hfedmoe_jax.schedule import MOST_CHUNK
from hfedmoe_jax.scores import estimates
from hfedmoe_jax.tasks import tasks

MOST_EXPERT_PARAMETERS = 10**12
"""Parameters of all experts together: 4 TB in float32."""


class Range(NamedTuple):
    """What a number may be: from `low` to `high`, without an end that is open.

    >>> str(Range(0, 1, 0.5, open_high=True)), str(Range(1, 10**6, 8))
    ('[0, 1)', '[1, 1,000,000]')
    """

    low: float
    high: float
    example: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:,d}" if isinstance(end, int) else f"{end:g}" for end in self[:2])
        return f"{'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"


def _above_zero(high: float, example: float) -> Range:
    return Range(0, high, example, open_low=True)


def _below_one(example: float) -> Range:
    return Range(0, 1, example, open_high=True)


LIMITS = {
    "seed": Range(0, 2**32 - 1, 0),  # JAX would drop higher bits
    "data.vocab_size": Range(1, 2**24, 8192),
    "data.seq_len": Range(2, 2**20, 64),
    "model.num_layers": Range(1, 10_000, 2),
    "model.width": Range(1, 2**20, 128),
    "model.num_heads": Range(1, 2**16, 4),
    "model.hidden": Range(1, 2**20, 256),
    "model.num_experts": Range(2, 2**16, 8),
    "model.top_k": Range(1, 2**16, 1),
    "model.capacity_factor": _above_zero(1e6, 1.5),
    "model.eval_capacity_factor": _above_zero(1e6, 2.0),
    "model.load_balance": Range(0, 1e9, 0.01),
    "fl.clients": Range(1, 10**7, 20),
    "fl.clients_per_round": Range(1, MOST_MEMBERS, 10),
    "fl.rounds": Range(1, 2**31 - 1, 40),
    "fl.local_steps": Range(1, 10**6, 8),
    "fl.batch_size": Range(1, 2**20, 16),
    "fl.dropout_probability": _below_one(0.1),
    "fl.chunk": Range(0, MOST_CHUNK, 0),
    "importance.lam": Range(0, 1, 0.5),
    "importance.beta": Range(0, 1e9, 0.1),
    "aggregation.tau": Range(0, 1, 0.0),
    "client.learning_rate": _above_zero(1e9, 1e-3),
    "client.momentum": _below_one(0.9),
    "client.second_momentum": _below_one(0.999),
    "client.epsilon": Range(0, 1e9, 1e-8),
    "client.proximal_mu": Range(0, 1e9, 0.01),
    "server.learning_rate": Range(0, 1e9, 0.0),
    "server.momentum": _below_one(0.9),
    "server.second_momentum": _below_one(0.99),
    "server.epsilon": Range(0, 1e9, 1e-3),
    "budget.tiers": Range(0, 2**16, 0),
    "mesh.experts": Range(1, 2**16, 1),
    "eval.every": Range(1, 2**31 - 1, 2),
    "eval.batch_size": Range(1, 2**20, 64),
    "eval.max_examples": Range(0, 2**31 - 1, 0),
    "checkpoint.every": Range(1, 2**31 - 1, 5),
    "checkpoint.keep": Range(1, 10**6, 3),
}
"""What the numbers of a config may be; docs/config.md has the same table. Other fields are checked where they
are read. NaN is in no range."""

DIVIDING_BY_EPSILON = ("adam", "yogi")
"""Optimizers that need an epsilon above 0."""

CHOICES = {
    "fl.forward": ("routed", "active"),
    "importance.refresh": ("step", "previous", "round"),
    "importance.unit": ("sample", "token"),
}


def lookup(config: ConfigDict, field: str) -> Any:
    """Returns the value at a dotted path."""
    for name in field.split("."):
        config = config[name]
    return config


def check_config(config: ConfigDict) -> None:
    """Checks ranges and names that no single part of the package owns.

    Raises:
      InputError: the first field at fault.
    """
    for field, limits in LIMITS.items():
        value = lookup(config, field)
        if not limits.holds(value):
            raise InputError(field, value, f"must be in {limits}", f"use e.g. {limits.example:g}")
    for field, known in CHOICES.items():
        if lookup(config, field) not in known:
            raise unknown_name(field, lookup(config, field), list(known))
    check_expert_parameters(config.model)
    check_epsilon("client", config.client.optimizer, config.client)
    read_profiles(config.devices)
    if config.model.num_experts % config.mesh.experts:
        raise InputError(
            "mesh.experts",
            config.mesh.experts,
            f"does not divide model.num_experts={config.model.num_experts}",
            f"use one of {divisors(config.model.num_experts)}",
        )
    if config.fl.clients_per_round > config.fl.clients:
        raise InputError(
            "fl.clients_per_round",
            config.fl.clients_per_round,
            f"above fl.clients={config.fl.clients}",
            "sample at most all clients",
        )
    if not config.data.validation_fraction > 0:
        raise InputError(
            "data.validation_fraction",
            config.data.validation_fraction,
            "no validation split, which chooses the best round",
            "use e.g. 0.1",
        )
    check_task(config)
    build = algorithms[config.fl.algorithm](config)
    if isinstance(build, Method):
        refuse_spread_experts(build, config.fl.algorithm, config.mesh.experts)
        check_epsilon("server", *build.server)
    estimates[config.importance.estimate]
    if config.client.optimizer not in optimizers:
        raise unknown_name("client.optimizer", config.client.optimizer, list(optimizers))


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


def check_expert_parameters(model: ConfigDict) -> None:
    """Raises InputError for more parameters than any machine holds."""
    count = 2 * model.num_layers * model.num_experts * model.width * model.hidden
    if count > MOST_EXPERT_PARAMETERS:
        raise InputError(
            "model.num_experts",
            model.num_experts,
            f"with {model.num_layers} layers, width {model.width} and hidden size {model.hidden} the experts "
            f"have {count:.3g} parameters, above {MOST_EXPERT_PARAMETERS:.0e}",
            "use fewer or smaller experts",
        )


def check_epsilon(field: str, optimizer: str, section: ConfigDict) -> None:
    """Raises InputError for an optimizer that would divide 0 by 0 where a gradient is 0."""
    if optimizer in DIVIDING_BY_EPSILON and not section.epsilon > 0:
        problem = f"must be above 0 for {optimizer}"
        raise InputError(f"{field}.epsilon", section.epsilon, problem, "use e.g. 1e-8")


def divisors(number: int) -> list[int]:
    """Returns all of them, ascending.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [part for part in range(1, number + 1) if number % part == 0]
