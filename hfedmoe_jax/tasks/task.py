"""What a task is: how documents become batches, and how outputs are scored.

Axes: N passages (rows), B batch, T tokens.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxtyping import Array, Float

from hfedmoe_jax.registry import Registry

Batch = Any
"""A tree of arrays [B, ...], of static shapes; `tokens` int32 [B, T], 0 for padding, is what models read."""


class Ratio(NamedTuple):
    """A mean as two sums, which add up over batches and hosts."""

    total: Float[Array, "*batches"]
    count: Float[Array, "*batches"]


class Task(NamedTuple):
    """A task as pure functions.

    Attributes:
      prepare: (tokenizer, texts, labels int [D], data config) -> (rows, a tree of arrays [N, ...]; the index
        of each one's document [N]). Each text has at least one row, in the order of the texts.
      output: what the model returns a vector for: each "text", [B, O], or each "token", [B, T, O].
      num_outputs: (label names, vocabulary size) -> outputs of the model's head.
      loss: (output, batch) -> (mean loss in nats; what it is a mean over: examples, or tokens).
      score: (output, batch, weight float [B]) -> `Ratio` by name; an example of weight 0 does not count,
        whatever its output. `loss` and those of `scores` are among them.
      scores: names of the others beside `loss`.
      metric: the one of `scores` that chooses the best round; larger is better.
      baseline: (training rows, test rows) -> `metric` of the best constant answer.
    """

    prepare: Callable[..., tuple[Batch, Any]]
    output: Literal["text", "token"]
    num_outputs: Callable[[tuple[str, ...], int], int]
    loss: Callable[[Any, Batch], tuple[Array, Array]]
    score: Callable[[Any, Batch, Array], dict[str, Ratio]]
    scores: tuple[str, ...]
    metric: str
    baseline: Callable[[Batch, Batch], float]


tasks = Registry("task.name")
"""Tasks by name."""
