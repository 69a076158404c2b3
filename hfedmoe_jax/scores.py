"""How much an expert matters to a batch: equations (3)-(5) and (10)-(16) of arXiv 2601.00583.

Pure functions of arrays. Axes: L MoE layers, B samples of T tokens, N = B * T tokens, U units, E experts.
A unit is an x_i of the equations: a sample, as in the paper, or a token (`importance.unit`). The gate of a
sample is the mean over its real tokens (our decision: the paper does not say how tokens make a sample's
gate). `units_of` reduces a batch to its units; the equations know nothing of tokens. `gates` is the softmax
of the router over all experts. A score is an array [L, E], larger is better; `score_rules` maps names to
score functions.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import Registry

STAND_IN = (2, 3)
"""L and E of the arrays that a user's function is tried on."""

ByUnit = Float[AnyArray, "*layers units experts"]
UnitMask = Bool[AnyArray, "... units"]
"""Of all layers alike, or of each."""
PerExpert = Float[AnyArray, "*layers experts"]


def masked_mean(
    values: Float[AnyArray, "*leading rows experts"], mask: Bool[AnyArray, "*trailing rows"]
) -> Float[AnyArray, "*leading experts"]:
    """Returns the mean over the rows where the mask is True, zero where there is none.

    Args:
      mask: its leading axes, if any, are the last of the values' leading axes.
    """
    total = jnp.sum(jnp.where(mask[..., None], values, 0.0), axis=-2)
    return total / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)


def over_units(
    values: Float[AnyArray, "*layers tokens experts"],
    token_mask: Bool[AnyArray, "... batch length"],
    unit: str,
) -> ByUnit:
    """Returns the values of each unit: a token's own, or the mean over a sample's real tokens.

    Args:
      values: of the tokens, sample after sample.
      token_mask: real tokens.
      unit: "sample" or "token".
    """
    if unit == "token":
        return values
    *layers, _, experts = values.shape
    return masked_mean(values.reshape(*layers, *token_mask.shape[-2:], experts), token_mask)


class Units(NamedTuple):
    """How the units of a batch are routed; values at units outside the mask mean nothing.

    Attributes:
      gates: float32 [L, U, E], G_e(x_i).
      chosen: float32 [L, U, E], share of the unit's real tokens that are sent to the expert.
      chosen_gates: float32 [L, U, E], G_e(x_i) counted where e is among a token's chosen experts.
      mask: bool [U] or [L, U], units with a real token.
    """

    gates: ByUnit
    chosen: ByUnit
    chosen_gates: ByUnit
    mask: UnitMask


def units_of(
    gates: Float[AnyArray, "*layers tokens experts"],
    chosen: Bool[AnyArray, "*layers tokens experts"],
    token_mask: Bool[AnyArray, "... batch length"],
    unit: str,
) -> Units:
    """Returns the units of a batch.

    Args:
      gates, chosen: of the tokens, sample after sample; `chosen` is their own top-k experts.
      token_mask: real tokens, of all layers alike or of each.
      unit: "sample" (U = B) or "token" (U = N).
    """
    by_token = (gates, chosen.astype(jnp.float32), jnp.where(chosen, gates, 0.0))
    mask = flat_mask(token_mask) if unit == "token" else jnp.any(token_mask, axis=-1)
    return Units(*(over_units(values, token_mask, unit) for values in by_token), mask=mask)


def flat_mask(token_mask: Bool[AnyArray, "... batch length"]) -> Bool[AnyArray, "... tokens"]:
    """Returns the mask of a batch's tokens, sample after sample."""
    return token_mask.reshape(*token_mask.shape[:-2], -1)


def cumulative(gates: ByUnit, unit_mask: UnitMask) -> PerExpert:
    """Returns s_cumul(e) = mean_i G_e(x_i), what the batch needs overall (3)."""
    return masked_mean(gates, unit_mask)


def specific(gates: ByUnit, unit_mask: UnitMask) -> PerExpert:
    """Returns s_specific(e) = max_i G_e(x_i), rare but decisive for some unit (4)."""
    return jnp.max(jnp.where(unit_mask[..., None], gates, 0.0), axis=-2)


def routing_importance(gates: ByUnit, unit_mask: UnitMask, lam: float) -> PerExpert:
    """Returns s_b(e) = lam * s_cumul(e) + (1 - lam) * s_specific(e) (5)."""
    return lam * cumulative(gates, unit_mask) + (1 - lam) * specific(gates, unit_mask)


def redundancy(gates: ByUnit, unit_mask: UnitMask) -> PerExpert:
    """Returns KL_b(e) = mean_i G_e(x_i) log(G_e(x_i) / mean_j G_e(x_j)), in nats (10)-(11).

    An upper bound of I(z_e; x); zero when the gate does not depend on the unit. Computed as the
    mean of G log(G / p) - G + p, whose last two terms cancel: every summand is then positive, and
    nearly uniform gates lose no digits.
    """
    prior = cumulative(gates, unit_mask)[..., None, :]
    safe_prior = jnp.where(prior > 0, prior, 1.0)
    excess = gates - prior
    near = jnp.abs(excess) < 0.5 * prior
    log_ratio = jnp.where(
        near,
        jnp.log1p(jnp.where(near, excess, 0.0) / safe_prior),
        jnp.log(jnp.where(gates > 0, gates, 1.0) / safe_prior),
    )
    return masked_mean(gates * log_ratio - excess, unit_mask)


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


