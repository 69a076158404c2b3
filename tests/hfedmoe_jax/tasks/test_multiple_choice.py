"""Multiple choice against a loop over questions, choices and tokens, as lm-evaluation-harness goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from hfedmoe_jax.data.columns import Documents
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks import multiple_choice

OFFSET = 1  # token 0 of the tokenizer is a letter
MERGED = ["Ġa", "Ġb"]


def letters_tokenizer():
    """Byte-level: "c a" has the tokens "c" and "Ġa"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, *MERGED])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def prepare(texts, choices, labels, seq_len=24, prompt=r"Q:{}\nA:"):
    documents = Documents(texts, [str(label) for label in labels], None, choices)
    data = ConfigDict(dict(seq_len=seq_len, prompt=prompt, choices_column="choices"))
    return multiple_choice.prepare(letters_tokenizer(), documents, np.array(labels), (), data)


def test_rows_hold_the_prompt_each_choice_and_where_it_begins():
    choices = [["abc", "b", ""], ["a b", "cc", "d"]]
    rows, document = prepare(["why", "how so"], choices, [1, 2])
    assert document.tolist() == [0, 1] and rows["labels"].tolist() == [1, 2]
    assert rows["characters"].tolist() == [[3, 1, 0], [3, 2, 1]]
    for question, text in enumerate(("why", "how so")):
        for place, choice in enumerate(choices[question]):
            tokens, start = rows["choices"][question, place], rows["start"][question, place]
            if not choice:
                assert not tokens.any() and start == 0
                continue
            ids = letters_tokenizer().encode(f"Q:{text}\nA: {choice}").ids
            assert (tokens[: len(ids)] - OFFSET).tolist() == ids and not tokens[len(ids) :].any()
            assert start == len(f"Q:{text}\nA:")  # a token a letter, and Ġa is the answer's first
    for row in range(2):
        np.testing.assert_array_equal(rows["tokens"][row], rows["choices"][row, rows["labels"][row]])
        assert rows["tokens_start"][row] == rows["start"][row, rows["labels"][row]]


def test_a_long_text_loses_its_beginning_and_a_space_before_the_answer_is_its_own():
    (rows, _), (spaced, _) = (prepare(["x" * 40], [["abc", "d"]], [0], 10, p) for p in ("{}\nA:", "{}\nA: "))
    for each in (rows, spaced):
        ids = letters_tokenizer().encode("xxxx\nA: abc").ids[-10:]
        assert (each["choices"][0, 0] - OFFSET).tolist() == ids and each["start"][0, 0] == 10 - 3
    # Of an answer longer than the row the first token has nothing before it, so it is not scored.
    rows, _ = prepare(["x"], [["c" * 40, "d"]], [0], 10)
    assert rows["start"][0].tolist()[0] == 1


def test_a_prompt_with_the_choices_is_answered_by_letters():
    rows, _ = prepare(["why {} "], [["a {choices}", "cc", ""]], [1], 64, r"{}\n{choices}\nA:")
    assert rows["characters"].tolist() == [[1, 1, 0]]
    asked = "why {}\nA. a {choices}\nB. cc\nA:"  # what stands in a text or a choice is no place
    for place, letter in enumerate("AB"):
        tokens = rows["choices"][0, place]
        ids = letters_tokenizer().encode(f"{asked} {letter}").ids
        assert (tokens[tokens != 0] - OFFSET).tolist() == ids
        assert rows["start"][0, place] == len(ids) - 2
    assert not rows["choices"][0, 2].any()
    np.testing.assert_array_equal(rows["tokens"][0], rows["choices"][0, 1])


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_letters_are_scored_as_by_hand(seed):
    """The likeliest letter after the listed choices; divided by its one character it is the same."""
    rng = np.random.default_rng(seed)
    counts, length, vocabulary = rng.integers(2, 5, 4), 48, letters_tokenizer().get_vocab_size() + OFFSET
    choices = [["abcd"[place] * 3 if place < count else "" for place in range(4)] for count in counts]
    labels = rng.integers(counts)
    rows, _ = prepare([f"q{row}" for row in range(4)], choices, labels, length, r"{}\n{choices}\nAnswer:")
    logits = rng.normal(size=(16, length, vocabulary)).astype(np.float32)
    right = 0
    for row, count in enumerate(counts):
        listed = "".join(f"{'ABCD'[place]}. {choices[row][place]}\n" for place in range(count))
        found = []
        for place in range(count):
            ids = letters_tokenizer().encode(f"q{row}\n{listed}Answer: {'ABCD'[place]}").ids
            total = 0.0
            for t in (len(ids) - 2, len(ids) - 1):  # the space and the letter
                before = logits[4 * row + place, t - 1].astype(np.float64)
                total += before[ids[t] + OFFSET] - np.log(np.exp(before).sum())
            found.append(total)
        right += int(np.argmax(found)) == labels[row]
    scores = multiple_choice.score(jnp.asarray(logits), rows, jnp.ones(4))
    assert float(scores["acc"].total) == float(scores["acc_norm"].total) == right


