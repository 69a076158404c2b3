"""Classification as text to text: the name of a text's class is the answer that a decoder is given.

The loss is the mean cross-entropy of the right answer's tokens in nats. In evaluation the class is that whose
name is likeliest; documents are answered from all of their passages, as in `classification`.

Axes: B batch, A tokens of an answer, C classes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.data.tokenizers import encode_passages, specials_of
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.answers import Answers, token_log_probs
from hfedmoe_jax.tasks.classification import majority_vote, score_documents
from hfedmoe_jax.tasks.task import Batch, Ratio, Task, tasks


def prepare(
    tokenizer: Tokenizer,
    documents: Documents,
    labels: Int[np.ndarray, " documents"],
    label_names: Sequence[str],
    data: ConfigDict,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns passages, and each one's document.

    Their arrays are `tokens` [N, T], `labels` [N], `choices` [N, C, A], the names of all classes, and
    `answers` [N, A], that of its own.

    Raises:
      InputError: two classes have names of the same tokens.
    """
    tokens, document = encode_passages(tokenizer, documents.texts, data.seq_len, data.long_text)
    names_ca = encode_answers(tokenizer, label_names)
    label = np.asarray(labels, np.int32)[document]
    choices = np.broadcast_to(names_ca, (len(tokens), *names_ca.shape))
    return {"tokens": tokens, "labels": label, "choices": choices, "answers": names_ca[label]}, document


def encode_answers(
    tokenizer: Tokenizer, label_names: Sequence[str]
) -> Int[np.ndarray, "classes answer_tokens"]:
    """Returns the tokens of the classes' names, with what the tokenizer puts around a text."""
    opening, closing, _ = specials_of(tokenizer)
    longest = max(len(tokenizer.encode(name, add_special_tokens=False).ids) for name in label_names)
    length = max(2, longest + len(opening) + len(closing))
    answers, _ = encode_passages(tokenizer, label_names, length, "truncate")
    for index, name in enumerate(label_names):
        first = int(np.argmax((answers == answers[index]).all(axis=1)))
        if first != index:
            problem = f"has the same tokens as {label_names[first]!r}, so that no answer tells them apart"
            remedy = "rename a class, or use task.name=classification"
            raise InputError("data.label_column", name, problem, remedy)
    return answers


def num_outputs(label_names: tuple[str, ...], vocab_size: int) -> int:
    """Returns the size of the vocabulary."""
    return vocab_size


def loss(output: Answers, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean cross-entropy, and over how many tokens."""
    count = jnp.sum(batch["answers"] != 0, dtype=jnp.float32)
    return -jnp.sum(token_log_probs(output.logits, batch["answers"])) / jnp.maximum(count, 1), count


def score(output: Answers, batch: Batch, weight: Float[Array, " batch"]) -> dict[str, Ratio]:
    """Returns the accuracy over examples, and the cross-entropy over tokens, by weight.

    An example is right if its class is the likeliest. In training, where no other answers are at hand, if
    each token of its own is the likeliest after those before it: if greedy decoding gives it.
    """
    real = batch["answers"] != 0
    if output.choices is None:
        right = jnp.all((jnp.argmax(output.logits, axis=-1) == batch["answers"]) | ~real, axis=-1)
    else:
        right = jnp.argmax(output.choices, axis=-1) == batch["labels"]
    counted = real & (weight > 0)[:, None]
    each = jnp.where(counted, token_log_probs(output.logits, batch["answers"]) * weight[:, None], 0.0)
    return {
        "accuracy": Ratio(jnp.sum(right * weight), jnp.sum(weight)),
        "loss": Ratio(-jnp.sum(each), jnp.sum(counted * weight[:, None])),
    }


def evidence(output: Answers, batch: Batch) -> Float[Array, "batch classes"]:
    """Returns the log-probabilities of the classes, if it is one of them."""
    assert output.choices is not None  # evidence is of evaluations
    return jax.nn.log_softmax(output.choices)


text_to_text = Task(
    prepare, "answer", num_outputs, loss, score, ("accuracy",), "accuracy", majority_vote,
    baseline_name="majority class",
    evidence=evidence,
    score_documents=score_documents,
    document_scores=("document_accuracy", "document_macro_f1"),
)  # fmt: skip
tasks.register("text_to_text")(text_to_text)
