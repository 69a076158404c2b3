import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hfedmoe_jax.data import Facts, FederatedData, holdout_batches, most_tokens, pad_batches, round_batches

COUNTS = (1, 3, 10, 40)


def numbered(count):
    """Returns rows that hold their own number, and another array of any shape."""
    tokens = np.full((count, 4), 2, np.int32)
    tokens[:, 1] = np.arange(count)
    labels = np.arange(count, dtype=np.int32) * 7
    return {"tokens": tokens, "labels": labels, "weights": np.ones((count, 2, 3), np.float32)}


def make_data():
    rows = np.random.default_rng(0).permutation(2 * sum(COUNTS))
    ends = np.cumsum([*COUNTS, *COUNTS])
    parts = tuple(np.sort(part) for part in np.split(rows, ends[:-1]))
    return FederatedData(
        train=numbered(len(rows)),
        validation=numbered(0),
        test=numbered(0),
        validation_document=np.arange(0),
        test_document=np.arange(0),
        client_train=parts[:4],
        client_holdout=parts[4:],
        label_names=(),
        client_names=(),
        vocab_size=0,
        tokenizer_json="",
        facts=Facts({}),
    )


DATA = make_data()
clients_strategy = st.lists(st.integers(0, 3), max_size=4, unique=True)


@settings(deadline=None)
@given(clients_strategy, st.integers(0, 50), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_epochs_without_replacement(clients, round_number, steps, batch_size, seed):
    batch = round_batches(DATA, np.array(clients, int), round_number, steps, batch_size, seed)
    tokens = batch["tokens"]
    leading = (len(clients), steps, batch_size)
    for name, values in DATA.train.items():
        assert batch[name].shape == (*leading, *values.shape[1:]) and batch[name].dtype == values.dtype
    assert np.array_equal(batch["labels"], tokens[..., 1] * 7)
    for client, client_tokens in zip(clients, tokens, strict=True):
        own = DATA.client_train[client].tolist()
        rows = client_tokens[..., 1].ravel().tolist()
        for start in range(0, len(rows), len(own)):
            epoch = rows[start : start + len(own)]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(own)
            if len(epoch) == len(own):
                assert sorted(epoch) == own


@settings(deadline=None)
@given(st.permutations(range(4)), st.integers(1, 4), st.integers(0, 50))
def test_a_client_sees_the_same_in_any_cohort(clients, size, round_number):
    cohort = np.array(clients[:size])
    together = round_batches(DATA, cohort, round_number, 3, 4, 5)
    for client, tokens in zip(cohort, together["tokens"], strict=True):
        alone = round_batches(DATA, np.array([client]), round_number, 3, 4, 5)
        assert np.array_equal(alone["tokens"][0], tokens)


def test_rounds_seeds_and_epochs_differ():
    def order(round_number, seed, steps=40):
        batch = round_batches(DATA, np.array([3]), round_number, steps, 1, seed)
        return batch["tokens"][0, :, 0, 1].tolist()

    assert len({tuple(order(number, seed)) for number in range(3) for seed in range(3)}) == 9
    two_epochs = order(0, 0, steps=80)
    assert two_epochs[:40] == order(0, 0) != two_epochs[40:]


def assert_padded(rows, batch, weight):
    """Fails unless rows of weight 1 are numbered ones, and those of weight 0 zeros throughout."""
    assert weight.dtype == np.float32 and set(weight.ravel().tolist()) <= {0.0, 1.0}
    for name, values in rows.items():
        assert batch[name].shape == (*weight.shape, *values.shape[1:]) and batch[name].dtype == values.dtype
        assert not batch[name][weight == 0].any()
        assert np.array_equal(batch[name][weight == 1], values[batch["tokens"][weight == 1][:, 1]])


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
def test_padding_is_zeros_that_weigh_nothing(count):
    rows = numbered(count)
    batch, weight = pad_batches(rows, 3)
    assert weight.shape == (-(-count // 3), 3)
    assert batch["tokens"][weight == 1][:, 1].tolist() == list(range(count))
    assert_padded(rows, batch, weight)


@pytest.mark.parametrize("limit", [1, 4, 40, 100])
def test_holdout_is_limited_and_its_own(limit):
    batch, weight = holdout_batches(DATA, limit)
    assert weight.shape == (4, limit)
    assert_padded(DATA.train, batch, weight)
    for client, own in enumerate(DATA.client_holdout):
        rows = batch["tokens"][client, weight[client] == 1, 1].tolist()
        assert len(rows) == len(set(rows)) == min(limit, len(own)) and set(rows) <= set(own.tolist())
    again, _ = holdout_batches(DATA, limit)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_a_client_of_another_host_has_padding_alone():
    here = DATA.of_host(0, 2)
    batch, weight = holdout_batches(here, 4)
    assert weight.sum(axis=1).tolist() == [1, 0, 4, 0]
    assert_padded(DATA.train, batch, weight)


def test_limited_holdout_reaches_over_all_rows():
    batch, _ = holdout_batches(DATA, 4)
    assert batch["tokens"][3, :, 1].tolist() == DATA.client_holdout[3][[0, 10, 20, 30]].tolist()


@pytest.mark.parametrize(("steps", "batch_size", "bound"), [(1, 1, 100), (50, 10, 150)])
def test_a_round_has_at_most_so_many_distinct_tokens(steps, batch_size, bound):
    """Those of the client with the most, as far as a round reaches; in hundreds, at most the vocabulary."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 150, DATA.train["tokens"].shape).astype(np.int32)
    data = dataclasses.replace(DATA, train=DATA.train | {"tokens": tokens}, vocab_size=150)
    fl = ConfigDict({"local_steps": steps, "batch_size": batch_size})
    assert most_tokens(data, fl) == bound
    for client in range(4):
        batch = round_batches(data, np.array([client]), 1, steps, batch_size, 0)
        assert len(np.union1d(batch["tokens"], 0)) <= bound
