"""One client's part of a round: score, select, train, report. A pure function of arrays.

Axes: S local steps, B batch, T tokens, L MoE layers, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload
from hfedmoe_jax.devices import NO_SCORING, ScoringPasses
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import (
    ExpertControls,
    MoeModel,
    Params,
    Routing,
    load_balancing_loss,
    open_controls,
    own_choice,
)
from hfedmoe_jax.optimizers import PerExpertOptimizer
from hfedmoe_jax.scores import (
    Evidence,
    expert_contribution,
    gradients_read,
    routing_importance,
    score_rules,
    union,
    usage,
    usage_over_batches,
)
from hfedmoe_jax.selection import select

OK, DROPPED_OUT, OVER_BUDGET, NONFINITE = range(4)
STATUS_NAMES = ("ok", "dropped_out", "over_budget", "nonfinite")

SCORE_DECAY = 0.5  # weight of the past in the running score of `importance.refresh=previous`


class ClientData(NamedTuple):
    """One client's input to a round (a cohort stacks them on a leading axis).

    Attributes:
      client: its number.
      tokens, labels: one batch a local step.
      num_examples: |D_c|.
      budget: experts it can train, over all layers.
      available: False for a client that drops out of the round.
    """

    client: Int[Array, ""]
    tokens: Int[Array, "steps batch tokens"]
    labels: Int[Array, "steps batch"]
    num_examples: Float[Array, ""]
    budget: Int[Array, ""]
    available: Bool[Array, ""]


class ClientReport(NamedTuple):
    """What a client measured, means over its steps unless said otherwise.

    Attributes:
      status: OK, DROPPED_OUT, OVER_BUDGET or NONFINITE (an index into STATUS_NAMES).
      loss: cross-entropy in nats.
      accuracy: share of training examples predicted right.
      union_size: experts that the batch's tokens were routed to.
      max_union_size: the largest of these.
      trained_size: experts that were trained.
      assignments, trained_assignments: token-expert pairs computed a step over all layers, and those
        whose expert was trained.
      dropped: share of assignments that found no room.
      router_entropy: mean entropy of the gates in nats.
    """

    status: Int[Array, ""]
    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    union_size: Float[Array, ""]
    max_union_size: Float[Array, ""]
    trained_size: Float[Array, ""]
    assignments: Float[Array, ""]
    trained_assignments: Float[Array, ""]
    dropped: Float[Array, ""]
    router_entropy: Float[Array, ""]


class ClientUpdate(NamedTuple):
    """A client's parameters after local training, with what it tells the server."""

    params: Params
    upload: Upload
    report: ClientReport


class LocalRule(NamedTuple):
    """How a client treats its experts.

    Attributes:
      score: a name in `score_rules`, or None: all experts are trained.
      fail_over_budget: the client fails if a batch activates more experts than it can train.
      proximal_mu: weight of FedProx's mu / 2 |w - w_global|^2, 0 for none.
    """

    score: str | None
    fail_over_budget: bool
    proximal_mu: float


def batch_loss(
    model: MoeModel, balance: float
) -> Callable[[Params, ExpertControls, Array, Array], tuple[Array, Any]]:
    """Returns `(params, controls, tokens, labels) -> (loss, (cross_entropy, logits, routing))`."""

    def loss(params, controls, tokens, labels):
        logits, routing = model.apply(params, tokens, controls, training=True)
        cross_entropy = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        token_mask = model.token_mask(tokens)
        own = own_choice(routing.gates, token_mask, model.top_k)
        total = cross_entropy + balance * load_balancing_loss(routing.gates, own, token_mask)
        return total, (cross_entropy, logits, routing)

    return loss


