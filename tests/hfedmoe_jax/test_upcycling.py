"""Mixtures from a dense network: what each method keeps, and what it gives up."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_jax import upcycling
from hfedmoe_jax.upcycling import (
    DenseModel,
    Network,
    Shape,
    balanced_clusters,
    low_rank,
    mix,
    output,
    unit_rows,
)

WIDTH, HIDDEN = 6, 16


def drawn(gated=False, seed=0, tokens=400):
    rng = np.random.default_rng(seed)
    shapes = ((WIDTH, HIDDEN), (HIDDEN, WIDTH), (HIDDEN,))
    network = Network(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    if gated:
        network = network._replace(bias_f=None, gate_df=rng.normal(size=shapes[0]).astype(np.float32))
    return network, rng.normal(size=(tokens, WIDTH)).astype(np.float32), rng


def made(name, network, inputs, shape, rng):
    """Returns the mixture of a model of one layer."""
    module = SimpleNamespace(**shape._asdict())
    dense = DenseModel(module, {}, [network], inputs[None], inputs[None], inputs[None], rng)
    return jax.tree.map(lambda part: part[0], upcycling.upcyclings[name](dense))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_copies_are_the_network_whoever_is_chosen(top_k, gated):
    network, inputs, rng = drawn(gated)
    mixture = made("copy", network, inputs, Shape(4, top_k), rng)
    found, gates, weight = mix(mixture, inputs, top_k, 1.0)
    np.testing.assert_allclose(found, output(network, inputs), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.sum(gates, axis=1), 1, rtol=1e-5)
    assert np.all(np.sum(np.asarray(weight) > 0, axis=1) == top_k)


@pytest.mark.parametrize("gated", [False, True])
def test_split_experts_are_the_networks_units_each_once(monkeypatch, gated):
    """Before they learn, their sum is the network."""
    monkeypatch.setattr(upcycling, "DISTILL_STEPS", 0)
    network, inputs, rng = drawn(gated)
    mixture = made("split", network, inputs, Shape(4, 2), rng)
    total = sum(output(jax.tree.map(lambda part: part[e], mixture.experts), inputs) for e in range(4))  # noqa: B023
    np.testing.assert_allclose(total, output(network, inputs), rtol=1e-4, atol=1e-4)
    units = np.concatenate(list(mixture.experts.in_df), axis=1)
    assert sorted(map(tuple, units.T)) == sorted(map(tuple, network.in_df.T))


@pytest.mark.parametrize("gated", [False, True])
def test_a_split_learns_to_stand_in_for_the_network(monkeypatch, gated):
    network, inputs, _ = drawn(gated)

    def error(steps):
        monkeypatch.setattr(upcycling, "DISTILL_STEPS", steps)
        mixture = made("split", network, inputs, Shape(4, 2), np.random.default_rng(1))
        wanted = output(network, inputs)
        return float(np.sum((mix(mixture, inputs, 2, 2.0)[0] - wanted) ** 2) / np.sum(wanted**2))

    assert error(200) < 0.6 * error(0)


def test_a_cluster_keeps_what_its_inputs_use():
    """Inputs of two clusters, each in two dimensions: the experts are exact there and of rank two."""
    network, _, rng = drawn()
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    parts = [(5 + rng.random((200, 2))) @ basis[2 * part : 2 * part + 2] for part in range(2)]
    inputs = np.concatenate(parts).astype(np.float32)
    mixture = made("cluster", network, inputs, Shape(2, 1), rng)
    chosen = np.argmax(mix(mixture, inputs, 1, 1.0)[2], axis=1).tolist()
    assert len(set(chosen[:200])) == len(set(chosen[200:])) == 1 and chosen[0] != chosen[-1]
    wanted = output(network, inputs)
    assert np.sum((mix(mixture, inputs, 1, 1.0)[0] - wanted) ** 2) < 0.05 * np.sum(wanted**2)
    for expert in range(2):
        assert np.linalg.matrix_rank(mixture.experts.in_df[expert], tol=1e-4) <= 2


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), rows=st.integers(3, 40), columns=st.integers(1, 8))
def test_the_reduced_matrix_is_of_the_least_rank_that_keeps_the_energy(seed, rows, columns):
    rng = np.random.default_rng(seed)
    inputs, matrix = rng.normal(size=(rows, 5)), rng.normal(size=(5, columns)) * 3.0 ** -np.arange(columns)
    kept = low_rank(matrix.astype(np.float32), inputs.astype(np.float32))
    values = np.linalg.svd(inputs @ matrix, compute_uv=False) ** 2
    lost = np.sum((inputs @ (matrix - kept)) ** 2) / values.sum()
    rank = np.linalg.matrix_rank(kept.astype(np.float64), tol=1e-5 * np.abs(kept).max())
    assert lost <= 1 - upcycling.KEPT_ENERGY + 1e-4
    if rank > 1:
        assert values[: rank - 1].sum() / values.sum() < upcycling.KEPT_ENERGY + 1e-4


def test_clusters_are_equal_in_size_and_found_where_they_are_plain():
    rng = np.random.default_rng(0)
    centre = np.eye(4).repeat(6, axis=0)
    rows = unit_rows(centre + 0.1 * rng.normal(size=centre.shape))
    found = [balanced_clusters(rows, 4, np.random.default_rng(seed)) for seed in range(5)]
    for group in found:
        assert np.bincount(group).tolist() == [6] * 4
    truth = np.arange(4).repeat(6)
    same = truth[:, None] == truth[None]
    assert any(np.array_equal(group[:, None] == group[None], same) for group in found)
