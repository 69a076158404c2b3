"""optax optimizers that leave an expert alone, state included, when it was not trained.

The server's, for the experts of its round; a client's are rows of its `ExpertBank`.
Axes: L MoE layers, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation.running_mean import widen
from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.models import Params
from hfedmoe_jax.registry import Registry, unknown_name


class PerExpertState(NamedTuple):
    """State of the experts, one optimizer each (leading axes [L, E]), and of everything else."""

    experts: optax.OptState
    rest: optax.OptState


class PerExpertOptimizer(NamedTuple):
    """`init(params) -> state` and `update(gradients, state, params, trained) -> (params, state)`."""

    init: Callable[..., Any]
    update: Callable[..., Any]


def per_expert(optimizer: optax.GradientTransformation) -> PerExpertOptimizer:
    """Gives every expert an optimizer of its own, advanced only in steps that trained it.

    An expert's moments and step count are thus those of its own steps (bias correction
    included), and an expert that was not trained keeps parameters and state bit for bit.
    """

    def init(params: Params) -> PerExpertState:
        return PerExpertState(
            jax.vmap(jax.vmap(optimizer.init))(params.experts), optimizer.init((params.router, params.shared))
        )

    def update(
        gradients: Params, state: PerExpertState, params: Params, trained: Bool[AnyArray, "layers experts"]
    ):
        updates, stepped = jax.vmap(jax.vmap(optimizer.update))(
            gradients.experts, state.experts, params.experts
        )

        def keep_untrained(new, old):
            return jnp.where(widen(trained, new), new, old)

        experts = jax.tree.map(keep_untrained, optax.apply_updates(params.experts, updates), params.experts)
        expert_state = jax.tree.map(keep_untrained, stepped, state.experts)
        rest: Any = (params.router, params.shared)
        updates, rest_state = optimizer.update((gradients.router, gradients.shared), state.rest, rest)
        rest = optax.apply_updates(rest, updates)
        return Params(experts, *rest), PerExpertState(expert_state, rest_state)

    return PerExpertOptimizer(init, update)


optimizers = Registry("optimizer")
"""Optimizers by name: functions of a config section (`client` or `server`)."""


@optimizers.register("sgd")
def sgd(section: ConfigDict) -> optax.GradientTransformation:
    """Plain descent; on the server with rate 1 it replaces the model by the mean (FedAvg)."""
    return optax.sgd(section.learning_rate)


@optimizers.register("sgdm")
def sgdm(section: ConfigDict) -> optax.GradientTransformation:
    """Descent with momentum; on the server FedAvgM (arXiv 1909.06335)."""
    return optax.sgd(section.learning_rate, momentum=section.momentum)


@optimizers.register("adam")
def adam(section: ConfigDict) -> optax.GradientTransformation:
    """Adam; on the server FedAdam (arXiv 2003.00295), there with a large epsilon."""
    return optax.adam(section.learning_rate, section.momentum, section.second_momentum, section.epsilon)


@optimizers.register("yogi")
def yogi(section: ConfigDict) -> optax.GradientTransformation:
    """Yogi; on the server FedYogi (arXiv 2003.00295)."""
    return optax.yogi(section.learning_rate, section.momentum, section.second_momentum, section.epsilon)


def build_optimizer(section: ConfigDict, name: str, field: str) -> optax.GradientTransformation:
    """Returns the optimizer `name` with the rates of `section`.

    Args:
      section: learning_rate, momentum, second_momentum, epsilon.
      name: one of `optimizers`.
      field: the config section's name, for errors.
    """
    if name not in optimizers:
        raise unknown_name(f"{field}.optimizer", name, list(optimizers))
    return optimizers[name](section)
