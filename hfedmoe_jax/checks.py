"""Refuses a config that cannot run, before any data is read."""

from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import expert_rules, gating_rules
from hfedmoe_jax.algorithms import compose
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.optimizers import optimizers
from hfedmoe_jax.population import MOST_CHUNK
from hfedmoe_jax.refresh import build_scoring
from hfedmoe_jax.registry import unknown_name
from hfedmoe_jax.scores import estimates
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
CHOICES = {"fl.forward": ("routed", "active"), "importance.refresh": ("step", "previous", "round")}


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
            "use a divisor, e.g. 1",
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
    expert_rules[parts.expert_rule], gating_rules[parts.gating_rule]
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
