"""How good a model is, and how it routes: sums over batches, through the population engine.

Axes: M batches, B batch, T tokens, L MoE layers, E experts.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from hfedmoe_jax.budgeted import predict
from hfedmoe_jax.client import ClientData, gate_entropy
from hfedmoe_jax.models import MoeModel, Params
from hfedmoe_jax.population import (
    EVERYWHERE,
    map_members,
    params_specs,
    place_of,
    plan_blocks,
    stack_members,
)
from hfedmoe_jax.scores import units_of, usage, usage_over_batches


class EvaluationBatches(NamedTuple):
    """Batches to judge a model on; a padding example has weight 0.

    Attributes:
      tokens, labels, weight: examples.
      judge: whose model judges a batch, for algorithms that keep a model a client.
    """

    tokens: Int[Array, "batches batch tokens"]
    labels: Int[Array, "batches batch"]
    weight: Float[Array, "batches batch"]
    judge: Int[Array, " batches"]


class BatchScore(NamedTuple):
    """Sums over the examples of a batch (a leading axis M when stacked).

    Attributes:
      correct, loss: of the examples, by weight; loss in nats.
      count: sum of the weights.
      load: tokens that each expert served, [L, E].
      entropy: of the gates in nats, sum over tokens of the mean over layers.
      tokens: real tokens.
    """

    correct: Float[Array, ""]
    loss: Float[Array, ""]
    count: Float[Array, ""]
    load: Float[Array, "layers experts"]
    entropy: Float[Array, ""]
    tokens: Float[Array, ""]


class Quality(NamedTuple):
    """What `summarize` makes of batch scores: means over examples, tokens; `load` is shares by layer."""

    accuracy: float
    loss: float
    load: np.ndarray
    router_entropy: float


def make_evaluate(
    model: MoeModel, personal: bool, mesh: Mesh, chunk: int, capacity_factor: float
) -> Callable[[Params, EvaluationBatches, np.ndarray | None], BatchScore]:
    """Returns `evaluate(params, batches, hosts=None) -> BatchScore` stacked over batches, on the host.

    Args:
      model: what is judged.
      personal: params have a leading axis C, and `judge` picks one for each batch.
      mesh, chunk: devices to spread the batches over, and how many at once.
      capacity_factor: of the experts.

    `hosts` names the process that has each batch; others pass anything of its shape.
    """
    place = place_of(mesh, chunk)

    def score(params: Params, batch: EvaluationBatches):
        if personal:
            params = jax.tree.map(lambda x: x[batch.judge], params)
        tokens = jnp.where(batch.weight[:, None] > 0, batch.tokens, 0)  # padding asks for no expert
        token_mask = model.real(tokens).reshape(-1)
        num_tokens = jnp.sum(token_mask, dtype=jnp.float32)
        logits, seen = predict(model, params, tokens, capacity_factor, place)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        right = jnp.argmax(logits, axis=-1) == batch.labels
        return (), BatchScore(
            correct=jnp.sum(right * batch.weight),
            loss=jnp.sum(loss * batch.weight),
            count=jnp.sum(batch.weight),
            load=seen.kept.astype(jnp.float32),
            entropy=num_tokens * gate_entropy(seen.gates, token_mask),
            tokens=num_tokens,
        )  # fmt: skip

    run = map_members(score, mesh, chunk, EVERYWHERE if personal else model_specs(model))

    def evaluate(params: Params, batches: EvaluationBatches, hosts: np.ndarray | None = None) -> BatchScore:
        blocks = plan_blocks(np.zeros(len(batches.judge), int), mesh, chunk, hosts)
        return run(params, ((block, stack_members(batches, block.members)) for block in blocks))

    return evaluate


def make_usage(
    model: MoeModel, personal: bool, mesh: Mesh, chunk: int, capacity_factor: float, unit: str
) -> Callable[[Params, Iterable], Float[Array, "members layers experts"]]:
    """Returns `usage_of(params, blocks) -> u_c (16)` of each member under one set of parameters, on the host.

    Taken over the batches of a round by the same unit (`importance.unit`), so that it compares with what
    the clients reported from training on them, before aggregation moved their routers. `blocks` are pairs
    of a `Block` and its `ClientData`.
    """
    place = place_of(mesh, chunk)

    def visit(params: Params, member: ClientData):
        if personal:
            params = jax.tree.map(lambda x: x[member.client], params)

        def of_batch(tokens):
            _, seen = predict(model, params, tokens, capacity_factor, place)
            units = units_of(seen.gates, seen.own, model.real(tokens), unit)
            return usage(units.chosen_gates, units.mask), jnp.sum(units.mask, dtype=jnp.float32)

        usages, num_units = jax.lax.map(of_batch, member.tokens)
        return (), usage_over_batches(usages, num_units)

    return map_members(visit, mesh, chunk, EVERYWHERE if personal else model_specs(model))


def model_specs(model: MoeModel) -> Params:
    """Returns how a model's parameters lie on a mesh."""
    return params_specs(jax.eval_shape(model.init, jax.random.key(0)))


def summarize(scores: BatchScore) -> Quality:
    """Returns means over all examples, summed in float64."""
    total = jax.tree.map(lambda x: np.sum(x, axis=0, dtype=np.float64), scores)
    served = np.maximum(total.load.sum(axis=-1, keepdims=True), 1)
    return Quality(
        accuracy=float(total.correct / total.count),
        loss=float(total.loss / total.count),
        load=total.load / served,
        router_entropy=float(total.entropy / total.tokens),
    )


def client_spread(accuracy: np.ndarray) -> tuple[float, float, float]:
    """Returns mean, standard deviation and the mean of the worst 10% (at least one) of the clients."""
    worst = np.sort(accuracy)[: max(1, int(np.ceil(0.1 * len(accuracy))))]
    return float(np.mean(accuracy)), float(np.std(accuracy)), float(np.mean(worst))
