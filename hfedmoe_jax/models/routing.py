"""Who goes where: softmax gates, top-k choice and the controls of a client over its experts.

Axes: B batch, T tokens, N = B * T tokens of a batch, L MoE layers, E experts, K chosen experts of a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class ExpertControls(NamedTuple):
    """What a client lets each expert do in one pass.

    Attributes:
      forward: bool [L, E]; tokens may be sent to the expert. Tokens whose experts are
        all closed go to their best open expert of that layer.
      backward: bool [L, E]; gradient flows through the expert. A closed expert is a
        constant of the backward pass: neither its weights nor its input receive gradient.
      multiplier: float [L, E]; z of HFedMoE (14), multiplies the expert's output. Its gradient
        at one is the expert's contribution.
    """

    forward: Bool[Array, "*layers experts"]
    backward: Bool[Array, "*layers experts"]
    multiplier: Float[Array, "*layers experts"]


class Routing(NamedTuple):
    """What the routers of a model did with one batch.

    Attributes:
      gates: float32 [L, N, E]; softmax of the router over all experts, G(x) of (1),
        whatever the controls.
      chosen: bool [L, N, E]; the experts that each real token was sent to.
      kept: bool [L, N, E]; those of `chosen` that had room for the token.
    """

    gates: Float[Array, "*layers tokens experts"]
    chosen: Bool[Array, "*layers tokens experts"]
    kept: Bool[Array, "*layers tokens experts"]


class Assignment(NamedTuple):
    """The experts of each token: indices and weights, both [N, K]; weight zero means none."""

    expert: Int[Array, "tokens k"]
    weight: Float[Array, "tokens k"]


def open_controls(num_layers: int, num_experts: int) -> ExpertControls:
    """Returns the controls of an unconstrained client: every expert forward and backward."""
    everything = jnp.ones((num_layers, num_experts), bool)
    return ExpertControls(everything, everything, jnp.ones((num_layers, num_experts), jnp.float32))


def assign(
    logits: Float[Array, "tokens experts"],
    forward: Bool[Array, " experts"],
    token_mask: Bool[Array, " tokens"],
    top_k: int,
) -> tuple[Float[Array, "tokens experts"], Assignment]:
    """Returns the gates over all experts and each token's top-k among the open ones.

    With every expert open these are equations (1)-(2). Otherwise the softmax is taken over
    the open experts: a token keeps its own experts where they are open, goes to its best
    open one where not, and its weights are renormalised (`forward=active`). A layer
    without an open expert gives weight zero: the residual connection alone passes.

    Args:
      logits: router outputs [N, E].
      forward: open experts [E].
      token_mask: real (not padding) tokens [N].
      top_k: experts a token.
    """
    gates = jax.nn.softmax(logits.astype(jnp.float32))
    closed = jnp.float32(-1e30)  # finite, so that a layer without an open expert has no NaN gradient
    open_gates = jax.nn.softmax(jnp.where(forward, logits.astype(jnp.float32), closed))
    weight, expert = jax.lax.top_k(jnp.where(forward, open_gates, 0.0), top_k)
    served = token_mask[:, None] & forward[expert]
    return gates, Assignment(expert, jnp.where(served, weight, 0.0))


def own_choice(
    gates: Float[Array, "*layers tokens experts"], token_mask: Bool[Array, " tokens"], top_k: int
) -> Bool[Array, "*layers tokens experts"]:
    """Returns the top-k experts of each real token when every expert is open."""
    _, expert = jax.lax.top_k(gates, top_k)
    chosen = jnp.any(jax.nn.one_hot(expert, gates.shape[-1], dtype=bool), axis=-2)
    return chosen & token_mask[:, None]


def load_balancing_loss(
    gates: Float[Array, "*layers tokens experts"],
    chosen: Bool[Array, "*layers tokens experts"],
    token_mask: Bool[Array, " tokens"],
) -> Float[Array, ""]:
    """Returns E * sum_e f_e P_e, averaged over layers; 1 when every expert is used alike.

    f_e is the share of assignments that went to expert e, P_e its mean gate, both over real tokens.
    Source: Switch Transformer, arXiv 2101.03961, (4)-(6).
    """
    real = token_mask[:, None]
    num_experts = gates.shape[-1]
    sent = jnp.sum(chosen & real, axis=-2, dtype=jnp.float32)
    fraction = sent / jnp.maximum(jnp.sum(sent, axis=-1, keepdims=True), 1.0)
    mean_gate = jnp.sum(gates * real, axis=-2) / jnp.maximum(jnp.sum(token_mask), 1)
    return jnp.mean(num_experts * jnp.sum(fraction * mean_gate, axis=-1))
