import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hfedmoe_jax.data import PARTITIONS, partition_documents
from hfedmoe_jax.errors import InputError


def partition(labels, num_clients, name, seed=0, owners=None, **fields):
    config = ConfigDict({"name": name, "alpha": 0.3, "shards_per_client": 2, **fields})
    rng = np.random.default_rng(seed)
    return partition_documents(np.array(labels, np.int32), owners, num_clients, config, rng)


def error_of(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        partition(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return caught.value


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    num_clients=st.integers(1, 12),
    name=st.sampled_from(sorted(PARTITIONS)),
    alpha=st.sampled_from([1e-300, 1e-3, 0.3, 1.0, 1e9]),
    seed=st.integers(0, 2**32),
)
def test_exact_cover_without_empty_clients(labels, num_clients, name, alpha, seed):
    owners = [f"owner{index % (2 * num_clients)}" for index in range(len(labels))]
    shards_per_client = 1 + seed % 2
    assume(len(labels) >= num_clients * shards_per_client)
    fields = {"seed": seed, "owners": owners, "alpha": alpha, "shards_per_client": shards_per_client}
    parts = partition(labels, num_clients, name, **fields)
    assert len(parts) == num_clients and all(len(part) for part in parts)
    assert all(part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    again = partition(labels, num_clients, name, **fields)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_another_seed_deals_otherwise(name):
    labels = np.arange(60) % 3
    one, other = partition(labels, 5, name, seed=0), partition(labels, 5, name, seed=1)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_iid_is_even():
    assert sorted(len(part) for part in partition(np.arange(23) % 3, 5, "iid")) == [4, 4, 5, 5, 5]


def skew(alpha):
    """Returns how far clients' label mixes are from the whole's, on average over seeds."""
    labels = np.arange(2000) % 4
    distances = []
    for seed in range(5):
        for part in partition(labels, 10, "dirichlet", seed=seed, alpha=alpha):
            mix = np.bincount(labels[part], minlength=4) / len(part)
            distances.append(np.abs(mix - 0.25).sum() / 2)
    return np.mean(distances)


def test_alpha_sets_the_skew():
    assert skew(1e6) < 0.02 < skew(10.0) < skew(0.3) < skew(0.01)
    assert skew(0.01) > 0.6


def test_dirichlet_shares_have_the_stated_spread():
    # A share of Dirichlet(alpha, ..., alpha) over C has mean 1/C and variance (1/C)(1-1/C)/(C alpha + 1).
    labels, num_clients, alpha = np.zeros(4000, int), 4, 0.5
    shares = np.array(
        [
            [
                len(part) / len(labels)
                for part in partition(labels, num_clients, "dirichlet", seed=seed, alpha=alpha)
            ]
            for seed in range(400)
        ]
    )
    assert np.allclose(shares.mean(axis=0), 0.25, atol=0.05)
    assert np.allclose(shares.var(axis=0), 0.25 * 0.75 / 3, rtol=0.2)


def test_shards_hold_few_labels():
    labels = np.repeat(np.arange(10), 20)
    for per_client in (1, 2):
        parts = partition(labels, 10, "shards", shards_per_client=per_client)
        assert {len(part) for part in parts} == {20}
        assert max(len(set(labels[part])) for part in parts) == per_client


def test_column_follows_the_owners():
    owners = ["b", "10", "a", "b", "c", "a"]
    parts = partition([0] * 6, 4, "column", owners=owners)
    assert [part.tolist() for part in parts] == [[1], [2, 5], [0, 3], [4]]
    merged = partition([0] * 6, 3, "column", owners=owners)
    assert [part.tolist() for part in merged] == [[1, 4], [2, 5], [0, 3]]
    numbered = partition([0] * 3, 3, "column", owners=["10", "9", "1"])
    assert [part.tolist() for part in numbered] == [[2], [1], [0]]


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, 1e300, math.inf])
def test_alpha_must_be_positive(alpha):
    error = error_of([0, 1], 2, "dirichlet", alpha=alpha)
    assert error.field == "partition.alpha" and error.value is alpha and "0.3" in str(error)


def test_shards_must_be_there():
    assert error_of([0, 1], 2, "shards", shards_per_client=0).field == "partition.shards_per_client"
    error = error_of([0, 1, 1], 2, "shards", shards_per_client=2)
    assert error.field == "partition.shards_per_client" and "4 shards of 3" in str(error)
    assert "at most 1" in str(error)


def test_owners_must_be_there():
    error = error_of([0, 1], 2, "column")
    assert error.field == "data.client_column" and "name the column" in str(error)
    error = error_of([0, 1, 0], 3, "column", owners=["a", "b", "a"])
    assert error.field == "fl.clients" and error.value == 3 and "only 2 owners" in str(error)


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_every_client_needs_a_document(name):
    error = error_of([0, 1, 0], 4, name, owners=["a", "b", "c"])
    assert error.field == "fl.clients" and error.value == 4 and "only 3" in str(error)
    assert error_of([0, 1], 0, name, owners=["a", "b"]).field == "fl.clients"


def test_unknown_partition():
    error = error_of([0, 1], 2, "dirichlett")
    assert error.field == "partition.name" and "did you mean 'dirichlet'?" in str(error)