def probe(
    model: MoeModel, params: Params, tokens: Array, labels: Array, key: Array
) -> tuple[Evidence, Bool[Array, "layers experts"]]:
    """Returns the evidence of a batch with every expert open, and the batch's union of experts."""
    everything = open_controls(model.num_layers, model.num_experts)
    loss = batch_loss(model, 0.0)
    token_mask = model.token_mask(tokens)
    _, routing = model.apply(params, tokens, everything, training=True)

    def loss_of_multiplier(multiplier):
        return loss(params, everything._replace(multiplier=multiplier), tokens, labels)[0]

    def gradient_norm():
        gradient = jax.grad(lambda p: loss(p, everything, tokens, labels)[0])(params).experts
        squares = [jnp.sum(g**2, axis=tuple(range(2, g.ndim))) for g in jax.tree.leaves(gradient)]
        return jnp.sqrt(sum(squares))

    evidence = Evidence(
        gates=routing.gates,
        chosen=routing.chosen,
        token_mask=token_mask,
        key=key,
        contribution=lambda: expert_contribution(loss_of_multiplier, everything.multiplier),
        gradient_norm=gradient_norm,
    )
    return evidence, union(routing.chosen)


def make_client(
    model: MoeModel, optimizer: PerExpertOptimizer, rule: LocalRule, config: ConfigDict
) -> Callable[[Params, ClientData, Array], ClientUpdate]:
    """Returns `train(params, client, key) -> ClientUpdate`.

    Each step selects experts for its batch (15) and trains those, the routers and the shared
    parameters. `importance.refresh=step` scores the batch itself with a pass of its own;
    `previous` scores the round's first batch so and then keeps a running score from what the
    training passes compute anyway.

    Our decisions: with `previous` the contributions are gradients of the training loss, load
    balancing included, and E_union is that of the round's batches so far, because a batch's own is
    known only after its forward pass; usage (16) is over the tokens of the round's batches, not of
    all of D_c, which would be a pass of its own.

    Args:
      config: reads model.load_balance, importance.*, fl.forward.

    Raises:
      InputError: the score reads what the config's `importance.refresh` cannot give it.
    """
    importance = config.importance
    loss = batch_loss(model, config.model.load_balance)
    everything = open_controls(model.num_layers, model.num_experts)
    score = score_rules[rule.score] if rule.score is not None else None
    score_each_step = score is not None and importance.refresh == "step"
    reads = gradients_read(score, importance, model.num_layers, model.num_experts) if score else set()
    reads_contribution = "contribution" in reads
    if "gradient_norm" in reads and not score_each_step:
        raise InputError(
            "importance.refresh",
            importance.refresh,
            "the training pass has no gradient of experts that it does not train",
            f"use importance.refresh=step with the score {rule.score}",
        )

    def objective(params, multiplier, controls, start, tokens, labels):
        total, parts = loss(params, controls._replace(multiplier=multiplier), tokens, labels)
        if rule.proximal_mu:
            total += 0.5 * rule.proximal_mu * optax.tree.norm(optax.tree.sub(params, start), squared=True)
        return total, parts

    def train(start: Params, client: ClientData, key: Array) -> ClientUpdate:
        def step(carry, batch):
            params, optimizer_state, running_score, eligible = carry
            tokens, labels, step_key = batch
            token_mask = model.token_mask(tokens)
            if score_each_step:
                evidence, eligible = probe(model, params, tokens, labels, step_key)
                running_score = score(evidence, importance)
            active = everything.backward if score is None else select(running_score, eligible, client.budget)
            forward = active if config.fl.forward == "active" else everything.forward
            controls = ExpertControls(forward, active, everything.multiplier)
            (_, (cross_entropy, logits, routing)), (gradient, multiplier_gradient) = jax.value_and_grad(
                objective, argnums=(0, 1), has_aux=True
            )(params, everything.multiplier, controls, start, tokens, labels)
            own = own_choice(routing.gates, token_mask, model.top_k)
            trained = active & union(routing.chosen)
            params, optimizer_state = optimizer.update(gradient, optimizer_state, params, trained)
            if score is not None and not score_each_step:
                seen = Evidence(routing.gates, own, token_mask, step_key, lambda: -multiplier_gradient, None)
                fresh = SCORE_DECAY * running_score + (1 - SCORE_DECAY) * score(seen, importance)
                # No token reached a closed expert, so its contribution was not measured.
                measured_now = forward | (not reads_contribution)
                running_score = jnp.where(measured_now, fresh, running_score)
                eligible = eligible | union(own)
            measured = measure(cross_entropy, logits, labels, routing, own, trained, token_mask)
            told = (
                usage(routing.gates, own, token_mask),
                routing_importance(routing.gates, token_mask, importance.lam),
                jnp.sum(token_mask, dtype=jnp.float32),
            )
            return (params, optimizer_state, running_score, eligible), (measured, told, trained)

        num_steps = client.tokens.shape[0]
        first_key, *keys = jax.random.split(key, num_steps + 1)
        keys = jnp.stack(keys)
        running_score = jnp.zeros((model.num_layers, model.num_experts), jnp.float32)
        eligible = everything.backward
        if score is not None and not score_each_step:
            first, eligible = probe(model, start, client.tokens[0], client.labels[0], first_key)
            running_score = score(first, importance)
        carry = (start, optimizer.init(start), running_score, eligible)
        batches = (client.tokens, client.labels, keys)
        (params, *_), (measured, told, trained) = jax.lax.scan(step, carry, batches)
        usages, importances, num_tokens = told
        upload = Upload(
            usage=usage_over_batches(usages, num_tokens),
            importance=jnp.mean(importances, axis=0),
            trained=jnp.any(trained, axis=0),
            num_examples=client.num_examples,
        )
        max_union_size = jnp.max(measured["union_size"])
        over_budget = rule.fail_over_budget & (max_union_size > client.budget)
        finite = jnp.isfinite(jnp.sum(measured["loss"])) & all_finite(params)
        status = jnp.select(
            [~client.available, ~finite, over_budget], [DROPPED_OUT, NONFINITE, OVER_BUDGET], OK
        )
        means = {name: jnp.mean(values, axis=0) for name, values in measured.items()}
        report = ClientReport(status=status, max_union_size=max_union_size, **means)
        return ClientUpdate(params, upload, report)

    return train


