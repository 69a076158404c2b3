"""When and by what a client scores its experts, without a pass for the purpose.

By what: the samples or the tokens of a batch (`importance.unit`), see `scores`. When: `importance.refresh`.

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
of the batches so far, and before the first batch from what the routers say of it when no expert
runs. Only gradient norms of experts cost a backward pass of their own.

Axes: L layers, B samples of T tokens, N = B * T tokens, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.budgeted import Seen
from hfedmoe_jax.devices import NO_SCORING, ScoringPasses
from hfedmoe_jax.errors import InputError
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


class Batch(NamedTuple):
    """What scoring reads of a batch beside gradients.

    Attributes:
      seen: what the routers did.
      token_mask: its real tokens; those of `seen` lie sample after sample.
      key: for scores that draw.
      first: whether it is the first batch of the round.
    """

    seen: Seen
    token_mask: Bool[Array, "batch length"]
    key: Array
    first: Bool[Array, ""]


class Scoring:
    """A score function with the moments at which it is asked.

    Args:
      num_layers, num_experts: L, E.
      name: of the score, see `score_rules`.
      importance: the config's section.
      routed: the forward pass runs every expert, and comes before the selection.

    Raises:
      InputError: the score reads what `importance.refresh` cannot give it.
    """

    def __init__(self, num_layers: int, num_experts: int, name: str, importance: ConfigDict, routed: bool):
        self.shape = (num_layers, num_experts)
        self.rule, self.importance, self.routed = score_rules[name], importance, routed
        self.reads = gradients_read(self.rule, importance, *self.shape)
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
            return ScoringPasses(steps, shared=1, experts=2)
        return NO_SCORING if self.routed else ScoringPasses(1, shared=1, experts=0)

    def start(self) -> Importance:
        """Returns the importance of a client that has seen nothing."""
        zeros = jnp.zeros(self.shape, jnp.float32)
        return Importance(zeros, zeros, jnp.zeros(self.shape, bool))

    def of_batch(
        self, known: Importance, batch: Batch, gradient_norm: Callable[[], PerExpert] | None = None
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
        batch: Batch,
        contribution: PerExpert,
        ran: Bool[Array, "layers experts"] | None,
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

    def select(self, known: Importance, budget: Int[Array, ""]) -> Bool[Array, "layers experts"]:
        """Returns E_active (15)."""
        return select(known.score, known.eligible, budget)

    def _units(self, batch: Batch) -> Units:
        return units_of(batch.seen.gates, batch.seen.own, batch.token_mask, self.importance.unit)

    def _score(self, batch: Batch, contribution: PerExpert, gradient_norm=None) -> PerExpert:
        units = self._units(batch)
        evidence = Evidence(
            units.gates, units.chosen, units.mask, batch.key, lambda: contribution, gradient_norm
        )
        return self.rule(evidence, self.importance)


def build_scoring(config: ConfigDict, score: str) -> Scoring | None:
    """Returns the scoring of a run's config; None for the score "none", with which all experts train."""
    if score == "none":
        return None
    model, routed = config.model, config.fl.forward == "routed"
    return Scoring(model.num_layers, model.num_experts, score, config.importance, routed)


def mix(past: PerExpert, now: PerExpert) -> PerExpert:
    """Returns the running mean after one more value."""
    return SCORE_DECAY * past + (1 - SCORE_DECAY) * now
