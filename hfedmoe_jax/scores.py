"""How much an expert matters to a batch: equations (3)-(5) and (10)-(16) of arXiv 2601.00583.

Pure functions of arrays. Axes: L MoE layers, N tokens, E experts. `gates` is the softmax of
the router over all experts; means and maxima run over the real tokens of a batch.
A score is an array [L, E], larger is better; `score_rules` maps names to score functions.
"""

from collections.abc import Callable
from functools import cached_property

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import Registry

Gates = Float[Array, "*layers tokens experts"]
TokenMask = Bool[Array, " tokens"]
PerExpert = Float[Array, "*layers experts"]


def mean_over_tokens(values: Gates, token_mask: TokenMask) -> PerExpert:
    """Returns the mean over real tokens, zero for a batch without any."""
    real = token_mask[:, None]
    return jnp.sum(jnp.where(real, values, 0.0), axis=-2) / jnp.maximum(jnp.sum(token_mask), 1)


def cumulative(gates: Gates, token_mask: TokenMask) -> PerExpert:
    """Returns s_cumul(e) = mean_i G_e(x_i), what the batch needs overall (3)."""
    return mean_over_tokens(gates, token_mask)


def specific(gates: Gates, token_mask: TokenMask) -> PerExpert:
    """Returns s_specific(e) = max_i G_e(x_i), rare but decisive for some token (4)."""
    return jnp.max(jnp.where(token_mask[:, None], gates, 0.0), axis=-2)


def routing_importance(gates: Gates, token_mask: TokenMask, lam: float) -> PerExpert:
    """Returns s_b(e) = lam * s_cumul(e) + (1 - lam) * s_specific(e) (5)."""
    return lam * cumulative(gates, token_mask) + (1 - lam) * specific(gates, token_mask)


def redundancy(gates: Gates, token_mask: TokenMask) -> PerExpert:
    """Returns KL_b(e) = mean_i G_e(x_i) log(G_e(x_i) / mean_j G_e(x_j)), in nats (10)-(11).

    An upper bound of I(z_e; x); zero when the gate does not depend on the token. Computed as the
    mean of G log(G / p) - G + p, whose last two terms cancel: every summand is then positive, and
    nearly uniform gates lose no digits.
    """
    prior = cumulative(gates, token_mask)[..., None, :]
    safe_prior = jnp.where(prior > 0, prior, 1.0)
    excess = gates - prior
    near = jnp.abs(excess) < 0.5 * prior
    log_ratio = jnp.where(
        near,
        jnp.log1p(jnp.where(near, excess, 0.0) / safe_prior),
        jnp.log(jnp.where(gates > 0, gates, 1.0) / safe_prior),
    )
    return mean_over_tokens(gates * log_ratio - excess, token_mask)


def share_of_total(values: PerExpert) -> PerExpert:
    """Divides by the sum of magnitudes over all experts, so that unlike estimates share one scale."""
    total = jnp.sum(jnp.abs(values))
    return values / jnp.where(total > 0, total, 1.0)


def information_bottleneck_score(task_information: PerExpert, kl: PerExpert, beta: float) -> PerExpert:
    """Returns I_b(e) = task information of e - beta * KL_b(e) (13)-(14).

    Both terms are brought to shares of their totals first (our decision: the routing
    estimate and the gradient estimate of the task information have unlike units).
    """
    return share_of_total(task_information) - beta * share_of_total(kl)


def usage(gates: Gates, chosen: Bool[Array, "*layers tokens experts"], token_mask: TokenMask) -> PerExpert:
    """Returns u(e) = mean_i G_e(x_i) over tokens, counted where e is among the token's experts (16)."""
    return mean_over_tokens(jnp.where(chosen, gates, 0.0), token_mask)


def usage_over_batches(usages: Float[Array, "batches layers experts"], num_tokens: Float[Array, " batches"]):
    """Returns u(e) of all batches together from that of each and its number of real tokens."""
    return jnp.einsum("b,ble->le", num_tokens, usages) / jnp.maximum(jnp.sum(num_tokens), 1)


def union(chosen: Bool[Array, "*layers tokens experts"]) -> Bool[Array, "*layers experts"]:
    """Returns E_union, the experts that any token of the batch was sent to."""
    return jnp.any(chosen, axis=-2)


