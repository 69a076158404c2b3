"""How good a model is: on the validation and test splits, by passage and document, and on clients' own data.

Axes: M batches, B batch, N passages (rows), L MoE layers, E experts, C clients.
"""

from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from hfedmoe_jax.data import FederatedData, Rows, holdout_batches, host_of, num_rows, pad_batches, take
from hfedmoe_jax.evaluation import BatchScore, EvaluationBatches, Evaluator, Snapshot
from hfedmoe_jax.tasks import NO_DOCUMENTS, Batch, DocumentScores, Ratio, Task

VALIDATION_STREAM = 101  # of the host's random streams; a cohort's has the round's number besides


class Quality(NamedTuple):
    """How good a model is on a split.

    Attributes:
      scores: the task's scores by name, of passages and of whole documents.
      load: [L, E], share of a layer's tokens that each expert served.
      router_entropy: in nats.
      by_class: see `DocumentScores`.
    """

    scores: dict[str, float]
    load: np.ndarray
    router_entropy: float
    by_class: dict[str, np.ndarray]


class Splits:
    """Evaluates models on the validation split, the clients' own held-out passages and the test split.

    For algorithms that keep a model a client, client i mod C is evaluated on batch i of a split, and each
    client on its own passages.

    Args:
      evaluator, task: how.
      data: of this process.
      config: `seed` and `eval` are read.
      hosts: how many processes share the work.
    """

    def __init__(self, evaluator: Evaluator, data: FederatedData, config: ConfigDict, task: Task, hosts: int):
        self._evaluator, self._data, self._config = evaluator, data, config
        self._task, self._hosts, self._clients = task, hosts, len(data.client_train)

    @cached_property
    def validation(self) -> tuple[Rows, Int[np.ndarray, " rows"]]:
        """The rows of the validation split that are scored, and the document that each is of."""
        data, count = self._data, num_rows(self._data.validation)
        rng = np.random.default_rng([self._config.seed, VALIDATION_STREAM])
        rows = rng.permutation(count)[: self._config.eval.max_examples or count]
        return take(data.validation, rows), data.validation_document[rows]

    @cached_property
    def holdout(self) -> EvaluationBatches:
        """A batch a client of its own held-out passages."""
        batch, weight = holdout_batches(self._data, self._config.eval.batch_size)
        return EvaluationBatches(batch, weight, np.arange(self._clients, dtype=np.int32))

    def validate(self, model: Snapshot) -> tuple[Quality, np.ndarray]:
        """Returns the quality on the validation split, and each client's score [C] on its own passages."""
        hosts = host_of(np.arange(self._clients), self._hosts)
        own = self._evaluator.scores(model, self.holdout, hosts).scores[self._task.metric]
        return self._quality(model, *self.validation), own.total / np.maximum(own.count, 1)

    def test(self, model: Snapshot) -> Quality:
        """Returns the quality on the test split."""
        return self._quality(model, self._data.test, self._data.test_document)

    def _quality(self, model: Snapshot, rows: Rows, document: Int[np.ndarray, " rows"]) -> Quality:
        """Returns the quality on rows, each of a document."""
        by_length, scores = self._task.by_length or (lambda rows: [rows]), []
        for part in by_length(rows):
            batch, weight = pad_batches(part, self._config.eval.batch_size)
            count = np.arange(len(weight))
            batches = EvaluationBatches(batch, weight, (count % self._clients).astype(np.int32))
            scores.append(self._evaluator.scores(model, batches, host_of(count, self._hosts)))
        scores = jax.tree.map(lambda *parts: np.concatenate(parts), *scores)
        return summarize(scores, score_documents(self._task, scores, rows, document))


def ratio_mean(ratio: Ratio) -> float:
    """Returns the mean over all batches, summed in float64."""
    total, count = (np.sum(x, dtype=np.float64) for x in ratio)
    return float(total / count)


def summarize(scores: BatchScore, documents: DocumentScores = NO_DOCUMENTS) -> Quality:
    """Returns means over all examples, summed in float64, beside the scores of whole documents."""
    load = np.sum(scores.load, axis=0, dtype=np.float64)
    served = np.maximum(load.sum(axis=-1, keepdims=True), 1)
    return Quality(
        scores={name: ratio_mean(ratio) for name, ratio in scores.scores.items()} | documents.scores,
        load=load / served,
        router_entropy=ratio_mean(scores.entropy),
        by_class=documents.by_class,
    )


def score_documents(
    task: Task, scores: BatchScore, rows: Batch, document: Int[np.ndarray, " rows"]
) -> DocumentScores:
    """Returns how well whole documents are answered; nothing if the task does not say.

    Args:
      scores: of batches [M, B] that hold the rows in order, and padding after them.
      rows, document: the examples [N, ...], and the document that each is of.
    """
    if task.score_documents is None:
        return NO_DOCUMENTS
    evidence = scores.evidence.reshape(-1, *scores.evidence.shape[2:])[: len(document)]
    return task.score_documents(evidence, rows, document)


def client_spread(score: np.ndarray) -> tuple[float, float, float]:
    """Returns mean, standard deviation and the mean of the worst 10% (at least one) of scores [C]."""
    worst = np.sort(score)[: max(1, int(np.ceil(0.1 * len(score))))]
    return float(np.mean(score)), float(np.std(score)), float(np.mean(worst))
