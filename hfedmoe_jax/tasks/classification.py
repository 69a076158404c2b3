"""Classification of texts: logits [B, classes] against a label each."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from hfedmoe_jax.data.tokenizers import encode_passages
from hfedmoe_jax.tasks.task import Batch, Ratio, Task, tasks


def prepare(
    tokenizer: Tokenizer, texts: Sequence[str], labels: Int[np.ndarray, " documents"], data: ConfigDict
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns passages: `tokens` [N, T] ([PAD]=0, [CLS] first), `labels` [N], and each one's document."""
    tokens, document = encode_passages(tokenizer, texts, data.seq_len, data.long_text)
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


classification = Task(prepare, "text", num_outputs, loss, score, ("accuracy",), "accuracy", majority_vote)
tasks.register("classification")(classification)
