"""What a client reports of its round beside its parameters.

Axes: S local steps, B batch, N tokens, L MoE layers, E experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hfedmoe_jax.models import Routing
from hfedmoe_jax.scores import union
from hfedmoe_jax.tasks import Ratio

OK, DROPPED_OUT, OVER_BUDGET, NONFINITE = range(4)
STATUS_NAMES = ("ok", "dropped_out", "over_budget", "nonfinite")
FAILURES = {
    DROPPED_OUT: "dropped out (fl.dropout_probability)",
    OVER_BUDGET: "needed more experts than they can train (budget.fraction, devices, fl.algorithm)",
    NONFINITE: "had a loss or a score that is not finite (client.learning_rate, fl.score)",
}
"""What happened to clients whose update does not count, with the fields that decide it."""


class ClientReport(NamedTuple):
    """What a client measured, means over its steps unless said otherwise.

    Attributes:
      status: OK, DROPPED_OUT, OVER_BUDGET or NONFINITE (an index into STATUS_NAMES).
      loss: of the task, in nats.
      scores: the task's other scores of the training batches, by name.
      union_size: experts that the batch's tokens were routed to.
      max_union_size: the largest of these.
      trained_size: experts that were trained.
      assignments, trained_assignments: token-expert pairs computed a step over all layers, and those
        whose expert was trained.
      dropped: share of assignments that found no room.
      router_entropy: mean entropy of the gates in nats.
      padding: share of the batches' tokens that are padding.
      empty_slots: share of the places for tokens that the experts which ran had and no token took.
    """

    status: Int[Array, ""]
    loss: Float[Array, ""]
    scores: dict[str, Float[Array, ""]]
    union_size: Float[Array, ""]
    max_union_size: Float[Array, ""]
    trained_size: Float[Array, ""]
    assignments: Float[Array, ""]
    trained_assignments: Float[Array, ""]
    dropped: Float[Array, ""]
    router_entropy: Float[Array, ""]
    padding: Float[Array, ""]
    empty_slots: Float[Array, ""]


class StepReport(NamedTuple):
    """One step's part of a `ClientReport`.

    Attributes:
      loss: mean loss, and what it is a mean over.
      scores: of the task.
      routing: the fields of `ClientReport` that are means over steps.
    """

    loss: Ratio
    scores: dict[str, Ratio]
    routing: dict[str, Float[Array, ""]]


def report_routing(
    routing: Routing, trained: Bool[Array, "layers experts"], token_mask: Bool[Array, "... tokens"]
) -> dict[str, Float[Array, ""]]:
    """Returns the statistics of a step's routing, by field.

    Args:
      routing: of the training pass.
      trained: experts that this step trained.
      token_mask: real tokens, of all layers alike or of each.
    """
    kept = jnp.sum(routing.kept, dtype=jnp.float32)
    return dict(
        union_size=jnp.sum(union(routing.own), dtype=jnp.float32),
        trained_size=jnp.sum(trained, dtype=jnp.float32),
        assignments=kept,
        trained_assignments=jnp.sum(jnp.where(trained, routing.kept, 0), dtype=jnp.float32),
        dropped=1 - kept / jnp.maximum(jnp.sum(routing.sent), 1),
        router_entropy=gate_entropy(routing.gates, token_mask),
        empty_slots=1 - kept / jnp.maximum(jnp.sum(routing.slots), 1),
    )


def mean_report(status: Int[Array, ""], steps: StepReport) -> ClientReport:
    """Returns the report of a round from those of its steps, stacked."""
    loss, scores = jax.tree.map(
        lambda ratio: jnp.sum(ratio.total) / jnp.sum(ratio.count),
        (steps.loss, {name: ratio for name, ratio in steps.scores.items() if name != "loss"}),
        is_leaf=lambda node: isinstance(node, Ratio),
    )
    return ClientReport(
        status=status,
        loss=loss,
        scores=scores,
        max_union_size=jnp.max(steps.routing["union_size"]),
        **{name: jnp.mean(values, axis=0) for name, values in steps.routing.items()},
    )


def client_status(
    available: Bool[Array, ""], finite: Bool[Array, ""], over_budget: Bool[Array, ""]
) -> Int[Array, ""]:
    """Returns how a client's round ended; the first of these that went wrong counts."""
    return jnp.select([~available, ~finite, over_budget], [DROPPED_OUT, NONFINITE, OVER_BUDGET], OK)


def gate_entropy(
    gates: Float[Array, "layers tokens experts"], token_mask: Bool[Array, "... tokens"]
) -> Float[Array, ""]:
    """Returns the entropy of the gates in nats, mean over layers of the mean over real tokens."""
    entropy = -jnp.sum(jax.scipy.special.xlogy(gates, gates), axis=-1)
    real = jnp.sum(token_mask, axis=-1)
    return jnp.mean(jnp.sum(jnp.where(token_mask, entropy, 0.0), axis=-1) / jnp.maximum(real, 1))


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Says whether no number of a tree is NaN or infinite, nor their sum too large for float32."""
    # A sum runs several times as fast on a CPU as a test of every number.
    return jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)))


def failed_clients(counts: np.ndarray) -> str:
    """Returns why clients' updates did not count, as text.

    Args:
      counts: int [4], clients by status.

    >>> failed_clients(np.array([0, 0, 0, 3]))
    '3 clients had a loss or a score that is not finite (client.learning_rate, fl.score)'
    """
    parts = [f"{counts[status]} {text}" for status, text in FAILURES.items() if counts[status]]
    first, *others = parts
    return ", ".join([first.replace(" ", " clients ", 1), *others])
