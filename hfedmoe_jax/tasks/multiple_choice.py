"""Multiple choice: the answer is the choice that is likeliest after the question.

Training is on the tokens of right answers after their questions. Scores are those of lm-evaluation-harness:
`acc` takes the choice of the largest log-likelihood, `acc_norm` of the largest one over the characters of its
answer. The model reads one question and choice a row, and returns logits [B, T, vocabulary].

Axes: D questions, B batch of them, C choices, T tokens.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.data.choices import LETTERS
from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.data.tokenizers import specials_of, token_offset
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.ranges import check_bytes
from hfedmoe_jax.tasks.task import Batch, Ratio, Task, tasks

SHORTEST = 32  # tokens that the rows of an evaluation are cut to at least
NEVER = -1e30  # score of what is no choice
TEXT, CHOICES = "{}", "{choices}"  # places in a prompt


def prepare(
    tokenizer: Tokenizer,
    documents: Documents,
    labels: Any,
    label_names: Sequence[str],
    data: ConfigDict,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns a row a question, and its index.

    A text that is too long loses its beginning. The question is what `data.prompt` makes of the text; a space
    and an answer follow: the text of a choice, or its letter if the prompt lists the choices.

    Returns:
      `choices` [D, C, T], the question with each of its choices, 0 for padding; `start` [D, C], where the
      answer begins; `characters` [D, C], of the answer, 0 for no choice; `labels` [D], the right choice;
      `tokens` [D, T] and `tokens_start` [D], those of the right one.

    Raises:
      InputError: the source has no choices, `data.prompt` has no place for the text or an unknown one, there
        are more choices than letters, or the arrays are too large.
    """
    if documents.choices is None:
        problem = "is empty, and task.name=multiple_choice asks for choices"
        raise InputError(
            "data.choices_column", data.choices_column, problem, "name the column of the choices"
        )
    shape = len(documents.texts), max(map(len, documents.choices)), data.seq_len
    check_prompt(data.prompt, shape[1])
    what = f"{shape[0]:,} questions of {shape[1]} choices are"
    check_bytes("data.seq_len", data.seq_len, what, 4.0 * np.prod(shape), "use fewer tokens a choice")
    prompt = data.prompt.replace(r"\n", "\n")  # as it is written on a command line
    pairs = [worded(prompt, *each) for each in zip(documents.texts, documents.choices, strict=True)]
    questions, answers = [question for question, _ in pairs], [its_answers for _, its_answers in pairs]
    whole = [
        f"{question} {answer}"
        for question, its_answers in zip(questions, answers, strict=True)
        for answer in its_answers
        if answer
    ]
    alone, together = (
        [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for texts in (questions, whole)
    )
    opening, offset = specials_of(tokenizer).opening, token_offset(tokenizer)
    choices, start = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    characters = np.array([[len(answer) for answer in each] for each in answers], np.int32)
    for (row, place), ids in zip(np.argwhere(characters > 0), together, strict=True):
        kept = ids[-(data.seq_len - len(opening)) :]
        tokens = [*opening, *(number + offset for number in kept)]
        choices[row, place, : len(tokens)] = tokens
        start[row, place] = max(len(tokens) - (len(ids) - len(alone[row])), 1)
    right = np.array(documents.labels, np.int32)
    every = np.arange(shape[0])
    rows = dict(
        tokens=choices[every, right], tokens_start=start[every, right], choices=choices, start=start,
        characters=characters, labels=right,
    )  # fmt: skip
    return rows, every.astype(np.int32)


def check_prompt(prompt: str, num_choices: int) -> None:
    """Raises InputError for a prompt that no question can be put into."""
    remedy = r"use e.g. 'Question: {}\nAnswer:'"
    if TEXT not in prompt:
        raise InputError("data.prompt", prompt, "has no {}, the place of the question", remedy)
    unknown = set(re.findall(r"\{\w+\}", prompt)) - {CHOICES}
    if unknown:
        problem = f"has {min(unknown)}, and the places there are are {TEXT} and {CHOICES}"
        raise InputError("data.prompt", prompt, problem, "name columns in data.text_column")
    if CHOICES in prompt and num_choices > len(LETTERS):
        problem = f"lists the choices by letter, and a question has {num_choices} of them"
        raise InputError("data.prompt", prompt, problem, remedy)


def worded(prompt: str, text: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """Returns a question as the model reads it, and an answer a choice, empty where there is none.

    >>> worded("{}", "One and one is", ["two", "three"])
    ('One and one is', ['two', 'three'])
    >>> worded("{}|{choices}|Answer:", "1 + 1?", ["2", "3", ""])
    ('1 + 1?|A. 2\\nB. 3|Answer:', ['A', 'B', ''])
    """
    letters = [letter if choice else "" for letter, choice in zip(LETTERS, choices, strict=False)]
    listed = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False) if choice]
    values = {TEXT: text.strip(), CHOICES: "\n".join(listed)}
    question = re.sub(r"\{\}|\{choices\}", lambda place: values[place[0]], prompt)
    return question.rstrip(" "), letters if CHOICES in prompt else list(choices)


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
