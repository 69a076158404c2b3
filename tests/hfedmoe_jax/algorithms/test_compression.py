"""Compressed updates against a loop over clients, tensors and experts."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from loop import (
    BUDGETS,
    algorithm_of,
    assert_close,
    assert_same,
    by_expert,
    client,
    config_of,
    doubles,
    rounds,
    start,
    trained_alone,
)
from tiny import run_round

from hfedmoe_jax.algorithms.compression import keep_largest, round_to_levels
from hfedmoe_jax.models import tree_bytes

FRACTION = 0.1


def largest(tensor):
    kept = np.zeros_like(tensor)
    order = np.argsort(-np.abs(tensor.reshape(-1)))[: math.ceil(FRACTION * tensor.size)]
    kept.reshape(-1)[order] = tensor.reshape(-1)[order]
    return kept


def levels(tensor):
    scale = np.abs(tensor).max() / 127
    return np.rint(tensor / scale) * scale if scale else tensor


COMPRESSED = {"topk": largest, "int8": levels}
BYTES = {"topk": lambda size: 8 * math.ceil(FRACTION * size), "int8": lambda size: size + 4}


@functools.cache
def trainer():
    """Compiled once: clients train the same whatever becomes of their changes."""
    return trained_alone(config_of(fl__algorithm="hfedmoe"))


@functools.cache
def built(name):
    config = config_of(fl__algorithm=name, fl__base="hfedmoe", compression__fraction=FRACTION)
    return config, algorithm_of(config)


def weights_of(upload, tau):
    """Returns what counts for each expert, the routers and the rest, as HFedMoE weighs."""
    dominant = (upload.usage >= tau) & upload.trained
    return {
        "experts": upload.size * dominant,
        "router": np.sum(upload.usage * upload.importance * dominant),
        "shared": upload.size,
    }


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_round_is_the_mean_of_compressed_changes_with_residuals(name):
    config, algorithm = built(name)
    train, state = trainer(), algorithm.init(start())
    unsent = 0
    for data, key in rounds(config):
        before, residuals = jax.tree.map(np.array, state.params), jax.tree.map(np.array, state.clients)
        members = train(state.params, data, key)
        state, metrics = run_round(algorithm, state, data, key)
        total, weight = by_expert(lambda place, x: 0 * x, doubles(before)), 0
        for member in members:
            of = weights_of(member.upload, config.aggregation.tau)
            unsent += np.sum(of["experts"] == 0)
            old = doubles(client(residuals, member.client))

            def weigh(place, of=of):
                return of["experts"][place] if isinstance(place, tuple) else of[place]

            wanted = by_expert(lambda place, x, r, w=weigh: (x + r) * (w(place) > 0), member.change, old)
            received = by_expert(lambda place, x: COMPRESSED[name](x), wanted)
            kept = by_expert(
                lambda place, x, y, r, w=weigh: x - y if w(place) > 0 else r, wanted, received, old
            )
            assert_close(client(state.clients, member.client), kept)
            total = by_expert(lambda place, sum, x, w=weigh: sum + w(place) * x, total, received)
            ones = by_expert(lambda place, x, w=weigh: 0 * x + w(place), doubles(before))
            weight = ones if weight == 0 else jax.tree.map(np.add, weight, ones)
        mean = jax.tree.map(lambda t, w: t / np.where(w > 0, w, 1), total, weight)
        assert_close(state.params, jax.tree.map(np.add, before, mean))
        for number in set(range(len(BUDGETS))) - {member.client for member in members}:
            assert_same(client(state.clients, number), client(residuals, number))
    assert unsent > 0


@pytest.mark.parametrize("name", COMPRESSED)
def test_bytes_are_those_of_every_tensor_sent(name):
    _, algorithm = built(name)
    size = BYTES[name]
    params = start()
    rest = sum(size(leaf.size) for leaf in jax.tree.leaves((params.router, params.shared)))
    one = sum(size(math.prod(leaf.shape[2:])) for leaf in jax.tree.leaves(params.experts))
    clients = np.array([3, 0, 1])
    up = algorithm.traffic.up(np.array([0, 1, 5]), clients)
    assert up.tolist() == [rest, rest + one, rest + 5 * one]
    assert algorithm.traffic.down(np.zeros(3, int), clients).tolist() == [tree_bytes(params)] * 3


tensors = arrays.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32))


@given(tensors, st.sampled_from([1, 5, 12]))
def test_the_largest_values_are_kept(tensor, count):
    kept = np.asarray(keep_largest(tensor, count))
    assert np.all((kept == tensor) | (kept == 0))
    assert np.count_nonzero(kept) <= count
    lost = np.abs(tensor[kept != tensor])
    assert lost.size <= tensor.size - count
    assert np.all(lost <= np.sort(np.abs(tensor).reshape(-1))[-count])


@given(tensors)
def test_levels_are_whole_and_near(tensor):
    rounded = np.asarray(round_to_levels(tensor), np.float64)
    scale = float(np.abs(tensor).max()) / 127
    assert np.all(np.abs(rounded - tensor) <= scale / 2 * (1 + 1e-4))
    if scale > 1e-30:
        level = rounded / scale
        np.testing.assert_allclose(level, np.rint(level), atol=1e-3)
        assert np.abs(level).max() <= 127.001
