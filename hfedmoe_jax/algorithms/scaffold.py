"""SCAFFOLD: control variates against the drift of unlike clients (arXiv 1910.06378, option II).

The server keeps c, client i keeps c_i. A client's steps follow g - c_i + c; afterwards, with K steps
from x to y,

    c_i <- c_i - c + (x - y) / (K eta),    c <- c + sum over the cohort of (change of c_i) / C,

so c stays the mean of all c_i. Our extension to experts: only what a client could move changes its c_i, so
an expert has the K of the steps that trained it, and an expert that it did not train or send, or a row of
the embedding table that it does not hold, keeps c_i. Models are averaged with the weights of `fl.base`
(the paper weighs all clients alike).
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation.running_mean import widen
from hfedmoe_jax.algorithms.algorithm import algorithms
from hfedmoe_jax.algorithms.composition import compose, refuse_literal_gating
from hfedmoe_jax.algorithms.method import Method
from hfedmoe_jax.algorithms.parts import Change, Totals, Transformed
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import Params, tree_bytes


@algorithms.register("scaffold")
def scaffold(config: ConfigDict) -> Method:
    """Returns `fl.base` with control variates; they double what travels, both ways."""
    refuse_literal_gating(config)
    if config.client.optimizer != "sgd":
        raise InputError(
            "client.optimizer", config.client.optimizer,
            "SCAFFOLD reads a client's mean gradient off its change, as plain descent allows", "use sgd",
        )  # fmt: skip
    method, rate = compose(config), config.client.learning_rate

    def transform(update: Change) -> Transformed:
        steps = steps_of(update, config.fl.local_steps)
        counts = jax.tree.map(jnp.logical_and, update.moved, update.sent)
        own = jax.tree.map(
            functools.partial(control_variate, rate=rate * update.rate),
            update.state, update.extra, update.change, steps, counts,
        )  # fmt: skip
        return Transformed(update.change, own, optax.tree.sub(own, update.state))

    def step(totals: Totals, control: Params) -> tuple[Params, Params]:
        return totals.change, optax.tree.add_scale(control, 1 / totals.population, totals.summed)

    return method._replace(
        rule=method.rule._replace(offset=optax.tree.sub),
        extra=optax.tree.zeros_like,
        state=optax.tree.zeros_like,
        transform=transform,
        step=step,
        tensor_bytes=lambda tensor: 2 * tree_bytes(tensor),
    )


def steps_of(update: Change, local_steps: int) -> Params:
    """Returns K of every parameter, at least 1: Params of numbers that broadcast against `update.change`."""
    change, times = update.change, jnp.maximum(update.upload.times, 1)
    steps = jax.tree.map(lambda _: jnp.int32(local_steps), change)
    return steps._replace(experts=jax.tree.map(lambda x: widen(times, x), change.experts))


def control_variate(
    own: Array, control: Array, change: Array, steps: Array, counts: Array, rate: Array | float
) -> Array:
    """Returns c_i of a tensor after a round (option II).

    Args:
      own, control: c_i and c before it.
      change: y - x.
      steps: K.
      counts: bool, what the client could move and sent.
      rate: eta.
    """
    return jnp.where(counts, own - control - change / (steps * rate), own)
