"""Multiple choice: the answer is the choice that is likeliest after the question.

Training is on the tokens of right answers after their questions. Scores are those of lm-evaluation-harness:
`acc` takes the choice of the largest log-likelihood, `acc_norm` of the largest one over the characters of its
text. The model reads one question and choice a row, and returns logits [B, T, vocabulary].

Axes: D questions, B batch of them, C choices, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.data.tokenizers import specials_of, token_offset
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.ranges import check_bytes
from hfedmoe_jax.tasks.task import Batch, Ratio, Task, tasks

SHORTEST = 32  # tokens that the rows of an evaluation are cut to at least
NEVER = -1e30  # score of what is no choice


def prepare(
    tokenizer: Tokenizer,
    documents: Documents,
    labels: Any,
    label_names: Sequence[str],
    data: ConfigDict,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns a row a question, and its index.

    A text that is too long loses its beginning. The question is what `data.prompt` makes of the text; a space
    and a choice follow.

    Returns:
      `choices` [D, C, T], the question with each of its choices, 0 for padding; `start` [D, C], where the
      answer begins; `characters` [D, C], of its text, 0 for no choice; `labels` [D], the right choice;
      `tokens` [D, T] and `tokens_start` [D], those of the right one.

    Raises:
      InputError: the source has no choices, `data.prompt` has no place for the text, or the arrays are too
        large.
    """
    if documents.choices is None:
        problem = "is empty, and task.name=multiple_choice asks for choices"
        raise InputError(
            "data.choices_column", data.choices_column, problem, "name the column of the choices"
        )
    prompt = data.prompt.replace(r"\n", "\n")  # as it is written on a command line
    if "{}" not in prompt:
        raise InputError("data.prompt", data.prompt, "has no {}, the place of the question",
                         r"use e.g. 'Question: {}\nAnswer:'")  # fmt: skip
    shape = len(documents.texts), max(map(len, documents.choices)), data.seq_len
    what = f"{shape[0]:,} questions of {shape[1]} choices are"
    check_bytes("data.seq_len", data.seq_len, what, 4.0 * np.prod(shape), "use fewer tokens a choice")
    questions = [prompt.replace("{}", text).rstrip(" ") for text in documents.texts]
    whole = [
        f"{question} {choice}"
        for question, choices in zip(questions, documents.choices, strict=True)
        for choice in choices
        if choice
    ]
    alone, together = (
        [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for texts in (questions, whole)
    )
    opening, offset = specials_of(tokenizer).opening, token_offset(tokenizer)
    choices, start = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    characters = np.array([[len(choice) for choice in each] for each in documents.choices], np.int32)
    for (row, place), ids in zip(np.argwhere(characters > 0), together, strict=True):
        kept = ids[-(data.seq_len - len(opening)) :]
        tokens = [*opening, *(number + offset for number in kept)]
        choices[row, place, : len(tokens)] = tokens
        start[row, place] = max(len(tokens) - (len(ids) - len(alone[row])), 1)
    answer = np.array(documents.labels, np.int32)
    every = np.arange(shape[0])
    rows = dict(
        tokens=choices[every, answer], tokens_start=start[every, answer], choices=choices, start=start,
        characters=characters, labels=answer,
    )  # fmt: skip
    return rows, every.astype(np.int32)


def num_outputs(label_names: tuple[str, ...], vocab_size: int) -> int:
    """Returns the size of the vocabulary."""
    return vocab_size


def each_token(
    logits: Float[Array, "rows tokens vocabulary"],
    tokens: Int[AnyArray, "rows tokens"],
    start: Int[AnyArray, " rows"],
) -> tuple[Float[Array, "rows tokens-1"], Bool[Array, "rows tokens-1"]]:
    """Returns the cross-entropy of each next token, and whether it is one of the answer."""
    target = tokens[:, 1:]
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], target)
    return each, (target != 0) & (jnp.arange(1, tokens.shape[1]) >= start[:, None])


def loss(logits: Float[Array, "batch tokens vocabulary"], batch: Batch) -> tuple[Array, Array]:
    """Returns the mean cross-entropy of the right answers' tokens, and over how many."""
    each, real = each_token(logits, batch["tokens"], batch["tokens_start"])
    count = jnp.sum(real, dtype=jnp.float32)
    return jnp.sum(each * real) / jnp.maximum(count, 1), count


def asked(batch: Batch) -> Batch:
    """Returns the batch that the model reads: every question with every choice, [B * C, T]."""
    return {"tokens": batch["choices"].reshape(-1, batch["choices"].shape[-1])}


def score(
    logits: Float[Array, "rows tokens vocabulary"], batch: Batch, weight: Float[Array, " batch"]
) -> dict[str, Ratio]:
    """Returns `acc` and `acc_norm` over questions, and the loss over the right answers' tokens, by weight."""
    each, real = each_token(logits, asked(batch)["tokens"], batch["start"].reshape(-1))
    likelihood = -jnp.sum(each * real, axis=-1).reshape(batch["start"].shape)
    characters, label = batch["characters"], batch["labels"]
    count = jnp.sum(real, axis=-1).reshape(characters.shape)

    def share_right(value: Array) -> Ratio:
        answer = jnp.argmax(jnp.where(characters > 0, value, NEVER), axis=-1)
        return Ratio(jnp.sum((answer == label) * weight), jnp.sum(weight))

    def of_right(value: Array) -> Array:
        return jnp.take_along_axis(value, label[:, None], axis=1)[:, 0]

    total = -jnp.sum(jnp.where(weight > 0, of_right(likelihood) * weight, 0.0))
    return {
        "acc": share_right(likelihood),
        "acc_norm": share_right(likelihood / jnp.maximum(characters, 1)),
        "loss": Ratio(total, jnp.sum(of_right(count) * weight)),
    }


def by_length(rows: Batch) -> list[Batch]:
    """Returns the rows in parts by the length of their longest text, cut to T, T / 2, T / 4, ... tokens."""
    needed = np.max(np.sum(rows["choices"] != 0, axis=-1), axis=-1)
    length, parts = rows["choices"].shape[-1], []
    while len(needed):
        shorter = length // 2 if length // 2 >= SHORTEST else 0
        inside = needed > shorter
        if inside.any():
            part = {name: values[inside] for name, values in rows.items()}
            parts.append(part | {name: part[name][..., :length] for name in ("choices", "tokens")})
        rows, needed = {name: values[~inside] for name, values in rows.items()}, needed[~inside]
        length = shorter
    return parts


def most_frequent(train: Batch, test: Batch) -> float:
    """Returns the test accuracy of always giving the most frequent place of a right answer."""
    return float(np.mean(test["labels"] == np.bincount(train["labels"]).argmax()))


multiple_choice = Task(
    prepare, "token", num_outputs, loss, score, ("acc", "acc_norm"), "acc", most_frequent,
    baseline_name="most frequent place",
    asked=asked,
    by_length=by_length,
)  # fmt: skip
tasks.register("multiple_choice")(multiple_choice)
