import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_jax import data as d
from hfedmoe_jax.data import from_json, num_rows
from hfedmoe_jax.data.splits import cut_holdout, split_documents
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks import classification

TOPICS = {
    "animals": "cat dog horse mouse tiger whale heron otter",
    "food": "bread cheese apple crème soup naïve rice Äpfel",
    "sky": "moon star comet cloud rain 日本 snow wind",
}


def topic_rows(per_topic, prefix=""):
    """Returns rows of distinct texts of growing length, three labels, five owners."""
    return [
        {
            "text": f"{prefix}{number} " + " ".join((words.split() * 4)[: 1 + number % 30]),
            "label": topic,
            "user": f"user{number % 5}",
        }
        for topic, words in TOPICS.items()
        for number in range(per_topic)
    ]


@pytest.fixture
def corpus_file(write_rows):
    return write_rows(topic_rows(24))


def load_federated(config):
    return d.load_federated(config, classification.prepare)


def read_back(data, tokens):
    """Returns the text of passages; `bpe` loses nothing."""
    tokenizer = from_json(data.tokenizer_json)
    return [tokenizer.decode(row[row > 2].tolist()) for row in tokens]


def error_of(config):
    with pytest.raises(InputError) as caught:
        load_federated(config)
    assert "\n" not in str(caught.value)
    return caught.value


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(one, other)


def equal_fields(one, other):
    names = [field.name for field in dataclasses.fields(one)]
    return {name for name in names if same(getattr(one, name), getattr(other, name))}


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    validation_fraction=st.floats(0, 0.6),
    test_fraction=st.floats(0, 0.39),
    seed=st.integers(0, 100),
)
def test_splits_cover_by_label(counts, validation_fraction, test_fraction, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    fractions = (validation_fraction, test_fraction)
    splits = split_documents(labels, *fractions, np.random.default_rng(seed))
    assert sorted(np.concatenate(splits).tolist()) == list(range(len(labels)))
    for label, count in enumerate(counts):
        in_train, *in_others = (int((labels[split] == label).sum()) for split in splits)
        assert in_train >= 1
        for fraction, cut in zip(fractions, in_others, strict=True):
            assert (cut > 0) == (count >= 3 and fraction > 0)
            # Rounding, and the one document each that training and the test split must keep.
            assert cut <= max(1, round(count * fraction))
            if count >= 20 and sum(fractions) < 0.8:
                assert abs(cut - count * fraction) <= 1


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 100))
def test_holdout_is_cut_from_a_clients_own(count, fraction, seed):
    documents = np.arange(count) * 3
    kept, held = cut_holdout(documents, fraction, np.random.default_rng(seed))
    assert len(kept) and len(held)
    if count == 1:
        assert kept.tolist() == held.tolist() == [0]
    else:
        assert sorted([*kept, *held]) == documents.tolist()
        assert len(held) == min(max(1, round(count * fraction)), count - 1)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "column"])
@pytest.mark.parametrize("tokenizer", ["wordpiece", "bpe"])
def test_the_whole_way(make_config, corpus_file, name, tokenizer):
    config = make_config(
        train_path=corpus_file, tokenizer=tokenizer, client_column="user", partition={"name": name}
    )
    data = load_federated(config)
    assert data.label_names == ("animals", "food", "sky")
    assert (data.facts.copies, data.facts.left_out, data.facts.moved) == (0, {}, 0)
    assert data.facts.label_counts == {"animals": 24, "food": 24, "sky": 24}
    assert data.vocab_size == from_json(data.tokenizer_json).get_vocab_size() <= 300
    for examples in (data.train, data.validation, data.test):
        assert examples["tokens"].dtype == examples["labels"].dtype == np.int32
        assert examples["tokens"].shape == (len(examples["labels"]), 8)
        assert (examples["tokens"][:, 0] == 2).all() and examples["tokens"].max() < data.vocab_size
        assert set(examples["labels"].tolist()) == {0, 1, 2}
    assert len(data.client_train) == len(data.client_holdout) == len(data.client_names) == 4
    rows = np.concatenate([*data.client_train, *data.client_holdout])
    assert sorted(rows.tolist()) == list(range(num_rows(data.train)))
    assert all((np.diff(part) > 0).all() for part in data.client_train + data.client_holdout)


