"""How good a model is: on the validation and test splits, by passage and document, and on clients' own data.

Axes: M batches, B batch, N passages (rows), L MoE layers, E experts, C clients.
"""

from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from hfedmoe_jax.data import FederatedData, holdout_batches, host_of, num_rows, pad_batches, take
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
    def validation(self) -> tuple[EvaluationBatches, np.ndarray, np.ndarray]:
        """Batches of the validation split, then one a client of its own; the rows; each batch's host."""
        count, size = num_rows(self._data.validation), self._config.eval.batch_size
        rng = np.random.default_rng([self._config.seed, VALIDATION_STREAM])
        rows = rng.permutation(count)[: self._config.eval.max_examples or count]
        parts = [pad_batches(take(self._data.validation, rows), size), holdout_batches(self._data, size)]
        batch, weight = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        num_validation = len(parts[0][1])
        clients = np.concatenate([np.arange(num_validation) % self._clients, np.arange(self._clients)])
        hosts = np.concatenate([np.arange(num_validation), np.arange(self._clients)])
        batches = EvaluationBatches(batch, weight, clients.astype(np.int32))
        return batches, rows, host_of(hosts, self._hosts)

    def validate(self, model: Snapshot) -> tuple[Quality, np.ndarray]:
        """Returns the quality on the validation split, and each client's score [C] on its own passages."""
        batches, rows, hosts = self.validation
        scores = self._evaluator.scores(model, batches, hosts)
        num_validation = len(batches.client) - self._clients
        of_split = jax.tree.map(lambda x: x[:num_validation], scores)
        document = self._data.validation_document[rows]
        documents = score_documents(self._task, of_split, take(self._data.validation, rows), document)
        own = jax.tree.map(lambda x: x[num_validation:], scores.scores[self._task.metric])
        return summarize(of_split, documents), own.total / np.maximum(own.count, 1)

    def test(self, model: Snapshot) -> Quality:
        """Returns the quality on the test split."""
        by_length, scores = self._task.by_length or (lambda rows: [rows]), []
        for rows in by_length(self._data.test):
            batch, weight = pad_batches(rows, self._config.eval.batch_size)
            clients = (np.arange(len(weight)) % self._clients).astype(np.int32)
            hosts = host_of(np.arange(len(weight)), self._hosts)
            scores.append(self._evaluator.scores(model, EvaluationBatches(batch, weight, clients), hosts))
        scores = jax.tree.map(lambda *parts: np.concatenate(parts), *scores)
        return summarize(
            scores, score_documents(self._task, scores, self._data.test, self._data.test_document)
        )


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
