import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_jax.data import Examples, FederatedData, holdout_batches, pad_batches, round_batches

COUNTS = (1, 3, 10, 40)


def numbered(count):
    """Returns examples that hold their own row number."""
    tokens = np.full((count, 4), 2, np.int32)
    tokens[:, 1] = np.arange(count)
    return Examples(tokens, np.arange(count, dtype=np.int32) * 7)


def make_data():
    rows = np.random.default_rng(0).permutation(2 * sum(COUNTS))
    ends = np.cumsum([*COUNTS, *COUNTS])
    parts = tuple(np.sort(part) for part in np.split(rows, ends[:-1]))
    return FederatedData(
        train=numbered(len(rows)),
        validation=numbered(0),
        test=numbered(0),
        client_train=parts[:4],
        client_holdout=parts[4:],
        label_names=(),
        client_names=(),
        vocab_size=0,
        tokenizer_json="",
        duplicates_removed=0,
    )


DATA = make_data()
clients_strategy = st.lists(st.integers(0, 3), max_size=4, unique=True)


@settings(deadline=None)
@given(clients_strategy, st.integers(0, 50), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_epochs_without_replacement(clients, round_number, steps, batch_size, seed):
    tokens, labels = round_batches(DATA, np.array(clients, int), round_number, steps, batch_size, seed)
    assert tokens.shape == (len(clients), steps, batch_size, 4) and tokens.dtype == np.int32
    assert labels.shape == (len(clients), steps, batch_size) and labels.dtype == np.int32
    assert np.array_equal(labels, tokens[..., 1] * 7)
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
    together, _ = round_batches(DATA, cohort, round_number, 3, 4, 5)
    for client, tokens in zip(cohort, together, strict=True):
        alone, _ = round_batches(DATA, np.array([client]), round_number, 3, 4, 5)
        assert np.array_equal(alone[0], tokens)


def test_rounds_seeds_and_epochs_differ():
    def order(round_number, seed, steps=40):
        return round_batches(DATA, np.array([3]), round_number, steps, 1, seed)[0][0, :, 0, 1].tolist()

    assert len({tuple(order(number, seed)) for number in range(3) for seed in range(3)}) == 9
    two_epochs = order(0, 0, steps=80)
    assert two_epochs[:40] == order(0, 0) != two_epochs[40:]


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
def test_padding_weighs_nothing(count):
    tokens, labels, weight = pad_batches(numbered(count), 3)
    assert tokens.shape == (-(-count // 3), 3, 4) and labels.shape == weight.shape == tokens.shape[:2]
    assert weight.dtype == np.float32 and labels.dtype == tokens.dtype == np.int32
    assert tokens[weight == 1][:, 1].tolist() == list(range(count))
    assert labels[weight == 1].tolist() == [7 * row for row in range(count)]
    assert set(weight.ravel().tolist()) <= {0.0, 1.0}
    assert (tokens[..., 0] == 2).all()


@pytest.mark.parametrize("limit", [1, 4, 40, 100])
def test_holdout_is_limited_and_its_own(limit):
    tokens, labels, weight = holdout_batches(DATA, limit)
    assert tokens.shape == (4, limit, 4) and labels.shape == weight.shape == (4, limit)
    assert weight.dtype == np.float32 and tokens.dtype == labels.dtype == np.int32
    for client, own in enumerate(DATA.client_holdout):
        rows = tokens[client, weight[client] == 1, 1].tolist()
        assert len(rows) == len(set(rows)) == min(limit, len(own))
        assert set(tokens[client, :, 1].tolist()) <= set(own.tolist())
        assert np.array_equal(labels[client], tokens[client, :, 1] * 7)
    assert np.array_equal(tokens, holdout_batches(DATA, limit)[0])


def test_limited_holdout_reaches_over_all_rows():
    tokens, _, _ = holdout_batches(DATA, 4)
    assert tokens[3, :, 1].tolist() == DATA.client_holdout[3][[0, 10, 20, 30]].tolist()
