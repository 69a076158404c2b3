"""Loss and scores of answers against NumPy in float64."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.hfedmoe import get_config
from hfedmoe_jax.data import train_tokenizer
from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.answers import Answers
from hfedmoe_jax.tasks import tasks, text_to_text

BATCH, TOKENS, VOCABULARY, CLASSES = 5, 4, 7, 3
score, loss = jax.jit(text_to_text.score), jax.jit(text_to_text.loss)


@st.composite
def judged(draw):
    """Draws logits, log-likelihoods of classes, a batch and weights, some of them zero, but not all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((BATCH, TOKENS, VOCABULARY)).astype(np.float32)
    answers = rng.integers(1, VOCABULARY, (BATCH, TOKENS)).astype(np.int32)
    answers[np.arange(TOKENS) >= rng.integers(1, TOKENS + 1, BATCH)[:, None]] = 0
    if draw(st.booleans()):  # the right answers are the likeliest
        logits[np.arange(BATCH)[:, None], np.arange(TOKENS), answers] += 9
    batch = {"answers": answers, "labels": rng.integers(0, CLASSES, BATCH).astype(np.int32)}
    choices = rng.standard_normal((BATCH, CLASSES)).astype(np.float32)
    weight = np.append(rng.integers(0, 3, BATCH - 1), 1).astype(np.float32)
    return Answers(logits, choices), batch, weight


@given(judged())
def test_sums_are_those_of_numpy(drawn):
    output, batch, weight = drawn
    logits = output.logits.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = count = mean = tokens = 0.0
    greedy = []
    for text, answer in enumerate(batch["answers"]):
        own = [log_probs[text, i, token] for i, token in enumerate(answer) if token]
        greedy.append(all(logits[text, i].argmax() == token for i, token in enumerate(answer) if token))
        total, count = total - weight[text] * sum(own), count + weight[text] * len(own)
        mean, tokens = mean - sum(own), tokens + len(own)
    np.testing.assert_allclose(loss(output, batch), (mean / tokens, tokens), rtol=1e-5, atol=1e-5)
    found = score(output, batch, weight)
    assert set(found) == {"loss", *text_to_text.scores}
    np.testing.assert_allclose(found["loss"], (total, count), rtol=1e-5, atol=1e-5)
    assert output.choices is not None
    right = output.choices.argmax(-1) == batch["labels"]
    np.testing.assert_array_equal(found["accuracy"], (right @ weight, weight.sum()))
    trained = score(output._replace(choices=None), batch, weight)
    np.testing.assert_array_equal(trained["accuracy"], (greedy @ weight, weight.sum()))


def test_a_text_has_the_names_of_all_classes_as_answers():
    config = get_config().data
    config.seq_len = 4
    names, texts = ("good day", "bad"), ["bad good day bad good", "day"]
    tokenizer = train_tokenizer([*names, *texts], config.tokenizer, config.vocab_size)
    rows, document = text_to_text.prepare(
        tokenizer, Documents(texts, ["bad", "good day"], None), np.int64([1, 0]), names, config
    )
    assert rows["choices"].shape == (len(document), 2, rows["answers"].shape[1])
    for label, answer, choices in zip(rows["labels"], rows["answers"], rows["choices"], strict=True):
        np.testing.assert_array_equal(answer, choices[label])
        assert tokenizer.decode([x for x in answer.tolist() if x > 2]) == names[label]
    assert rows["labels"].tolist() == [(1, 0)[d] for d in document]
    assert tasks["text_to_text"] is text_to_text


def test_classes_that_no_answer_tells_apart_are_refused():
    config = get_config().data
    tokenizer = train_tokenizer(["a b c"], config.tokenizer, config.vocab_size)
    with pytest.raises(InputError, match="'@': has the same tokens as '%'"):
        text_to_text.prepare(tokenizer, Documents(["a"], ["%"], None), np.int64([0]), ("%", "@"), config)
