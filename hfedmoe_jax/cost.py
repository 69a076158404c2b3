"""What a model costs a device, read off its shapes and its traced program: no formula of any family.

Axes: B batch, T tokens, L layers, E experts, D model.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hfedmoe_jax.experts import Budget, computed_from, open_budget, row_of
from hfedmoe_jax.models import MoeModel, Params, tree_bytes
from hfedmoe_jax.tasks import Task


class ModelCost(NamedTuple):
    """What a model costs at one batch shape, with the optimizer that trains it.

    Attributes:
      all_experts: L * E.
      shared_parameter_bytes: everything trainable but the experts (routers included); it travels.
      frozen_bytes: what nobody trains; it does not travel.
      shared_training_bytes: parameters, gradients, optimizer state and activations of the trainable shared
        part.
      activation_bytes: the last of these, which grow with the batch.
      expert_parameter_bytes: one expert.
      expert_training_bytes: one expert's gradients, optimizer state and activations, without
        its parameters.
      shared_flop: forward FLOP of everything but the experts, one batch.
      assignment_flop: forward FLOP of one expert on one token.
    """

    all_experts: int
    shared_parameter_bytes: int
    frozen_bytes: int
    shared_training_bytes: int
    activation_bytes: int
    expert_parameter_bytes: int
    expert_training_bytes: int
    shared_flop: float
    assignment_flop: float


def model_cost(
    model: MoeModel, task: Task, config: ConfigDict, optimizer: optax.GradientTransformation, batch: Any
) -> ModelCost:
    """Returns the cost of training a model on batches of one shape.

    Parameters, gradients and optimizer state are counted from their shapes. Activations are what the backward
    pass of the traced program reads of the forward pass, experts that run apart. FLOP are those of matrix
    products.

    Args:
      config: the section `model`; `remat` is read.
      optimizer: of each expert, and of the rest together.
      batch: shapes.
    """
    params, frozen = jax.eval_shape(model.init, jax.random.key(0))
    rest = Params(None, params.router, params.shared)
    trained, expert = (
        jax.eval_shape(lambda tree: row_of(row_of(tree, 0), 0), tree)
        for tree in (params.experts, jax.eval_shape(model.weights, params.experts, frozen))
    )
    shared, one = tree_bytes(rest), tree_bytes(trained)
    state = tree_bytes(jax.eval_shape(optimizer.init, rest))
    expert_state = tree_bytes(jax.eval_shape(optimizer.init, trained))

    def loss(rest, frozen, experts, batch, keep: bool):
        budget = open_budget(experts, model.num_experts)
        rules = budget.experts.rules._replace(keep=keep)
        # All of them, as a selection: loops over experts then have a length that only the data know.
        every = jnp.ones((model.num_layers, model.num_experts), bool)
        budget = Budget(
            dataclasses.replace(budget.experts, rules=rules), budget.layers._replace(forward=every)
        )
        out = model.apply(rest, frozen, batch, budget, True)
        return task.loss(out.output, batch)[0] + jnp.mean(out.routing.balance)

    def pullback(rest, *others, keep: bool):
        return jax.vjp(lambda rest: loss(rest, *others, keep=keep), rest)[1]

    arguments = rest, frozen, params.experts, batch
    without = residual_bytes(functools.partial(pullback, keep=False), *arguments)
    kept = 0
    if not config.remat:
        kept = residual_bytes(functools.partial(pullback, keep=True), *arguments) - without
    tokens = jax.ShapeDtypeStruct((1, model.module.width), jnp.float32)
    return ModelCost(
        all_experts=model.all_experts,
        shared_parameter_bytes=shared,
        frozen_bytes=tree_bytes(frozen),
        shared_training_bytes=2 * shared + state + without,
        activation_bytes=without,
        expert_parameter_bytes=one,
        expert_training_bytes=one + expert_state + kept // model.all_experts,
        shared_flop=product_flop(functools.partial(loss, keep=False), *arguments),
        assignment_flop=product_flop(model.expert, expert, tokens),
    )


def residual_bytes(pullback_of: Any, *arguments: Any) -> int:
    """Returns the bytes of a pullback's residuals that are computed from the last argument.

    Args:
      pullback_of: arguments -> a pullback of `jax.vjp`.
      arguments: shapes; the last one is the batch.
    """
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(pullback_of(*args)))(*arguments).jaxpr
    inputs = jaxpr.invars[-len(jax.tree.leaves(arguments[-1])) :]
    residuals = {jaxpr.outvars[i] for i in computed_from(jaxpr, inputs)}
    avals: list[Any] = [v.aval for v in residuals]
    return sum(aval.size * aval.dtype.itemsize for aval in avals)


def product_flop(function: Any, *arguments: Any) -> float:
    """Returns the FLOP of a function's matrix products; loops of unknown length count for nothing.

    Experts run in such loops: their FLOP follow from how many tokens they serve.

    >>> product_flop(lambda x, y: x @ y, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60.0
    """
    return _flop(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flop(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval, equation.outvars[0].aval
            depth = 1
            for axis in contracted:
                depth *= lhs.shape[axis]
            total += 2.0 * out.size * depth
        elif name == "cond":
            total += max(_flop(branch.jaxpr) for branch in equation.params["branches"])
        elif name != "while":
            inner = sum(map(_flop, _inner_jaxprs(equation)))
            total += inner * equation.params.get("length", 1) if name == "scan" else inner
    return total


def _inner_jaxprs(equation: Any) -> list[Any]:
    """Returns the programs that an equation calls, each once."""
    found = [getattr(value, "jaxpr", value) for value in equation.params.values()]
    return [each for each in found if hasattr(each, "eqns")][:1]
