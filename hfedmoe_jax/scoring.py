"""When a client scores its experts, and on what, from the passes that training runs anyway.

On what: the samples or the tokens of a batch (`importance.unit`), see `scores`. When: `importance.refresh`.

| refresh | the scores that a batch selects by | with `fl.forward` |
|---|---|---|
| step | of the batch itself: its forward pass comes before the selection | routed |
| previous | a running mean over the batches before it | routed, active |
| round | of the round's first batch, kept for all of its batches | routed, active |

Contributions (`Evidence.contribution`) are known only after a backward pass. With `step` a batch
reads a running mean of those of the batches before it. With `previous` a batch is scored after its
backward pass, by its own. The first batch of a round reads the routing importance (5) in their
place (with `previous` it keeps a fading part in the running mean). With `round` there are none.
They are gradients of the training loss, load balancing included, in a pass where experts that are
not selected are constants.

`routed` selects from the batch's own union. `active` selects before the forward pass: from the unions
of the batches so far, and before the first batch from its routers in a pass in which no expert
runs. Only gradient norms of experts cost a forward and a backward pass of their own.

Axes: L layers, B samples of T tokens, N = B * T tokens, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.devices import NO_SCORING, ScoringPasses
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import Routing
from hfedmoe_jax.scores import (
    Evidence,
    PerExpert,
    Units,
    gradients_read,
    routing_importance,
    score_rules,
    union,
    units_of,
)
from hfedmoe_jax.selection import select

SCORE_DECAY = 0.5  # weight of the past in running means


class Importance(NamedTuple):
    """What a client knows of its experts' importance.

    Attributes:
      score: what it selects by.
      contribution: running mean of the contributions, kept for `step` alone.
      eligible: the experts that may be selected, E_union.
    """

    score: Float[Array, "layers experts"]
    contribution: Float[Array, "layers experts"]
    eligible: Bool[Array, "layers experts"]


class SeenBatch(NamedTuple):
    """What scoring reads of a batch beside gradients.

    Attributes:
      seen: its routing.
      token_mask: its real tokens; those of `seen` lie sample after sample.
      key: for scores that draw.
      first: whether it is the first batch of the round.
    """

    seen: Routing
    token_mask: Bool[Array, "... batch length"]
    key: Array
    first: Bool[Array, ""]


class Scoring:
    """A score function, and when it is evaluated.

    Args:
      name: of the score, see `score_rules`.
      importance: the config's section.
      routed: the forward pass runs every expert, and comes before the selection.

    Raises:
      InputError: the score reads what `importance.refresh` cannot give it.
    """

    def __init__(self, name: str, importance: ConfigDict, routed: bool):
        self.rule, self.importance, self.routed = score_rules[name], importance, routed
        self.reads = gradients_read(self.rule, importance)
        self.refresh = importance.refresh
        problem = None
        if "gradient_norm" in self.reads and self.refresh != "step":
            problem, remedy = (
                "the training pass has no gradient of experts that it does not train",
                f"use importance.refresh=step with the score {name}",
            )
        elif "contribution" in self.reads and self.refresh == "round":
            problem, remedy = (
                "a round's first batch has no contributions yet",
                "use importance.refresh=previous, or importance.estimate=routing",
            )
        elif not routed and self.refresh == "step":
            problem, remedy = (
                "fl.forward=active selects before it knows the batch",
                "use importance.refresh=previous or round, or fl.forward=routed",
            )
        if problem:
            raise InputError("importance.refresh", self.refresh, problem, remedy)

    def passes(self, steps: int) -> ScoringPasses:
        """Returns what scoring adds to a client's round."""
        if "gradient_norm" in self.reads:
            return ScoringPasses(steps, shared=2, experts=3)
        return NO_SCORING if self.routed else ScoringPasses(1, shared=1, experts=0)

    def start(self, num_layers: int, num_experts: int) -> Importance:
        """Returns the importance, arrays [L, E], before a client's first batch."""
        zeros = jnp.zeros((num_layers, num_experts), jnp.float32)
        return Importance(zeros, zeros, jnp.zeros_like(zeros, bool))

    def of_batch(
        self, known: Importance, batch: SeenBatch, gradient_norm: Callable[[], PerExpert] | None = None
    ) -> Importance:
        """Returns the importance after a batch's routers.

        `routed` asks after each forward pass, `active` once a round: after the routers of its first batch.

        Args:
          gradient_norm: computes them.
        """
        units = self._units(batch)
        stand_in = routing_importance(units.gates, units.mask, self.importance.lam)
        contribution = jnp.where(batch.first, stand_in, known.contribution)
        score = self._score(batch, contribution, gradient_norm)
        eligible = union(batch.seen.own)
        if self.refresh != "step":
            score = jnp.where(batch.first, score, known.score)
        if self.refresh == "round":
            eligible = jnp.where(batch.first, eligible, known.eligible)
        return known._replace(score=score, eligible=eligible)

    def after_batch(
        self,
        known: Importance,
        batch: SeenBatch,
        contribution: PerExpert,
        ran: Bool[AnyArray, "layers experts"] | None,
    ) -> Importance:
        """Returns the importance after a batch's backward pass.

        Args:
          contribution: of this batch.
          ran: the experts that tokens could be sent to, None for all; of others the contribution was
            not measured.
        """
        if self.refresh == "round":
            return known
        if self.refresh == "step":
            mean = jnp.where(batch.first, contribution, mix(known.contribution, contribution))
            return known._replace(contribution=mean)
        score = mix(known.score, self._score(batch, contribution))
        if ran is not None and "contribution" in self.reads:
            score = jnp.where(ran, score, known.score)
        eligible = known.eligible if self.routed else known.eligible | union(batch.seen.own)
        return known._replace(score=score, eligible=eligible)

    def select(self, known: Importance, budget: Int[ArrayLike, ""]) -> Bool[AnyArray, "layers experts"]:
        """Returns E_active (15)."""
        return select(known.score, known.eligible, budget)

    def _units(self, batch: SeenBatch) -> Units:
        return units_of(batch.seen.gates, batch.seen.own, batch.token_mask, self.importance.unit)

    def _score(self, batch: SeenBatch, contribution: PerExpert, gradient_norm=None) -> PerExpert:
        units = self._units(batch)
        evidence = Evidence(
            units.gates, units.chosen, units.mask, batch.key, lambda: contribution, gradient_norm
        )
        return self.rule(evidence, self.importance)


def build_scoring(config: ConfigDict, score: str) -> Scoring | None:
    """Returns the scoring of a run's config; None for the score "none", with which all experts train."""
    if score == "none":
        return None
    return Scoring(score, config.importance, config.fl.forward == "routed")


def mix(past: PerExpert, now: PerExpert) -> PerExpert:
    """Returns the running mean after one more value."""
    return SCORE_DECAY * past + (1 - SCORE_DECAY) * now