class Evidence:
    """What a score function may look at: one batch under one client's parameters.

    Every item is computed on first access only, so a score pays for what it asks.

    Attributes:
      gates: float32 [L, N, E].
      chosen: bool [L, N, E], the tokens' own top-k experts.
      token_mask: bool [N].
      key: a PRNG key of this client, round and step.
      contribution: float32 [L, E]; see `expert_contribution`.
      gradient_norm: float32 [L, E]; L2 norm of the loss gradient of each expert's weights.
    """

    def __init__(self, gates, chosen, token_mask, key, contribution: Callable, gradient_norm: Callable):
        self.gates, self.chosen, self.token_mask, self.key = gates, chosen, token_mask, key
        self._contribution, self._gradient_norm = contribution, gradient_norm

    @cached_property
    def contribution(self) -> PerExpert:
        return self._contribution()

    @cached_property
    def gradient_norm(self) -> PerExpert:
        return self._gradient_norm()


def expert_contribution(loss: Callable[[PerExpert], jax.Array], multiplier: PerExpert) -> PerExpert:
    """Returns -d loss / d z at the given multipliers, the log-likelihood lost without each expert.

    First order of log q(y|z) - log q(y|z with z_e = 0), our estimate of the task information
    in (8), (9), (12).

    Args:
      loss: negative log-likelihood of the batch as a function of the multipliers [L, E].
      multiplier: where to take the gradient, ones.
    """
    return -jax.grad(loss)(multiplier)


def gradients_read(score: Callable, importance: ConfigDict, num_layers: int, num_experts: int) -> set[str]:
    """Returns which gradients of its evidence a score reads, by calling it once on a stand-in.

    Returns:
      A subset of {"contribution", "gradient_norm"}.

    Raises:
      InputError: the score is not one number an expert.
    """
    read = set()

    def stand_in(name: str) -> Callable:
        def compute():
            read.add(name)
            return jnp.zeros((num_layers, num_experts))

        return compute

    def call():
        gates = jnp.full((num_layers, 2, num_experts), 1 / num_experts)
        names = ("contribution", "gradient_norm")
        everything = jnp.ones(2, bool)
        return score(
            Evidence(gates, gates > 0, everything, jax.random.key(0), *map(stand_in, names)), importance
        )

    shape = jax.eval_shape(call).shape
    if shape != (num_layers, num_experts):
        raise InputError(
            "fl.score",
            score.__name__,
            f"returns an array of shape {shape}",
            f"return one number an expert, shape {(num_layers, num_experts)}",
        )
    return read


score_rules = Registry("fl.score")
"""Score functions `(evidence: Evidence, importance: ConfigDict) -> float [L, E]`."""


@score_rules.register("information_bottleneck")
def information_bottleneck(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """HFedMoE: task information by `importance.estimate` less `importance.beta` times redundancy (14)."""
    task_information = estimates[importance.estimate](evidence, importance)
    kl = redundancy(evidence.gates, evidence.token_mask)
    return information_bottleneck_score(task_information, kl, importance.beta)


@score_rules.register("frequency")
def frequency(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """Share of tokens sent to the expert: the common rule without gates or redundancy."""
    return mean_over_tokens(evidence.chosen.astype(jnp.float32), evidence.token_mask)


@score_rules.register("gradient_norm")
def gradient_norm(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """L2 norm of the loss gradient of the expert's weights."""
    return evidence.gradient_norm


@score_rules.register("random")
def random(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """Uniform numbers, drawn anew each time that scores are asked for (see `refresh`)."""
    num_layers, _, num_experts = evidence.gates.shape
    return jax.random.uniform(evidence.key, (num_layers, num_experts))


estimates = Registry("importance.estimate")
"""Estimates of an expert's task information, same signature as a score."""


@estimates.register("routing")
def routing_estimate(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """The paper's surrogate: s_b(e) of (5)."""
    return routing_importance(evidence.gates, evidence.token_mask, importance.lam)


@estimates.register("gradient")
def gradient_estimate(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """The bound itself to first order, from the gradients of the experts' multipliers."""
    return evidence.contribution
