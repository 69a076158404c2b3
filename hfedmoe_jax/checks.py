"""Refuses a config that cannot run, before any data is read."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload, expert_rules, gating_rules
from hfedmoe_jax.aggregation.sums import MOST_MEMBERS
from hfedmoe_jax.algorithms import Method, algorithms, parts_of
from hfedmoe_jax.algorithms.method import refuse_spread_experts
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import families
from hfedmoe_jax.optimizers import optimizers
from hfedmoe_jax.registry import Registry, unknown_name
from hfedmoe_jax.schedule import MOST_CHUNK
from hfedmoe_jax.scores import estimates
from hfedmoe_jax.tasks import tasks

AT_LEAST_ONE = (
    "fl.clients",
    "fl.clients_per_round",
    "fl.rounds",
    "fl.local_steps",
    "fl.batch_size",
    "eval.every",
    "eval.batch_size",
    "checkpoint.every",
    "checkpoint.keep",
)
NOT_NEGATIVE = (
    "seed",
    "fl.chunk",
    "budget.tiers",
    "eval.max_examples",
    "importance.beta",
    "aggregation.tau",
    "model.load_balance",
    "client.proximal_mu",
)
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
    for field in AT_LEAST_ONE:
        if lookup(config, field) < 1:
            raise InputError(field, lookup(config, field), "must be at least 1", "give a positive number")
    for field in NOT_NEGATIVE:
        if not lookup(config, field) >= 0:
            raise InputError(field, lookup(config, field), "must not be negative", "give 0 or more")
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
    if config.mesh.experts < 1 or config.model.num_experts % config.mesh.experts:
        raise InputError(
            "mesh.experts",
            config.mesh.experts,
            f"does not divide model.num_experts={config.model.num_experts}",
            f"use one of {divisors(config.model.num_experts)}",
        )
    if not 0 <= config.importance.lam <= 1:
        raise InputError("importance.lam", config.importance.lam, "must be in [0, 1]", "use e.g. 0.5")
    probability = config.fl.dropout_probability
    if not 0 <= probability < 1:
        raise InputError("fl.dropout_probability", probability, "must be in [0, 1)", "use e.g. 0.1")
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
    families[config.model.family]
    tasks[config.task.name]
    build = algorithms[config.fl.algorithm](config)
    if isinstance(build, Method):
        refuse_spread_experts(build, config.fl.algorithm, config.mesh.experts)
    parts = parts_of(config)
    estimates[config.importance.estimate]
    check_weights("fl.expert_rule", parts.expert_rule, expert_rules, config, by_row=False)
    check_weights("fl.gating_rule", parts.gating_rule, gating_rules, config, by_row=True)
    if config.client.optimizer not in optimizers:
        raise unknown_name("client.optimizer", config.client.optimizer, list(optimizers))


def needs_budgets(config: ConfigDict) -> bool:
    """Says whether budgets matter: clients select by them, or fail by them."""
    if config.fl.algorithm == "local":
        return config.fl.score not in ("", "none")
    parts = parts_of(config)
    return parts.score != "none" or parts.fail_over_budget


def divisors(number: int) -> list[int]:
    """Returns all of them, ascending.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [part for part in range(1, number + 1) if number % part == 0]


def check_weights(field: str, name: str, rules: Registry, config: ConfigDict, by_row: bool) -> None:
    """Checks that a rule of aggregation returns as many weights as it should.

    Raises:
      InputError: the name is unknown, or the rule returns an array of another shape.

    Args:
      by_row: it may return one number for all, or one for each expert's row.
    """
    rule, experts = rules[name], (config.model.num_layers, config.model.num_experts)
    of_expert, truth = (jax.ShapeDtypeStruct(experts, dtype) for dtype in (jnp.float32, bool))
    times, size = jax.ShapeDtypeStruct(experts, jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    upload = Upload(of_expert, of_expert, truth, times, size)
    shape = jnp.shape(jax.eval_shape(lambda upload: rule(upload, config.aggregation), upload))
    if shape != experts and not (by_row and shape == ()):
        remedy = f"return one number an expert, shape {experts}" + (", or one in all" if by_row else "")
        raise InputError(field, name, f"returns an array of shape {shape}", remedy)
