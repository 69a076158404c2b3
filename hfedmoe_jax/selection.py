"""Which experts a client trains: equation (15) of arXiv 2601.00583.

Axes: L MoE layers, E experts.
"""

import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float, Int

from hfedmoe_jax.arrays import AnyArray


def select(
    score: Float[AnyArray, "layers experts"],
    eligible: Bool[AnyArray, "layers experts"],
    budget: Int[ArrayLike, ""],
) -> Bool[AnyArray, "layers experts"]:
    """Returns E_active: the `budget` eligible experts of largest score, over all layers (15).

    Exact, also for a budget known only at run time: an expert is chosen when fewer than
    `budget` eligible ones precede it. Ties go to the lower (layer, expert) index; a NaN
    score ranks last. Fewer than `budget` eligible experts are all chosen.

    Args:
      score: larger is better.
      eligible: E_union, the experts that the batch was routed to.
      budget: how many experts the client can train, over all layers.
    """
    flat = jnp.where(eligible & ~jnp.isnan(score), score, -jnp.inf).reshape(-1)
    # Two stable passes: ineligible experts sort last even if an eligible score is -inf.
    order = jnp.lexsort((jnp.arange(flat.size), -flat, ~eligible.reshape(-1)))
    rank = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    return (rank < budget).reshape(score.shape) & eligible
