"""Classification of texts: logits [B, classes] against a label each."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.data.tokenizers import encode_passages
from hfedmoe_jax.tasks.task import Batch, DocumentScores, Ratio, Task, tasks


def prepare(
    tokenizer: Tokenizer,
    documents: Documents,
    labels: Int[np.ndarray, " documents"],
    label_names: Sequence[str],
    data: ConfigDict,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns passages: `tokens` [N, T] ([PAD]=0, [CLS] first), `labels` [N], and each one's document."""
    tokens, document = encode_passages(tokenizer, documents.texts, data.seq_len, data.long_text)
    return {"tokens": tokens, "labels": np.asarray(labels, np.int32)[document]}, document


def num_outputs(label_names: tuple[str, ...], vocab_size: int) -> int:
    """Returns the number of classes."""
    return len(label_names)


def loss(logits: Float[Array, "batch classes"], batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean cross-entropy, and over how many examples."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.mean(each), jnp.float32(each.shape[0])


def score(
    logits: Float[Array, "batch classes"], batch: Batch, weight: Float[Array, " batch"]
) -> dict[str, Ratio]:
    """Returns accuracy and cross-entropy over the examples, by weight."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    right = jnp.argmax(logits, axis=-1) == batch["labels"]
    count = jnp.sum(weight)
    return {
        "accuracy": Ratio(jnp.sum(right * weight), count),
        "loss": Ratio(jnp.sum(jnp.where(weight > 0, each * weight, 0.0)), count),
    }


def majority_vote(train: dict[str, Any], test: dict[str, Any]) -> float:
    """Returns the test accuracy of always answering the most frequent training label."""
    return float(np.mean(test["labels"] == np.bincount(train["labels"]).argmax()))


def document_log_probs(
    log_probs: Float[np.ndarray, "passages classes"], document: Int[np.ndarray, " passages"]
) -> tuple[Float[np.ndarray, "documents classes"], Int[np.ndarray, " documents"]]:
    """Returns the mean over each document's passages, and the place of its first passage.

    Its exponential is the geometric mean of the passages' probabilities, up to a factor that classes share.
    """
    _, first, of_passage, count = np.unique(
        document, return_index=True, return_inverse=True, return_counts=True
    )
    total = np.zeros((len(first), log_probs.shape[1]))
    np.add.at(total, of_passage, log_probs)
    return total / count[:, None], first


def class_scores(
    answer: Int[np.ndarray, " documents"], label: Int[np.ndarray, " documents"], num_classes: int
) -> dict[str, Float[np.ndarray, " classes"]]:
    """Returns precision, recall, F1 and the number of documents of each class.

    A class that is never answered has precision 0, one without documents recall 0, and F1 follows.
    """
    right = np.bincount(label[answer == label], minlength=num_classes).astype(np.float64)
    answered, there = (np.bincount(x, minlength=num_classes) for x in (answer, label))
    return {
        "precision": right / np.maximum(answered, 1),
        "recall": right / np.maximum(there, 1),
        "f1": 2 * right / np.maximum(answered + there, 1),
        "documents": there.astype(np.float64),
    }


def score_documents(
    log_probs: Float[np.ndarray, "passages classes"], rows: Batch, document: Int[np.ndarray, " passages"]
) -> DocumentScores:
    """Returns accuracy and macro F1 over documents; classes without documents are left out of the mean."""
    means, first = document_log_probs(log_probs, document)
    answer, label = np.argmax(means, axis=-1), rows["labels"][first]
    by_class = class_scores(answer, label, log_probs.shape[1])
    macro = np.mean(by_class["f1"][by_class["documents"] > 0])
    scores = {"document_accuracy": float(np.mean(answer == label)), "document_macro_f1": float(macro)}
    return DocumentScores(scores, by_class)


def log_softmax(logits: Float[Array, "batch classes"], batch: Batch) -> Float[Array, "batch classes"]:
    """Returns the log-probabilities of the classes."""
    return jax.nn.log_softmax(logits.astype(jnp.float32))


classification = Task(
    prepare, "text", num_outputs, loss, score, ("accuracy",), "accuracy", majority_vote,
    baseline_name="majority class",
    evidence=log_softmax,
    score_documents=score_documents,
    document_scores=("document_accuracy", "document_macro_f1"),
)  # fmt: skip
tasks.register("classification")(classification)
