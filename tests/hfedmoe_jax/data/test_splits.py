"""No text is in two splits, nothing else is lost, and every owner and label trains."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hfedmoe_jax.data import Corpus, Documents, from_json, load_federated
from hfedmoe_jax.data.splits import cut_own_texts, first_copies, split_corpus
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks import classification

FIELDS = {
    "source": "file",
    "text_column": "text",
    "label_column": "label",
    "validation_path": "",
    "test_path": "",
    "validation_fraction": 0.2,
    "test_fraction": 0.2,
}


def split(train, validation=None, test=None, seed=0, **fields):
    """Splits rows (text, label, owner); rows without owners have None."""

    def documents(rows):
        texts, labels, owners = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
        return Documents(texts, labels, None if None in owners else owners)

    corpus = Corpus(documents(train), test and documents(test), validation and documents(validation))
    return split_corpus(corpus, ConfigDict({"data": FIELDS | fields}), np.random.default_rng(seed))


def rows_of(documents):
    return list(zip(documents.texts, documents.labels, documents.clients or [], strict=True))


# Few texts, so that copies, shared replies and texts with several labels are many.
rows = st.lists(
    st.tuples(st.integers(0, 40).map(str), st.sampled_from("xy"), st.sampled_from("abcde")),
    min_size=2,
    max_size=80,
)


@settings(deadline=None)
@given(rows, st.integers(0, 50))
def test_no_text_is_in_two_splits_and_no_row_is_lost(train, seed):
    try:
        splits = split(train, seed=seed)
    except InputError:
        return
    parts = splits[:3]
    assert Counter(row for part in parts for row in rows_of(part)) == Counter(train)
    texts = [set(part.texts) for part in parts]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert set(splits.train.clients) == {owner for *_, owner in train}
    assert set(splits.train.labels) == {label for _, label, _ in train}
    assert splits.left_out == {}


@settings(deadline=None)
@given(rows, rows, rows)
def test_given_sets_stay_and_training_goes_without_their_texts(train, validation, test):
    try:
        splits = split(train, validation, test)
    except InputError:
        return
    texts = [set(part.texts) for part in splits[:3]]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert set(splits.train.clients) == {owner for *_, owner in train}
    given = {text for text, *_ in [*validation, *test]}
    assert [row for row in train if row[0] not in given] == [
        r for r in rows_of(splits.train) if r[0] not in given
    ]
    lost = len(train) + len(validation) + len(test) - sum(len(part.texts) for part in splits[:3])
    assert sum(splits.left_out.values()) == lost


def test_copies_of_training_texts_stay_and_those_of_the_test_set_go():
    train = [(f"t{n}", "xy"[n % 2], None) for n in range(20)]
    splits = split([*train, train[0], train[5], train[5]], test=[train[5], ("new", "x", None)])
    assert splits.test.texts == ["t5", "new"]
    assert splits.left_out == {"training: in the test set too": 3}
    assert Counter(splits.train.texts + splits.validation.texts) == Counter(
        [text for text, *_ in train if text != "t5"] + ["t0"]
    )


def test_an_owner_whose_texts_are_all_in_the_test_set_keeps_one():
    train = [(f"t{n}", "xy"[n % 2], "a") for n in range(20)] + [("thanks", "x", "b"), ("never", "y", "b")]
    splits = split(train, test=[("thanks", "x", None), ("never", "y", None), ("new", "x", None)])
    assert splits.test.texts == ["never", "new"]
    assert [row for row in rows_of(splits.train) if row[2] == "b"] == [("thanks", "x", "b")]
    assert splits.left_out == {
        "test: the only text of an owner in training": 1,
        "training: in the test set too": 1,
    }


def test_replies_that_owners_share_leave_every_owner_a_client(make_config, write_rows):
    replies = ["thanks a lot", "never again", "ok great", "bad service", "will come back", "waste of money"]
    train = [
        {"text": reply, "label": index % 2, "owner": f"owner{owner}"}
        for owner in range(10)
        for index, reply in enumerate(replies)
    ]
    train += [
        {"text": f"order {n} of {owner}", "label": n % 2, "owner": f"owner{owner}"}
        for owner in range(4)
        for n in range(12)
    ]
    config = make_config(
        train_path=write_rows(train),
        client_column="owner",
        tokenizer="bpe",
        clients=10,
        partition={"name": "column"},
    )
    data = load_federated(config, classification.prepare)
    assert data.client_names == tuple(f"owner{n}" for n in range(10)) and data.facts.owners == 10
    assert data.facts.copies == 54 and data.facts.left_out == {}
    assert sum(data.facts.label_counts.values()) == len(train)
    read = from_json(data.tokenizer_json).decode
    for owner, own in enumerate(data.client_train):
        texts = {read(row[row > 2].tolist()) for row in data.train["tokens"][own]}
        held = {read(row[row > 2].tolist()) for row in data.train["tokens"][data.client_holdout[owner]]}
        assert texts and not texts & held


def test_a_clients_copies_are_held_out_together():
    first = first_copies(["a", "b", "a", "c", "a", "d"])
    part = np.array([0, 2, 3, 4, 5])
    for seed in range(20):
        kept, held = cut_own_texts(part, first, 0.3, np.random.default_rng(seed))
        assert sorted([*kept, *held]) == part.tolist()
        assert not set(first[kept]) & set(first[held])
    kept, held = cut_own_texts(np.array([0, 2, 4]), first, 0.3, np.random.default_rng(0))
    assert kept.tolist() == held.tolist() == [0, 2, 4]


def test_a_label_that_only_copies_have_is_learned():
    train = [(f"a{number}", "x", None) for number in range(9)] + [("a0", "y", None)]
    for seed in range(10):
        splits = split(train, seed=seed)
        assert set(splits.train.labels) == {"x", "y"}


@pytest.mark.parametrize(
    "texts, labels, field, part",
    [
        (list("xy") * 20, list("xy") * 20, "data.text_column", "2 distinct texts in 40 rows"),
        (list("abcdefgh"), list("abcdefgh"), "data.label_column", "8 distinct labels for 8 texts"),
        (list("abcd"), list("xxyy"), "data.validation_fraction", "no label has 3 documents"),
    ],
)
def test_nothing_to_cut_is_blamed_on_the_column(texts, labels, field, part):
    with pytest.raises(InputError, match=part) as caught:
        split([(text, label, None) for text, label in zip(texts, labels, strict=True)])
    assert caught.value.field == field


def test_owners_of_one_document_each_leave_nothing_to_test():
    with pytest.raises(InputError, match="every document is the only one") as caught:
        split([(f"t{n}", "xy"[n % 2], f"owner{n}") for n in range(12)])
    assert caught.value.field == "data.validation_fraction" and "data.validation_path" in str(caught.value)
