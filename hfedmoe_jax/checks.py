"""Refuses a config that cannot run, before any data is read."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload, expert_rules, gating_rules
from hfedmoe_jax.algorithms import compose
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.optimizers import optimizers
from hfedmoe_jax.population import MOST_CHUNK
from hfedmoe_jax.registry import Registry, unknown_name
from hfedmoe_jax.scores import estimates
from hfedmoe_jax.scoring import build_scoring
from hfedmoe_jax.sums import MOST_MEMBERS

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
    "importance.unit": ("sample", "token"),
    "importance.refresh": ("step", "previous", "round"),
}


def lookup(config: ConfigDict, field: str):
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
    parts = compose(config)
    if parts.personal and config.mesh.experts > 1:
        raise InputError(
            "mesh.experts",
            config.mesh.experts,
            f"{config.fl.algorithm} keeps a whole model a client on every device",
            "use 1",
        )
    build_scoring(config, parts.score)
    estimates[config.importance.estimate]
    check_weights("fl.expert_rule", parts.expert_rule, expert_rules, config, per_expert=True)
    check_weights("fl.gating_rule", parts.gating_rule, gating_rules, config, per_expert=False)
    for field, name in (("client", config.client.optimizer), ("server", parts.server_optimizer)):
        if name not in optimizers:
            raise unknown_name(f"{field}.optimizer", name, list(optimizers))
    if config.aggregation.literal_gating and parts.gating_rule != "importance":
        raise InputError(
            "aggregation.literal_gating",
            True,
            f"equation (21) weighs by importance, and the gating rule is {parts.gating_rule!r}",
            "use it with fl.algorithm=hfedmoe or fl.gating_rule=importance",
        )


def divisors(number: int) -> list[int]:
    """Returns all of them, ascending.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [part for part in range(1, number + 1) if number % part == 0]


def check_weights(field: str, name: str, rules: Registry, config: ConfigDict, per_expert: bool) -> None:
    """Checks that a rule of aggregation returns as many weights as it should.

    Raises:
      InputError: the name is unknown, or the rule returns an array of another shape.
    """
    rule, experts = rules[name], (config.model.num_layers, config.model.num_experts)
    of_expert = jax.ShapeDtypeStruct(experts, jnp.float32)
    upload = Upload(
        of_expert, of_expert, jax.ShapeDtypeStruct(experts, bool), jax.ShapeDtypeStruct((), jnp.float32)
    )
    wanted = experts if per_expert else ()
    shape = jnp.shape(jax.eval_shape(lambda upload: rule(upload, config.aggregation), upload))
    if shape != wanted:
        remedy = f"return one number{' an expert' if per_expert else ''}, shape {wanted}"
        raise InputError(field, name, f"returns an array of shape {shape}", remedy)
