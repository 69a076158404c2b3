"""Loss and scores of a classification against NumPy in float64."""

import functools

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from configs.hfedmoe import get_config
from hfedmoe_jax.data import train_tokenizer
from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.tasks import classification, tasks

score, loss = jax.jit(classification.score), jax.jit(classification.loss)


@st.composite
def judged(draw):
    """Draws logits [6, 4], labels and weights, some of them zero, but not all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (draw(st.sampled_from([0.1, 1.0, 30.0])) * rng.standard_normal((6, 4))).astype(np.float32)
    weight = rng.integers(0, 3, 6).astype(np.float32)
    return logits, {"labels": rng.integers(0, 4, 6).astype(np.int32)}, np.append(weight[:5], np.float32(1))


def each_loss(logits, labels):
    logits = logits.astype(np.float64)
    return (
        np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
        + logits.max(1)
        - logits[np.arange(6), labels]
    )


@given(judged())
def test_sums_are_those_of_numpy(drawn):
    logits, batch, weight = drawn
    each, right = each_loss(logits, batch["labels"]), logits.argmax(axis=1) == batch["labels"]
    mean, count = loss(logits, batch)
    close = functools.partial(
        np.testing.assert_allclose, rtol=1e-5, atol=1e-5
    )  # losses near 0 are differences
    close((mean, count), (each.mean(), 6))
    found = score(logits, batch, weight)
    assert set(found) == {"loss", *classification.scores} and classification.metric in classification.scores
    close(found["loss"], (each @ weight, weight.sum()))
    np.testing.assert_array_equal(found["accuracy"], (right @ weight, weight.sum()))


@given(judged(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_a_padded_example_comes_to_does_not_matter(drawn, value):
    logits, batch, weight = drawn
    poisoned = np.where(weight[:, None] > 0, logits, np.float32(value))
    jax.tree.map(np.testing.assert_array_equal, score(poisoned, batch, weight), score(logits, batch, weight))


def test_a_text_becomes_passages_with_its_label():
    config = get_config().data
    config.seq_len = 4
    texts = ["a b a b a b a", "b", ""]
    tokenizer = train_tokenizer(texts, config.tokenizer, config.vocab_size)
    names = ("x", "y", "z")
    documents = Documents(texts, ["z", "x", "y"], None)
    rows, document = classification.prepare(tokenizer, documents, np.int64([2, 0, 1]), names, config)
    assert document.tolist() == sorted(document.tolist()) and set(document.tolist()) == {0, 1, 2}
    assert rows["labels"].dtype == np.int32 and rows["labels"].tolist() == [(2, 0, 1)[d] for d in document]
    assert rows["tokens"].shape == (len(document), 4)
    assert classification.num_outputs(names, 99) == 3


def test_the_baseline_answers_with_the_label_that_training_has_most():
    train, test = {"labels": np.array([1, 1, 0, 2, 1])}, {"labels": np.array([1, 0, 0, 2])}
    assert classification.baseline(train, test) == 0.25


def test_it_is_in_the_table():
    assert tasks["classification"] is classification