def usage(chosen_gates: ByUnit, unit_mask: UnitMask) -> PerExpert:
    """Returns u(e) = mean_i G_e(x_i), counted where e is among the tokens' chosen experts (16)."""
    return masked_mean(chosen_gates, unit_mask)


def usage_over_batches(
    usages: Float[AnyArray, "batches layers experts"], num_units: Float[AnyArray, "batches ..."]
) -> PerExpert:
    """Returns u(e) of all batches together from that of each and its number of units, by layer or of all."""
    weight = num_units.reshape(len(num_units), -1, 1)
    return jnp.sum(weight * usages, axis=0) / jnp.maximum(jnp.sum(weight, axis=0), 1)


def union(chosen: Bool[AnyArray, "*layers tokens experts"]) -> Bool[AnyArray, "*layers experts"]:
    """Returns E_union, the experts that any token of the batch was sent to."""
    return jnp.any(chosen, axis=-2)


class Evidence:
    """What a score function may look at: one batch under one client's parameters.

    Every item is computed on first access only, so a score pays for what it asks.

    Attributes:
      gates: float32 [L, U, E]; of a sample the mean over its real tokens.
      chosen: float32 [L, U, E], share of the unit's real tokens sent to each expert; of a token 0 or 1.
      mask: bool [U] or [L, U], units with a real token; values at the others mean nothing.
      key: a PRNG key of this client, round and step.
      contribution: float32 [L, E], -d loss / d z at z = 1: what the log-likelihood loses without the expert
        to first order, our estimate of the task information in (8), (9), (12).
      gradient_norm: float32 [L, E]; L2 norm of the loss gradient of each expert's weights.
    """

    def __init__(
        self, gates, chosen, mask, key, contribution: Callable | None, gradient_norm: Callable | None
    ):
        self.gates, self.chosen, self.mask, self.key = gates, chosen, mask, key
        self._contribution, self._gradient_norm = contribution, gradient_norm

    @cached_property
    def contribution(self) -> PerExpert:
        """Computes it on first access."""
        assert self._contribution is not None
        return self._contribution()

    @cached_property
    def gradient_norm(self) -> PerExpert:
        assert self._gradient_norm is not None  # `Scoring` refuses scores that read what it cannot give
        return self._gradient_norm()


def gradients_read(score: Callable, importance: ConfigDict) -> set[str]:
    """Returns which gradients of its evidence a score reads, by calling it once on arrays of `STAND_IN`.

    Returns:
      A subset of {"contribution", "gradient_norm"}.

    Raises:
      InputError: the score is not one number an expert.
    """
    read, (num_layers, num_experts) = set(), STAND_IN

    def stand_in(name: str) -> Callable:
        def compute():
            read.add(name)
            return jnp.zeros((num_layers, num_experts))

        return compute

    def call():
        gates = jnp.full((num_layers, 2, num_experts), 1 / num_experts)
        names = ("contribution", "gradient_norm")
        chosen, mask = jnp.ones_like(gates), jnp.ones(2, bool)
        return score(Evidence(gates, chosen, mask, jax.random.key(0), *map(stand_in, names)), importance)

    shape = getattr(jax.eval_shape(call), "shape", None)
    if shape != (num_layers, num_experts):
        raise InputError(
            "fl.score",
            score.__name__,
            "returns no array" if shape is None else f"returns an array of shape {shape}",
            "return one number an expert, [L, E]",
        )
    return read


score_rules = Registry("fl.score")
"""Score functions `(evidence: Evidence, importance: ConfigDict) -> float [L, E]`."""


@score_rules.register("information_bottleneck")
def information_bottleneck(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """HFedMoE: task information by `importance.estimate` less `importance.beta` times redundancy (14)."""
    task_information = estimates[importance.estimate](evidence, importance)
    kl = redundancy(evidence.gates, evidence.mask)
    return information_bottleneck_score(task_information, kl, importance.beta)


@score_rules.register("frequency")
def frequency(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """Share of its tokens that a unit sends to the expert, mean over units: no gates, no redundancy."""
    return masked_mean(evidence.chosen, evidence.mask)


@score_rules.register("gradient_norm")
def gradient_norm(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """L2 norm of the loss gradient of the expert's weights."""
    return evidence.gradient_norm


@score_rules.register("random")
def random(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """Uniform numbers, drawn anew each time that scores are asked for (see `scoring`)."""
    num_layers, _, num_experts = evidence.gates.shape
    return jax.random.uniform(evidence.key, (num_layers, num_experts))


estimates = Registry("importance.estimate")
"""Estimates of an expert's task information, same signature as a score."""


@estimates.register("routing")
def routing_estimate(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """The paper's surrogate: s_b(e) of (5)."""
    return routing_importance(evidence.gates, evidence.mask, importance.lam)


@estimates.register("gradient")
def gradient_estimate(evidence: Evidence, importance: ConfigDict) -> PerExpert:
    """The bound itself to first order, from the gradients of the experts' multipliers."""
    return evidence.contribution
