"""Routing of tokens to experts: softmax gates and each token's top-k.

Axes: N tokens of a batch, L MoE layers, E experts, K chosen experts of a token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.experts import Expert, Experts, LayerBudget, mix_experts
from hfedmoe_jax.slots import expert_capacity


class Routing(NamedTuple):
    """What the routers did with a batch.

    Attributes:
      gates: float32 [L, N, E], softmax over all experts, G(x) of (1), whatever the budget.
      own: bool, same shape; the real tokens' own top-k experts, whatever may run.
      sent, kept: int32 [L, E]; tokens that each expert was sent, and had room for.
      slots: int32 [L], slots of all experts that ran.
      balance: float32 [L], load-balancing losses; alike where a family has one for all layers.
    """

    gates: Float[Array, "*layers tokens experts"]
    own: Bool[Array, "*layers tokens experts"]
    sent: Int[Array, "*layers experts"]
    kept: Int[Array, "*layers experts"]
    slots: Int[Array, "*layers"]
    balance: Float[Array, "*layers"]


class RouterRule(NamedTuple):
    """How a router chooses a token's experts, and weighs them.

    Attributes:
      top_k: experts of a token.
      renormalise: whether their weights are divided by their sum.
      scale: factor of the weights after that.
      groups, top_groups: the experts are cut into so many groups, and chosen from those whose best gates are
        largest (arXiv 2405.04434).
      text_slots: tokens of a text that an expert serves at most; 0: as many as there are.
      balance: the load-balancing loss: of each "layer" (Switch Transformer), of each "text" in a layer
        (DeepSeek with `seq_aux`), or of the "model" (Mixtral, OLMoE, Qwen-MoE, as transformers has it); see
        `load_balancing_loss` and `model_balance`.
    """

    top_k: int
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    text_slots: int = 0
    balance: str = "layer"


class Assignment(NamedTuple):
    """The experts of each token: indices and weights, both [N, K]; weight zero means none."""

    expert: Int[Array, "tokens k"]
    weight: Float[Array, "tokens k"]


def assign(
    logits: Float[Array, "tokens experts"],
    layer: LayerBudget,
    token_mask: Bool[Array, " tokens"],
    rule: RouterRule,
) -> tuple[Float[Array, "tokens experts"], Assignment]:
    """Returns the gates over all experts, and each token's top-k among those that may run.

    With every expert these are equations (1)-(2). Otherwise the softmax is taken over the experts of
    `layer.forward`: a token keeps its own experts where they run, goes to its best other one where not, and
    its weights are renormalised (`fl.forward=active`). A layer in which none runs gives weight zero: the
    residual connection alone passes.

    Args:
      logits: router outputs [N, E].
      layer: of the budget; its bias is added to the logits.
      token_mask: real (not padding) tokens [N].
      rule: of the family.
    """
    logits = logits.astype(jnp.float32)
    if layer.bias is not None:
        logits = logits + layer.bias
    gates = jax.nn.softmax(logits)
    forward = jnp.ones(logits.shape[1], bool) if layer.forward is None else layer.forward
    closed = jnp.float32(-1e30)  # finite, so that a layer in which no expert runs has no NaN gradient
    open_gates = jax.nn.softmax(jnp.where(forward, logits, closed))
    weight, expert = jax.lax.top_k(limit_groups(jnp.where(forward, open_gates, 0.0), rule), rule.top_k)
    if rule.renormalise:
        weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-30)
    weight = weight * rule.scale if rule.scale != 1 else weight
    served = token_mask[:, None] & forward[expert]
    return gates, Assignment(expert, jnp.where(served, weight, 0.0))


def limit_groups(
    gates: Float[AnyArray, "*layers tokens experts"], rule: RouterRule
) -> Float[AnyArray, "*layers tokens experts"]:
    """Returns the gates, 0 outside of each token's best groups."""
    if rule.groups == rule.top_groups:
        return gates
    best = jnp.max(gates.reshape(*gates.shape[:-1], rule.groups, -1), axis=-1)
    _, group = jax.lax.top_k(best, rule.top_groups)
    open_group = jnp.any(jax.nn.one_hot(group, rule.groups, dtype=bool), axis=-2)
    return jnp.where(jnp.repeat(open_group, gates.shape[-1] // rule.groups, axis=-1), gates, 0.0)


def own_choice(
    gates: Float[AnyArray, "*layers tokens experts"], token_mask: Bool[AnyArray, " tokens"], rule: RouterRule
) -> Bool[Array, "*layers tokens experts"]:
    """Returns the experts of each real token when every expert runs."""
    _, expert = jax.lax.top_k(limit_groups(gates, rule), rule.top_k)
    chosen = jnp.any(jax.nn.one_hot(expert, gates.shape[-1], dtype=bool), axis=-2)
    return chosen & token_mask[:, None]


def route(
    logits: Float[Array, "tokens experts"],
    h_nd: Float[Array, "tokens model"],
    token_mask: Bool[Array, " tokens"],
    rule: RouterRule,
    capacity_factor: float,
    expert: Expert,
    experts: Experts,
    layer: LayerBudget,
    tape: Any,
    text_len: int = 0,
) -> tuple[Float[Array, "tokens model"], Any, Float[Array, " local_experts"], Routing]:
    """Returns a layer's mixture of experts, the tape, the permit, and what its router did.

    Args:
      logits: of the router.
      h_nd: what the experts read.
      capacity_factor: slots of an expert over an even share of the tokens.
      expert, experts, layer, tape: see `hfedmoe_jax.experts`.
      text_len: tokens of a text, padding included, for rules with `text_slots` or a balance by text.
    """
    gates, (index, wanted) = assign(logits, layer, token_mask, rule)
    weight = wanted
    if rule.text_slots:
        room = within_texts(index, wanted > 0, logits.shape[-1], rule.text_slots, text_len)
        weight = jnp.where(room, wanted, 0.0)
    capacity = expert_capacity(h_nd.shape[0], logits.shape[-1], rule.top_k, capacity_factor)
    y_nd, tape, served = mix_experts(expert, capacity, experts, layer, tape, h_nd, index, weight)
    own = own_choice(gates, token_mask, rule)
    by_text = text_len if rule.balance == "text" else 0
    balance = load_balancing_loss(gates, own, token_mask, by_text)
    sent = served.sent
    if rule.text_slots:
        refused = jax.nn.one_hot(index, logits.shape[-1], dtype=jnp.int32) * (wanted > weight)[..., None]
        sent = sent + jnp.sum(refused, axis=(0, 1))
    return y_nd, tape, served.permit, Routing(gates, own, sent, served.kept, served.slots, balance)


def within_texts(
    index: Int[Array, "tokens k"],
    wanted: Bool[Array, "tokens k"],
    num_experts: int,
    text_slots: int,
    text_len: int,
) -> Bool[Array, "tokens k"]:
    """Says which assignments are among the first `text_slots` of their text with their expert.

    Args:
      index: expert of each assignment; tokens lie text after text.
      wanted: False for an assignment that counts for nothing.
      text_len: tokens of a text.
    """
    queue = jax.nn.one_hot(index, num_experts, dtype=jnp.int32) * wanted[..., None]
    queue = queue.reshape(-1, text_len * index.shape[1], num_experts)
    position = jnp.sum((jnp.cumsum(queue, axis=1) - queue) * queue, axis=-1)
    return position.reshape(index.shape) < text_slots


def load_balancing_loss(
    gates: Float[AnyArray, "*layers tokens experts"],
    chosen: Bool[AnyArray, "*layers tokens experts"],
    token_mask: Bool[AnyArray, " tokens"],
    text_len: int = 0,
) -> Float[Array, "*layers"]:
    """Returns E * sum_e f_e P_e of each layer; 1 when every expert is used alike.

    f_e is the share of assignments that went to expert e, P_e its mean gate, both over real tokens.
    Sources: Switch Transformer, arXiv 2101.03961, (4)-(6); by text DeepSeekMoE, arXiv 2401.06066, (12)-(14).

    Args:
      text_len: if it is not 0, the mean over texts of so many tokens, those without a real one left out.
    """
    if text_len:
        texts = (-1, text_len)
        mask = token_mask.reshape(texts)
        gates, chosen = (x.reshape(*x.shape[:-2], *texts, x.shape[-1]) for x in (gates, chosen))
        real = jnp.any(mask, axis=-1)
        each = jax.vmap(load_balancing_loss, (-3, -3, 0), -1)(gates, chosen, mask)
        return jnp.sum(each * real, axis=-1) / jnp.maximum(jnp.sum(real), 1)
    real = token_mask[:, None]
    num_experts = gates.shape[-1]
    sent = jnp.sum(chosen & real, axis=-2, dtype=jnp.float32)
    fraction = sent / jnp.maximum(jnp.sum(sent, axis=-1, keepdims=True), 1.0)
    mean_gate = jnp.sum(gates * real, axis=-2) / jnp.maximum(jnp.sum(token_mask), 1)
    return num_experts * jnp.sum(fraction * mean_gate, axis=-1)


def model_balance(
    gates: Float[AnyArray, "layers tokens experts"],
    chosen: Bool[AnyArray, "layers tokens experts"],
    token_mask: Bool[AnyArray, " tokens"],
) -> Float[Array, " layers"]:
    """Returns E * sum_e f_e P_e over the tokens of all layers together, for each layer; K in perfect balance.

    f_e is the mean number of assignments of a token to expert e. transformers has this loss for Mixtral (and
    takes the softmax of gates once more in some versions, which is a fault, its issue 45120).
    """
    real = token_mask[:, None]
    count = jnp.maximum(gates.shape[0] * jnp.sum(token_mask), 1)
    sent, mean_gate = (jnp.sum(x * real, axis=(0, 1)) / count for x in (chosen, gates))
    return jnp.broadcast_to(gates.shape[-1] * jnp.sum(sent * mean_gate), gates.shape[:1])
