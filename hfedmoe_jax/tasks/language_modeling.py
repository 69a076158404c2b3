"""Language modelling: logits [B, T, vocabulary], each against the next token of the text.

The loss is the mean over real next tokens in nats; its exponential over a whole split is the perplexity.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.data.tokenizers import encode_passages
from hfedmoe_jax.tasks.task import Batch, DocumentScores, Ratio, Task, tasks


def prepare(
    tokenizer: Tokenizer,
    documents: Documents,
    labels: Any,
    label_names: Sequence[str],
    data: ConfigDict,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns passages: `tokens` [N, T], and each one's document; labels only partition the texts."""
    tokens, document = encode_passages(tokenizer, documents.texts, data.seq_len, data.long_text)
    return {"tokens": tokens}, document


def num_outputs(label_names: tuple[str, ...], vocab_size: int) -> int:
    """Returns the size of the vocabulary."""
    return vocab_size


def each_token(
    logits: Float[Array, "batch tokens vocabulary"], batch: Batch
) -> tuple[Float[Array, "batch tokens-1"], Bool[Array, "batch tokens-1"], Bool[Array, "batch tokens-1"]]:
    """Returns the cross-entropy of each next token, whether it is the likeliest, and whether there is one."""
    target = batch["tokens"][:, 1:]
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], target)
    return each, jnp.argmax(logits[:, :-1], axis=-1) == target, target != 0


def loss(logits: Float[Array, "batch tokens vocabulary"], batch: Batch) -> tuple[Array, Array]:
    """Returns the mean cross-entropy, and over how many tokens."""
    each, _, real = each_token(logits, batch)
    count = jnp.sum(real, dtype=jnp.float32)
    return jnp.sum(each * real) / jnp.maximum(count, 1), count


def score(
    logits: Float[Array, "batch tokens vocabulary"], batch: Batch, weight: Float[Array, " batch"]
) -> dict[str, Ratio]:
    """Returns the share of next tokens that are the likeliest, and the cross-entropy."""
    each, right, real = each_token(logits, batch)
    counted = real & (weight > 0)[:, None]
    factor = counted * weight[:, None]
    count = jnp.sum(factor)
    return {
        "accuracy": Ratio(jnp.sum(right * factor), count),
        "loss": Ratio(jnp.sum(jnp.where(counted, each * factor, 0.0)), count),
    }


def token_sums(logits: Float[Array, "batch tokens vocabulary"], batch: Batch) -> Float[Array, "batch 2"]:
    """Returns the sum of a passage's cross-entropies, and over how many tokens."""
    each, _, real = each_token(logits, batch)
    return jnp.stack([jnp.sum(each * real, axis=-1), jnp.sum(real, axis=-1, dtype=jnp.float32)], axis=-1)


def perplexity(
    sums: Float[np.ndarray, "passages 2"], rows: Batch, document: Int[np.ndarray, " passages"]
) -> DocumentScores:
    """Returns the perplexity a token, of all passages together."""
    total, count = (float(np.sum(part, dtype=np.float64)) for part in sums.T)
    with np.errstate(over="ignore"):  # of a model that has diverged it is infinite
        return DocumentScores({"perplexity": float(np.exp(total / max(count, 1)))}, {})


def most_frequent(train: dict[str, Any], test: dict[str, Any]) -> float:
    """Returns the test accuracy of always answering the most frequent training token."""
    seen, asked = (rows["tokens"][:, 1:] for rows in (train, test))
    answer = np.bincount(seen[seen != 0]).argmax()
    return float(np.mean(asked[asked != 0] == answer))


language_modeling = Task(
    prepare, "token", num_outputs, loss, score, ("accuracy",), "accuracy", most_frequent,
    baseline_name="most frequent token",
    evidence=token_sums,
    score_documents=perplexity,
    document_scores=("perplexity",),
    labelled=False,
)  # fmt: skip
tasks.register("language_modeling")(language_modeling)