def scoring_passes(rule: LocalRule, model: MoeModel, steps: int, importance: ConfigDict) -> ScoringPasses:
    """Returns what scoring adds to a client's round.

    A pass runs forward; contributions add the product for the inputs, gradient norms of experts those
    for the inputs and for the experts' weights.
    """
    if rule.score is None:
        return NO_SCORING
    count = steps if importance.refresh == "step" else 1
    reads = gradients_read(score_rules[rule.score], importance, model.num_layers, model.num_experts)
    return ScoringPasses(
        count, shared=2 if reads else 1, experts=1 + bool(reads) + ("gradient_norm" in reads)
    )


def measure(
    cross_entropy: Float[Array, ""],
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    routing: Routing,
    own: Bool[Array, "layers tokens experts"],
    trained: Bool[Array, "layers experts"],
    token_mask: Bool[Array, " tokens"],
) -> dict[str, Float[Array, ""]]:
    """Returns one step's part of the `ClientReport`, by field.

    Args:
      routing: of the training pass.
      own: the tokens' own experts, whatever the controls.
      trained: experts that this step trained.
    """
    return dict(
        loss=cross_entropy,
        accuracy=jnp.mean(jnp.argmax(logits, axis=-1) == labels),
        union_size=jnp.sum(union(own), dtype=jnp.float32),
        trained_size=jnp.sum(trained, dtype=jnp.float32),
        assignments=jnp.sum(routing.kept, dtype=jnp.float32),
        trained_assignments=jnp.sum(routing.kept & trained[:, None, :], dtype=jnp.float32),
        dropped=1 - jnp.sum(routing.kept) / jnp.maximum(jnp.sum(routing.chosen), 1),
        router_entropy=gate_entropy(routing.gates, token_mask),
    )


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Says whether no number of a tree is NaN or infinite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def gate_entropy(
    gates: Float[Array, "layers tokens experts"], token_mask: Bool[Array, " tokens"]
) -> Float[Array, ""]:
    """Returns the entropy of the gates in nats, mean over real tokens and layers."""
    entropy = -jnp.sum(jax.scipy.special.xlogy(gates, gates), axis=-1)
    real = jnp.sum(token_mask)
    return jnp.sum(jnp.where(token_mask, entropy, 0.0)) / jnp.maximum(real, 1) / gates.shape[0]
