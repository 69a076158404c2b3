"""What a task is: how documents become batches, and how outputs are scored.

Axes: N passages (rows), B batch, T tokens.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from hfedmoe_jax.registry import Registry

Batch = Any
"""A tree of arrays [B, ...], of static shapes; `tokens` int32 [B, T], 0 for padding, is what models read."""


class Ratio(NamedTuple):
    """A mean as two sums, which add up over batches and hosts."""

    total: Float[Array, "*batches"]
    count: Float[Array, "*batches"]


class DocumentScores(NamedTuple):
    """How well whole documents are answered, each from all of its passages; or a split as a whole.

    Attributes:
      scores: by name.
      by_class: precision, recall, f1 and the number of documents, float64 [K] each; empty without classes.
    """

    scores: dict[str, float]
    by_class: dict[str, np.ndarray]


NO_DOCUMENTS = DocumentScores({}, {})


class Task(NamedTuple):
    """A task as pure functions.

    Attributes:
      prepare: (tokenizer, `Documents`, labels int [D], label names, data config) -> (rows, a tree of arrays
        [N, ...]; the index of each one's document [N]). Each document has at least one row, in their order.
      output: what the model returns a vector for: each "text", [B, O], or each "token", [B, T, O]; or
        `models.answers.Answers`, for "answer".
      num_outputs: (label names, vocabulary size) -> outputs of the model's head.
      loss: (output, batch) -> (mean loss in nats; what it is a mean over: examples, or tokens).
      score: (output, batch, weight float [B]) -> `Ratio` by name; an example of weight 0 does not count,
        whatever its output. `loss` and those of `scores` are among them.
      scores: names of the others beside `loss`.
      metric: the one of `scores` that chooses the best round; larger is better.
      baseline: (training rows, test rows) -> `metric` of the best constant answer.
      baseline_name: of that answer.
      evidence: (output, batch) -> what documents are scored from, float [B, ...]; None if they are not.
      score_documents: (evidence [N, ...], rows, document [N]) -> `DocumentScores`, on the host.
      document_scores: names of its scores.
      labelled: whether documents need a label.
      asked: batch -> the batch that the model reads to be scored, of which `score` gets the output; None: it
        reads what it trains on, so that training passes are scored, too.
      by_length: rows -> parts of them, cut to the tokens that they have, to be scored; None: all as they are.
    """

    prepare: Callable[..., tuple[Batch, Any]]
    output: Literal["text", "token", "answer"]
    num_outputs: Callable[[tuple[str, ...], int], int]
    loss: Callable[[Any, Batch], tuple[Array, Array]]
    score: Callable[[Any, Batch, Array], dict[str, Ratio]]
    scores: tuple[str, ...]
    metric: str
    baseline: Callable[[Batch, Batch], float]
    baseline_name: str = "constant answer"
    evidence: Callable[[Any, Batch], Array] | None = None
    score_documents: Callable[[np.ndarray, Batch, np.ndarray], DocumentScores] | None = None
    document_scores: tuple[str, ...] = ()
    labelled: bool = True
    asked: Callable[[Batch], Batch] | None = None
    by_length: Callable[[Batch], list[Batch]] | None = None

    @property
    def train_scores(self) -> tuple[str, ...]:
        """Names of the scores of training passes, beside their loss."""
        return self.scores if self.asked is None else ()

    @property
    def unit(self) -> str:
        """What `scores` are means over, in the words of the results: a passage, or a (next) token."""
        return "token" if self.output == "token" else "passage"

    @property
    def metric_name(self) -> str:
        """`metric` as it is shown, e.g. "accuracy by passage"."""
        return f"{self.metric} by {self.unit}"


tasks = Registry("task.name")
"""Tasks by name."""