def test_no_document_is_in_two_places(make_config, corpus_file):
    # Every text starts with a number that is its own within its label.
    config = make_config(train_path=corpus_file, tokenizer="bpe", seq_len=200)
    data = load_federated(config)
    assert num_rows(data.train) + num_rows(data.validation) + num_rows(data.test) == 72
    places = [
        data.train["tokens"][np.sort(np.r_[mine, held])]
        for mine, held in zip(data.client_train, data.client_holdout, strict=True)
    ]
    texts = [read_back(data, tokens) for tokens in (*places, data.validation["tokens"], data.test["tokens"])]
    everything = [text for place in texts for text in place]
    assert len(everything) == 72
    assert sorted(everything) == sorted(row["text"] for row in topic_rows(24))
    words = {label: set(words.split()) for label, words in TOPICS.items()}
    for examples in (data.train, data.validation, data.test):
        for text, label in zip(read_back(data, examples["tokens"]), examples["labels"], strict=True):
            assert set(text.split()[1:]) <= words[data.label_names[label]]


def test_passages_of_a_document_stay_together(make_config, write_rows):
    rows = [{"text": f"{label}{n}" * 40, "label": label} for label in "xy" for n in range(20)]
    path = write_rows(rows)
    data = load_federated(
        make_config(train_path=path, tokenizer="bpe", seq_len=12, partition={"name": "iid"})
    )
    assert num_rows(data.train) > 60
    owner = {}
    for place, parts in enumerate(data.client_train + data.client_holdout):
        for text in read_back(data, data.train["tokens"][parts]):
            for row in rows:
                if len(text) > 6 and text in row["text"]:
                    assert owner.setdefault(row["text"], place) == place
    assert len(owner) == 28


def test_equal_configs_give_equal_data(make_config, corpus_file):
    fields = {"train_path": corpus_file}
    one, other = load_federated(make_config(**fields)), load_federated(make_config(**fields))
    assert equal_fields(one, other) == {field.name for field in dataclasses.fields(one)}
    assert "train" not in equal_fields(one, load_federated(make_config(seed=1, **fields)))
    # The partition has a stream of its own: the documents stay in their splits.
    iid = load_federated(make_config(partition={"name": "iid"}, **fields))
    assert equal_fields(one, iid) >= {"train", "validation", "test", "tokenizer_json"}
    assert "client_train" not in equal_fields(one, iid)


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_have_their_own_clients_passages_and_no_others(make_config, corpus_file, hosts):
    data = load_federated(make_config(train_path=corpus_file))
    parts = [data.of_host(host, hosts) for host in range(hosts)]
    assert sum(num_rows(part.train) for part in parts) == num_rows(data.train)
    for client, (train, held) in enumerate(zip(data.client_train, data.client_holdout, strict=True)):
        for host, part in enumerate(parts):
            mine = host == client % hosts
            for rows, own in ((train, part.client_train[client]), (held, part.client_holdout[client])):
                np.testing.assert_array_equal(
                    part.train["tokens"][own], data.train["tokens"][rows if mine else []]
                )
                np.testing.assert_array_equal(
                    part.train["labels"][own], data.train["labels"][rows if mine else []]
                )


def test_the_seed_moves_partition_and_holdout(make_config, corpus_file):
    # The labels of the training documents are the same for any seed, and iid looks at nothing else.
    def load(seed, clients):
        fields = {"train_path": corpus_file, "seq_len": 200, "partition": {"name": "iid"}}
        return load_federated(make_config(seed=seed, clients=clients, **fields))

    def own(data):
        return [{*mine, *held} for mine, held in zip(data.client_train, data.client_holdout, strict=True)]

    one, other = load(0, clients=3), load(1, clients=3)
    assert np.array_equal(one.train["labels"], other.train["labels"])
    assert own(one) != own(other)
    one, other = load(0, clients=1), load(1, clients=1)
    assert own(one) == own(other)
    assert not same(one.client_holdout, other.client_holdout)


def test_the_tokenizer_sees_training_documents_only(make_config, write_rows):
    rows = topic_rows(12)
    test = [{"text": "quetzalcoatl " * 9 + str(number), "label": "sky"} for number in range(9)]
    config = make_config(train_path=write_rows(rows), test_path=write_rows(test, "test.jsonl"))
    data = load_federated(config)
    vocabulary = from_json(data.tokenizer_json).get_vocab()
    assert "q" not in vocabulary and "##q" not in vocabulary


def test_texts_that_wordpiece_cannot_read_are_refused(make_config, write_rows):
    unspaced = [{"text": "ภาษาไทย" * 20 + str(n), "label": n % 2} for n in range(40)]
    error = error_of(make_config(train_path=write_rows(unspaced)))
    assert error.field == "data.tokenizer" and "100% of the training texts" in str(error)
    assert "data.tokenizer=bpe" in str(error)
    assert (
        load_federated(make_config(train_path=write_rows(unspaced), tokenizer="bpe")).facts.unknown_share == 0
    )


