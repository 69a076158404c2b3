"""A client's round by the plain road: every expert computed, masks over all of them, `jax.grad`.

What a budgeted round has to equal, written from the docstrings of `client` and `scoring` as a loop over
steps in which nothing is saved.

Axes: S steps, L layers, N tokens, E experts.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from dense_switch import Controls, dense_switch
from tiny import tiny_config, tiny_frozen

from hfedmoe_jax.models import Params, load_balancing_loss
from hfedmoe_jax.optimizers import build_optimizer, per_expert
from hfedmoe_jax.scores import (
    information_bottleneck_score,
    masked_mean,
    redundancy,
    routing_importance,
    units_of,
)
from hfedmoe_jax.selection import select


class Look(NamedTuple):
    """A pass over one batch: loss and its cross-entropy, routing, gradients.

    Attributes:
      gates, own: [L, N, E].
      sent, kept: int [L, E], tokens sent to each expert, and those it had room for.
      gradient: of all parameters.
      by_multiplier: [L, E].
    """

    loss: jax.Array
    cross_entropy: jax.Array
    gates: jax.Array
    own: jax.Array
    sent: jax.Array
    kept: jax.Array
    gradient: Params
    by_multiplier: jax.Array


@functools.cache
def make_look(**fields):
    """Returns `look(params, frozen, batch, forward, backward, anchor, mu) -> Look`, compiled once.

    Args:
      fields: of `tiny_config`.
    """
    config = tiny_config(**fields).model

    def objective(params, multiplier, frozen, batch, forward, backward, anchor, mu):
        controls = Controls(forward, backward, multiplier)
        logits, layers = dense_switch(
            params, frozen, batch["tokens"], controls, config, config.capacity_factor
        )
        mask = batch["tokens"].reshape(-1) != 0
        cross_entropy = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]))
        balance = jnp.mean(load_balancing_loss(layers.gates, layers.own, mask))
        loss = cross_entropy + config.load_balance * balance
        away = optax.tree.norm(optax.tree.sub(params, anchor), squared=True)
        return loss + mu / 2 * away, (loss, cross_entropy, *layers[1:])

    @jax.jit
    def look(params, frozen, batch, forward, backward, anchor, mu):
        multiplier = jnp.ones((config.num_layers, config.num_experts))
        (_, told), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(
            params, multiplier, frozen, batch, forward, backward, anchor, mu
        )
        return Look(*told, *gradients)

    return look


@functools.cache
def make_update(optimizer: str, **client_fields):
    """Returns `init` and a compiled `update` of an optimizer for each expert."""
    config = tiny_config(**client_fields)
    both = per_expert(build_optimizer(config.client, optimizer, "client"))
    return jax.jit(both.init), jax.jit(both.update)


class Round(NamedTuple):
    """What a round comes to.

    Attributes:
      params: after it.
      trained: bool [S, L, E].
      cross_entropy: [S].
      gates, own: [S, L, N, E], of the training passes.
    """

    params: Params
    trained: np.ndarray
    cross_entropy: np.ndarray
    gates: np.ndarray
    own: np.ndarray


def score_of(name: str, config, seen: Look, units, contribution) -> np.ndarray:
    """Returns what a score function makes of a pass."""
    if name == "frequency":
        return np.asarray(masked_mean(units.chosen, units.mask))
    if name == "gradient_norm":
        squares = [
            np.sum(np.asarray(g, np.float64) ** 2, (-1, -2)) for g in jax.tree.leaves(seen.gradient.experts)
        ]
        return np.sqrt(sum(squares)).astype(np.float32)
    information = contribution
    if config.importance.estimate == "routing":
        information = routing_importance(units.gates, units.mask, config.importance.lam)
    kl = redundancy(units.gates, units.mask)
    return np.asarray(information_bottleneck_score(information, kl, config.importance.beta))


def local_round(
    start: Params, batches: dict, budget: int, score: str | None, mu: float = 0.0, **fields: Any
) -> Round:
    """Trains one client on batches [S, B, ...]; the rest as for `make_client` and `tiny_config`."""
    config = tiny_config(**fields)
    model_fields = {name: value for name, value in fields.items() if name.startswith("model__")}
    client_fields = {name: value for name, value in fields.items() if name.startswith("client__")}
    look, frozen = make_look(**model_fields), tiny_frozen(**model_fields)
    init, update = make_update(config.client.optimizer, **client_fields)
    refresh, active = config.importance.refresh, config.fl.forward == "active" and score is not None
    reads_contribution = score == "information_bottleneck" and config.importance.estimate == "gradient"
    shape = jax.tree.leaves(start.experts)[0].shape[:2]
    everything, nothing = np.ones(shape, bool), np.zeros(shape, bool)
    params, state = start, init(start)
    known = past = eligible = None

    def looked(step, forward, backward):
        batch = jax.tree.map(lambda x: x[step], batches)
        seen = look(params, frozen, batch, forward, backward, start, mu)
        return seen, units_of(seen.gates, seen.own, batch["tokens"] != 0, config.importance.unit)

    def scored(seen, units, contribution):
        return score_of(score, config, seen, units, contribution)

    def asked(seen):
        return np.asarray(seen.own).any(axis=1)

    if active:
        seen, units = looked(0, nothing, nothing)
        past = np.asarray(routing_importance(units.gates, units.mask, config.importance.lam))
        known, eligible = scored(seen, units, past), asked(seen)
    rounds = []
    for step in range(len(batches["tokens"])):
        selected = everything
        if score and not active:
            seen, units = looked(step, everything, everything)
            stand_in = np.asarray(routing_importance(units.gates, units.mask, config.importance.lam))
            if step == 0 or refresh == "step":
                known = scored(seen, units, stand_in if step == 0 else past)
            if step == 0 or refresh != "round":
                eligible = asked(seen)
        if score:
            selected = np.asarray(select(known, eligible, budget))
        ran = selected if active else everything
        seen, units = looked(step, ran, selected)
        trained = selected & (np.asarray(seen.kept) > 0)
        params, state = update(seen.gradient, state, params, trained)
        rounds.append((trained, np.asarray(seen.cross_entropy), np.asarray(seen.gates), np.asarray(seen.own)))
        if not score:
            continue
        contribution = -np.asarray(seen.by_multiplier)
        before = contribution if past is None else past
        past = np.where(ran, (before + contribution) / 2, before)
        if refresh == "previous":
            fresh = (known + scored(seen, units, contribution)) / 2
            known = np.where(ran, fresh, known) if reads_contribution else fresh
            if active:
                eligible = eligible | asked(seen)
    return Round(params, *map(np.stack, zip(*rounds, strict=True)))


def whole(update, start: Params) -> Params:
    """Returns a client's parameters with its rows of experts and of the embedding table in their places."""

    count = int(update.trained.count)
    owners, rows = (np.asarray(x)[:count].tolist() for x in (update.trained.expert, update.trained.row))

    def experts(given, held):
        given, held = np.array(given), np.asarray(held)
        given.reshape(-1, *given.shape[2:])[owners] = held[rows]
        return given

    shared = jax.tree.map(np.asarray, dict(update.params.shared))
    if update.token is not None:
        table = np.array(start.shared["embed"])
        for row, token in zip(shared["embed"], np.asarray(update.token).tolist(), strict=True):
            if token < len(table):
                table[token] = row
        shared["embed"] = table
    router = jax.tree.map(np.asarray, update.params.router)
    return Params(jax.tree.map(experts, start.experts, update.params.experts), router, shared)


def bits(tree: Any) -> list[bytes]:
    """Returns the bytes of every array of a tree."""
    return [np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_near(one: Any, other: Any, share: float = 1e-5) -> None:
    """Fails unless no two numbers differ by more than a share of the largest of their array (or of 0.01)."""
    scale = jax.tree.map(lambda x: max(float(np.max(np.abs(x))), 0.01), other)
    one, other = (
        jax.tree.map(lambda x, s: np.asarray(x, np.float64) / s, tree, scale) for tree in (one, other)
    )
    chex.assert_trees_all_close(one, other, rtol=0, atol=share)