def test_without_choices_or_a_place_for_the_question_it_is_refused():
    with pytest.raises(InputError, match=r"data\.choices_column"):
        prepare(["a"], None, [0])
    with pytest.raises(InputError, match=r"data\.prompt.*has no \{\}"):
        prepare(["a"], [["a", "b"]], [0], prompt="Question:")
    with pytest.raises(InputError, match=r"data\.prompt.*has \{ctx\}, .*data\.text_column"):
        prepare(["a"], [["a", "b"]], [0], prompt="{} {ctx}")
    with pytest.raises(InputError, match=r"data\.prompt.*by letter, and a question has 27"):
        prepare(["a"], [["a"] * 27], [0], prompt="{} {choices}")


def drawn(seed, questions=5, choices=4, length=9, vocabulary=7):
    """Returns rows of questions with two to four choices, and logits of every one."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((questions, choices, length), np.int32)
    start, characters = np.zeros((2, questions, choices), np.int32)
    labels = np.zeros(questions, np.int32)
    for question in range(questions):
        count = rng.integers(2, choices + 1)
        labels[question] = rng.integers(count)
        for place in range(count):
            size = rng.integers(3, length + 1)
            tokens[question, place, :size] = rng.integers(1, vocabulary, size)
            start[question, place] = rng.integers(1, size)
            characters[question, place] = rng.integers(1, 20)
    every = np.arange(questions)
    rows = dict(choices=tokens, start=start, characters=characters, labels=labels,
                tokens=tokens[every, labels], tokens_start=start[every, labels])  # fmt: skip
    return rows, rng.normal(size=(questions * choices, length, vocabulary)).astype(np.float32)


def by_hand(rows, logits):
    """Returns each question's answer by either rule, and its right answer's log-likelihood and tokens."""
    questions, choices, _ = rows["choices"].shape
    plain, normed, right, counts = [], [], [], []
    for question in range(questions):
        found = []
        for place in range(choices):
            if not rows["characters"][question, place]:
                continue
            total, count = 0.0, 0
            for t, token in enumerate(rows["choices"][question, place]):
                if token and t >= rows["start"][question, place]:
                    before = logits[question * choices + place, t - 1].astype(np.float64)
                    total += before[token] - np.log(np.exp(before).sum())
                    count += 1
            found.append((total, total / rows["characters"][question, place], count))
        plain.append(int(np.argmax([each[0] for each in found])))
        normed.append(int(np.argmax([each[1] for each in found])))
        right.append(found[rows["labels"][question]][0])
        counts.append(found[rows["labels"][question]][2])
    return np.array(plain), np.array(normed), np.array(right), np.array(counts)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_scores_are_those_of_a_loop(seed):
    rows, logits = drawn(seed)
    weight = (np.arange(5) != 2).astype(np.float32)
    scores = multiple_choice.score(jnp.asarray(logits), rows, jnp.asarray(weight))
    plain, normed, right, counts = by_hand(rows, logits)
    for name, answer in (("acc", plain), ("acc_norm", normed)):
        assert float(scores[name].total) == np.sum((answer == rows["labels"]) * weight)
        assert float(scores[name].count) == weight.sum()
    assert float(scores["loss"].total) == pytest.approx(-np.sum(right * weight), rel=1e-5)
    assert float(scores["loss"].count) == np.sum(counts * weight)


def test_training_learns_the_right_answers_tokens_alone():
    """The loss is the score's, and logits before the question's tokens have no gradient."""
    rows, logits = drawn(3)
    of_right = jnp.asarray(logits.reshape(5, 4, 9, 7)[np.arange(5), rows["labels"]])
    loss, count = multiple_choice.loss(of_right, rows)
    score = multiple_choice.score(jnp.asarray(logits), rows, jnp.ones(5))["loss"]
    assert float(loss) == pytest.approx(float(score.total / score.count), rel=1e-5)
    assert float(count) == float(score.count)
    gradient = np.asarray(jax.grad(lambda x: multiple_choice.loss(x, rows)[0])(of_right))
    for question in range(5):
        position = np.arange(9) + 1  # of the token that a logit is for
        tokens = np.append(rows["tokens"][question][1:], 0)
        learnt = (position >= rows["tokens_start"][question]) & (tokens != 0)
        assert np.array_equal(np.abs(gradient[question]).sum(-1) > 0, learnt)


def test_rows_by_length_are_all_rows_once_with_all_their_tokens():
    rows, _ = drawn(1, questions=40, length=128)
    rows["choices"][::2, :, 30:] = 0
    rows["tokens"] = rows["choices"][np.arange(40), rows["labels"]]
    parts = multiple_choice.by_length(rows)
    assert [part["choices"].shape[-1] for part in parts] == [128, 64, 32][: len(parts)] and len(parts) > 1
    assert sum(len(part["labels"]) for part in parts) == 40
    for name in rows:
        totals = [sum(np.sum(part[name]) for part in parts), np.sum(rows[name])]
        assert totals[0] == totals[1]
    for part in parts:
        assert part["tokens"].shape[-1] == part["choices"].shape[-1]