def test_the_share_of_unknown_characters(make_config, write_rows):
    """One word in 101 is [UNK], but a third of all characters."""
    rows = [{"text": f"{'at ' * 100}{'b' * 101}{' ' * n}", "label": n % 2} for n in range(40)]
    for long_text in ("split", "truncate"):  # the end is cut off
        config = make_config(train_path=write_rows(rows), seq_len=64, long_text=long_text)
        share = 0 if long_text == "truncate" else 101 / 301
        assert load_federated(config).facts.unknown_share == pytest.approx(share)


def test_a_text_without_spaces_among_short_words_counts_by_its_length(make_config, write_rows):
    """Every fourth text is one [UNK] of 120 characters; the others are of six words of a letter."""
    rows = [
        {"text": "ไทย" * 40 + "า" * n if n % 4 == 0 else f"{'a b c ' * 2}{' ' * n}", "label": n // 4 % 2}
        for n in range(80)
    ]
    error = error_of(make_config(train_path=write_rows(rows)))
    assert error.field == "data.tokenizer" and "so many of their characters" in str(error)


def test_natural_clients(make_config, write_rows):
    path = write_rows(topic_rows(30))
    fields = {"train_path": path, "client_column": "user", "partition": {"name": "column"}}
    data = load_federated(make_config(clients=5, **fields))
    assert data.client_names == ("user0", "user1", "user2", "user3", "user4")
    data = load_federated(make_config(clients=2, **fields, tokenizer="bpe", seq_len=200))
    assert data.client_names == ("user0 (+2 more)", "user1 (+1 more)")
    for client, parity in ((0, {0, 2, 4}), (1, {1, 3})):
        rows = np.r_[data.client_train[client], data.client_holdout[client]]
        numbers = {int(text.split()[0]) % 5 for text in read_back(data, data.train["tokens"][rows])}
        assert numbers == parity
    assert error_of(make_config(clients=6, **fields)).field == "fl.clients"
    assert load_federated(make_config(clients=11, train_path=path)).client_names[:2] == (
        "client_00",
        "client_01",
    )


def test_a_client_of_one_document(make_config, write_rows):
    path = write_rows(topic_rows(4))
    data = load_federated(make_config(clients=6, train_path=path, seq_len=200))
    assert num_rows(data.train) == 6
    for mine, held in zip(data.client_train, data.client_holdout, strict=True):
        assert mine.tolist() == held.tolist() and len(mine) == 1


def test_rare_labels_and_empty_texts(make_config, write_rows):
    rows = [*topic_rows(6), {"text": "", "label": "rare"}, {"text": "only one", "label": "unique"}]
    data = load_federated(make_config(train_path=write_rows(rows)))
    assert data.label_names == ("animals", "food", "rare", "sky", "unique")
    assert set(data.train["labels"].tolist()) == set(range(5))
    assert set(data.test["labels"].tolist()) == set(data.validation["labels"].tolist()) == {0, 1, 3}
    assert data.train["tokens"][data.train["labels"] == 2].tolist() == [[2, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "field, value, part",
    [
        ("data.validation_fraction", -0.1, "at least 0"),
        ("data.validation_fraction", float("nan"), "at least 0"),
        ("data.test_fraction", 1.0, "below 1"),
        ("data.test_fraction", 0.0, "separate test set"),
        ("data.test_fraction", 0.9, "nothing is left"),
        ("data.holdout_fraction", 0.0, "above 0"),
        ("data.seq_len", 1, "at least 2"),
        ("data.vocab_size", 5, "too small"),
        ("data.tokenizer", "word", "unknown"),
        ("data.long_text", "cut", "unknown"),
        ("data.source", "fyle", "'file'"),
        ("partition.name", "even", "unknown"),
        ("partition.alpha", -1.0, "above 0"),
        ("fl.clients", 0, "at least 1"),
        ("fl.clients", 500, "only 48 training documents"),
        ("seed", -1, "negative"),
    ],
)
def test_errors_name_field_and_value(make_config, corpus_file, field, value, part):
    config = make_config(train_path=corpus_file)
    config.update_from_flattened_dict({field: value})
    error = error_of(config)
    assert error.field == field and (error.value == value or value != value)
    assert part in str(error) and str(error).startswith(f"{field}={value!r}: ")


def test_bbc_news_by_default(make_config):
    data = load_federated(make_config(clients=20, source="bbc_news", vocab_size=8192, seq_len=64))
    assert data.facts.copies == 0 and sum(data.facts.label_counts.values()) == 2127
    assert data.vocab_size == 8192 and len(data.label_names) == 5
    assert 10_000 < num_rows(data.train) < 15_000
    shares = [len(examples["labels"]) / num_rows(data.train) for examples in (data.validation, data.test)]
    assert all(0.15 < share < 0.3 for share in shares)
