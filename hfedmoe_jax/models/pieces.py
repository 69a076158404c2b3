"""A model cut where a client's budget enters: between routing and experts.

`hfedmoe_jax.budgeted` runs the pieces so that only the experts of a client's budget cost
anything; the Flax module they are cut from stays the reference.

Axes: B batch, T tokens, N = B * T, S slots of an expert, D model, F hidden, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple


class Pieces(NamedTuple):
    """The parts of a model with L equal blocks as pure functions.

    Attributes:
      embed: (shared parts, tokens [B, T]) -> x [B, T, D].
      attend: (one layer of shared["blocks"], x [B, T, D], token mask [B, T]) -> (x, h [N, D]): everything
        of a block before its experts; h is what router and experts read.
      route: (one layer of router["blocks"], h [N, D]) -> logits [N, E], float32.
      expert: (weights of one expert, x [S, D]) -> (y [S, D], hidden [S, F]).
      expert_gradient: (weights, x, hidden, dy) -> (gradient of the weights in float32, dx).
      head: (shared parts, x [B, T, D], token mask [B, T]) -> logits [B, classes], float32.
      embed_parts, head_parts: the names in `shared` that `embed` and `head` read.
      table: the name in `shared` of the array [vocabulary, D] of which a batch reads its tokens' rows only.
    """

    embed: Callable
    attend: Callable
    route: Callable
    expert: Callable
    expert_gradient: Callable
    head: Callable
    embed_parts: tuple[str, ...]
    head_parts: tuple[str, ...]
    table: str
