"""The built-in algorithms: one composition of the same parts, chosen by name.

Score, selection, local training, weights of experts and of gating networks, server optimizer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload, expert_rules, gating_rules
from hfedmoe_jax.algorithms.algorithm import algorithms
from hfedmoe_jax.algorithms.method import Method
from hfedmoe_jax.algorithms.parts import Weights
from hfedmoe_jax.client import LocalRule
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.optimizers import optimizers
from hfedmoe_jax.registry import Registry, unknown_name
from hfedmoe_jax.scores import STAND_IN
from hfedmoe_jax.scoring import build_scoring


class Composition(NamedTuple):
    """An algorithm by its parts; the config may replace each part by name (see `parts_of`).

    Attributes:
      score: how experts are ranked for selection, a name in `score_rules`; "none" trains all.
      expert_rule: weight of a client's experts, a name in `expert_rules`.
      gating_rule: weight of a client's gating networks, a name in `gating_rules`.
      server_optimizer: a name in `optimizers`.
      fail_over_budget: clients that activate more experts than their budget fail.
      proximal: add FedProx's term to the local loss.
    """

    score: str = "none"
    expert_rule: str = "all"
    gating_rule: str = "mean"
    server_optimizer: str = "sgd"
    fail_over_budget: bool = False
    proximal: bool = False


_SPARSE = Composition(score="information_bottleneck", expert_rule="dominant", gating_rule="importance")
COMPOSITIONS = {
    "hfedmoe": _SPARSE,
    "random": _SPARSE._replace(score="random"),
    "frequency": _SPARSE._replace(score="frequency"),
    "gradient_norm": _SPARSE._replace(score="gradient_norm"),
    "fedavg": Composition(),
    "fedavg_dropout": Composition(fail_over_budget=True),
    "fedprox": Composition(proximal=True),
    "fedavgm": Composition(server_optimizer="sgdm"),
    "fedadam": Composition(server_optimizer="adam"),
    "fedyogi": Composition(server_optimizer="yogi"),
}
"""By name, for `fl.algorithm` and, under an algorithm that is more than a composition, for `fl.base`."""

SERVER_LEARNING_RATES = {"sgd": 1.0, "sgdm": 1.0, "adam": 0.01, "yogi": 0.01}
"""A rate of 1 replaces the model by the mean; adaptive steps of 1 a parameter would diverge."""


def parts_of(config: ConfigDict) -> Composition:
    """Returns the parts of `fl.algorithm`, or of `fl.base` if that is more than a composition.

    `fl.score`, `fl.expert_rule`, `fl.gating_rule` and `server.optimizer` replace a part unless empty:
    ablations and new parts need no new algorithm.

    Raises:
      InputError: `fl.base` is no composition.
    """
    name = config.fl.algorithm if config.fl.algorithm in COMPOSITIONS else config.fl.base
    if name not in COMPOSITIONS:
        if name in algorithms:
            raise InputError(
                "fl.base", name, "is no composition whose updates can be transformed and summed",
                f"use one of {', '.join(COMPOSITIONS)}",
            )  # fmt: skip
        raise unknown_name("fl.base", name, list(COMPOSITIONS))
    chosen = dict(
        score=config.fl.score,
        expert_rule=config.fl.expert_rule,
        gating_rule=config.fl.gating_rule,
        server_optimizer=config.server.optimizer,
    )
    return COMPOSITIONS[name]._replace(**{part: name for part, name in chosen.items() if name})


def server_section(section: ConfigDict, optimizer: str) -> ConfigDict:
    """Returns the section `server`, with the rate of the optimizer itself where it gives 0."""
    rate = section.learning_rate or SERVER_LEARNING_RATES.get(optimizer, 1.0)
    return ConfigDict({**section, "learning_rate": rate})


def compose(config: ConfigDict) -> Method:
    """Returns the method of a config's parts (see `parts_of`)."""
    parts = parts_of(config)
    if config.aggregation.literal_gating and parts.gating_rule != "importance":
        raise InputError(
            "aggregation.literal_gating",
            True,
            f"equation (21) weighs by importance, and the gating rule is {parts.gating_rule!r}",
            "use it with fl.algorithm=hfedmoe or fl.gating_rule=importance",
        )
    if parts.server_optimizer not in optimizers:
        raise unknown_name("server.optimizer", parts.server_optimizer, list(optimizers))
    check_weights("fl.expert_rule", parts.expert_rule, expert_rules, config.aggregation, by_row=False)
    check_weights("fl.gating_rule", parts.gating_rule, gating_rules, config.aggregation, by_row=True)
    return Method(
        rule=LocalRule(
            score=build_scoring(config, parts.score),
            fail_over_budget=parts.fail_over_budget,
            proximal_mu=config.client.proximal_mu if parts.proximal else 0.0,
        ),
        weights=Weights(expert_rules[parts.expert_rule], gating_rules[parts.gating_rule]),
        server=(parts.server_optimizer, server_section(config.server, parts.server_optimizer)),
        literal_gating=config.aggregation.literal_gating,
        summary=lambda rounds, population: {"parts": parts._asdict()},
    )


def check_weights(field: str, name: str, rules: Registry, aggregation: ConfigDict, by_row: bool) -> None:
    """Checks that a rule of aggregation returns as many weights as it should.

    Raises:
      InputError: the name is unknown, or the rule returns an array of another shape.

    Args:
      by_row: it may return one number for all, or one for each expert's row.
    """
    rule, experts = rules[name], STAND_IN
    of_expert, truth = (jax.ShapeDtypeStruct(experts, dtype) for dtype in (jnp.float32, bool))
    times, size = jax.ShapeDtypeStruct(experts, jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    upload = Upload(of_expert, of_expert, truth, times, size)
    shape = getattr(jax.eval_shape(lambda upload: rule(upload, aggregation), upload), "shape", None)
    if shape != experts and not (by_row and shape == ()):
        remedy = "return one number an expert, [L, E]" + (", or one in all" if by_row else "")
        problem = "returns no array" if shape is None else f"returns an array of shape {shape}"
        raise InputError(field, name, problem, remedy)


def refuse_literal_gating(config: ConfigDict) -> None:
    """Raises InputError for an algorithm that changes updates, which (21) as printed does not sum."""
    if config.aggregation.literal_gating:
        raise InputError(
            "aggregation.literal_gating", True,
            f"equation (21) as printed sums whole routers, and {config.fl.algorithm} sums changed updates",
            "use false",
        )  # fmt: skip


for _name in COMPOSITIONS:
    algorithms.register(_name)(compose)
