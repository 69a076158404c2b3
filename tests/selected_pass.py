"""A pass of a model under a selection of experts, made of the package's layer and one `jax.vjp`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfedmoe_jax.experts import flat, gradient_rules, open_budget, row_of
from hfedmoe_jax.mesh import ALONE, Place, local_experts
from hfedmoe_jax.models import MoeModel, Params, Routing
from hfedmoe_jax.tasks import Task


class Pass(NamedTuple):
    """What a pass comes to.

    Attributes:
      loss, task_loss: with the load-balancing loss, and without.
      gradient: of all parameters, zero for experts that were not selected.
      by_multiplier: [L, E].
      routing: of all layers.
    """

    loss: jax.Array
    task_loss: jax.Array
    gradient: Params
    by_multiplier: jax.Array
    routing: Routing


def make_pass(
    model: MoeModel, task: Task, balance: float, active: bool, tier: int, keep: bool, place: Place = ALONE
):
    """Returns `step(params, frozen, batch, selected) -> Pass`.

    Args:
      balance: weight of the load-balancing loss.
      active: experts that are not selected do not run.
      tier: rows of the tape, at least the selected experts.
      keep: see `Rules`.
    """

    def step(params: Params, frozen: dict, batch: Any, selected) -> Pass:
        own = local_experts(selected, place)
        rank = jnp.cumsum(own.reshape(-1)).reshape(own.shape) - 1
        budget = open_budget(params.experts, model.num_experts, place)
        rules = gradient_rules(tier if active else own.size, keep, place)
        budget = budget._replace(experts=budget.experts.replace(rules=rules))
        layers = budget.layers._replace(forward=selected if active else None)
        zeros = jax.tree.map(lambda w: jnp.zeros((tier, *w.shape[1:])), flat(params.experts))

        def objective(params, multiplier, tape):
            given = budget._replace(layers=layers._replace(multiplier=multiplier), tape=tape)
            out = model.apply(params, frozen, batch, given, True)
            loss, _ = task.loss(out.output, batch)
            return (loss + balance * jnp.mean(out.routing.balance), out.tape, out.permit), (loss, out.routing)

        rest = params._replace(experts=None)
        (loss, *_), pull, (task_loss, routing) = jax.vjp(
            objective, rest, layers.multiplier, zeros, has_aux=True
        )
        gradient, by_multiplier, rows = pull((jnp.float32(1), zeros, jnp.where(own, rank, -1.0)))
        mine = row_of(rows, jnp.clip(rank, 0))
        mine = jax.tree.map(lambda g: jnp.where(own.reshape(own.shape + (1,) * (g.ndim - 2)), g, 0), mine)
        return Pass(loss, task_loss, gradient._replace(experts=mine), by_multiplier, routing)

    return step
