"""What the server makes of the uploads: equations (17)-(20) of arXiv 2601.00583, and (21) as a weighted mean.

Every rule is a weight, so one streaming mean (`running_mean`) serves them all.

Axes: C clients, L MoE layers, E experts.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.registry import Registry


def dominant_set(
    usage: Float[AnyArray, "*layers experts"], trained: Bool[AnyArray, "*layers experts"], tau: float
) -> Bool[AnyArray, "*layers experts"]:
    """Returns S_c = {e : u_c(e) >= tau and e was trained in at least one local step}.

    The second condition is our decision: usage alone does not mean that e received a gradient.
    """
    return (usage >= tau) & trained


def routing_consistency(
    dominant: Bool[AnyArray, "clients layers experts"], took_part: Bool[AnyArray, " clients"]
) -> Float[AnyArray, " clients"]:
    """Returns r(c) = |S_c and S_global| / |S_global|, S_global the union of the S_c (18).

    Args:
      dominant: S_c of each client.
      took_part: clients whose update counts; the others neither widen the union nor get a value (0).
    """
    dominant = dominant & took_part[:, None, None]
    in_union = jnp.any(dominant, axis=0)
    size = jnp.sum(dominant & in_union, axis=(1, 2))
    return size / jnp.maximum(jnp.sum(in_union), 1)


def preference(
    usage: Float[AnyArray, "*layers experts"],
    importance: Float[AnyArray, "*layers experts"],
    dominant: Bool[AnyArray, "*layers experts"],
) -> Float[AnyArray, "*layers experts"]:
    """Returns p_c(e) = u_c(e) * s^c(e) on S_c, zero elsewhere (19)."""
    return jnp.where(dominant, usage * importance, 0.0)


def gating_weight(preference: Float[AnyArray, "layers experts"]) -> Float[AnyArray, ""]:
    """Returns |S_global| * alpha(c) = sum_e p_c(e), over all layers (20).

    |S_global| is known only after the last client; it cancels in the normalised mean, and
    the literal form divides the finished sum by it.
    """
    return jnp.sum(preference)


class Upload(NamedTuple):
    """What a client reports to the server beside its parameters.

    Attributes:
      usage: float32 [L, E], u_c of (16), over the samples of the round's batches.
      importance: float32 [L, E], s^c: the routing importance (5), mean over the client's steps.
      trained: bool [L, E], experts that received a gradient in at least one step.
      times: int32 [L, E], in how many.
      size: float32 [], |D_c| as in `ClientData`, at most one.
    """

    usage: Float[Array, "*layers experts"]
    importance: Float[Array, "*layers experts"]
    trained: Bool[Array, "*layers experts"]
    times: Int[Array, "*layers experts"]
    size: Float[Array, ""]


expert_rules = Registry("fl.expert_rule")
"""Weight of a client's experts, `(upload: Upload, aggregation: ConfigDict) -> float [L, E]`.

In [0, L]: exact sums have room for so much from the largest cohort; in large cohorts greater weights are
cut. A client whose weight is not above zero does not count."""


@expert_rules.register("dominant")
def dominant_experts(upload: Upload, aggregation: ConfigDict) -> Float[AnyArray, "*layers experts"]:
    """Sparsity-aware: |D_c| for the experts of S_c, zero for the rest (17)."""
    dominant = dominant_set(upload.usage, upload.trained, aggregation.tau)
    return jnp.where(dominant, upload.size, 0.0)


@expert_rules.register("all")
def all_experts(upload: Upload, aggregation: ConfigDict) -> Float[AnyArray, "*layers experts"]:
    """FedAvg: |D_c| for every expert, whether the client trained it or not."""
    return jnp.full_like(upload.usage, upload.size)


gating_rules = Registry("fl.gating_rule")
"""Weight of a client's gating networks, `(upload: Upload, aggregation: ConfigDict) -> float []`, or [L, E]:
one for each expert's row of the routers.

In [0, L], as for experts."""


@gating_rules.register("importance")
def importance_gating(upload: Upload, aggregation: ConfigDict) -> Float[AnyArray, ""]:
    """alpha(c) of (20), up to the factor 1 / |S_global|."""
    dominant = dominant_set(upload.usage, upload.trained, aggregation.tau)
    return gating_weight(preference(upload.usage, upload.importance, dominant))


@gating_rules.register("mean")
def mean_gating(upload: Upload, aggregation: ConfigDict) -> Float[AnyArray, ""]:
    """FedAvg: |D_c|."""
    return upload.size
