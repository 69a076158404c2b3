"""Averages of low-rank adapters against loops over clients in NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop import BUDGETS, MODEL, algorithm_of, assert_close, config_of, doubles, rounds, trained_alone
from tiny import run_round, tiny_params

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh
from hfedmoe_jax.algorithms import adapters, compose
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.lora import adapter_pairs

RANK = 3
LORA = {"model__train": "lora", "model__lora_rank": RANK}


def lora_config(**fields):
    return config_of(fl__base="fedavg", **LORA, **fields)


def begin():
    """Returns a model whose adapters do something."""
    params, rng = tiny_params(**MODEL, **LORA), np.random.default_rng(3)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), params)


def products(tree) -> dict:
    return {path: a @ b for path, (a, b) in adapter_pairs(doubles(tree)).items()}


def test_flexlora_averages_products_and_keeps_their_best_approximation():
    config = lora_config(fl__algorithm="flexlora")
    algorithm, members_of = algorithm_of(config), trained_alone(config, frozen_fields=MODEL | LORA)
    state = algorithm.init(begin())
    for data, key in rounds(config):
        before = jax.tree.map(np.array, state.params)
        members = members_of(before, data, key)
        state, _ = run_round(algorithm, state, data, key)
        sizes = {int(c): float(s) for c, s in zip(data.client, data.size, strict=True)}
        weight = np.array([sizes[member.client] for member in members])
        after = [jax.tree.map(np.add, doubles(before), member.change) for member in members]
        for path, found in products(state.params.experts).items():
            mean = np.tensordot(weight / weight.sum(), [products(x.experts)[path] for x in after], 1)
            u, s, v = np.linalg.svd(mean, full_matrices=False)
            best = (u[..., :RANK] * s[..., None, :RANK]) @ v[..., :RANK, :]
            np.testing.assert_allclose(found, best, rtol=1e-3, atol=2e-5)
            assert np.linalg.norm(best - mean) > 1e-3 * np.linalg.norm(mean)  # there was something to cut
        router = [x.router for x in after]
        mean = jax.tree.map(lambda *x, w=weight: np.tensordot(w / w.sum(), x, 1), *router)
        assert_close(state.params.router, mean, atol=1e-5)


def test_hetlora_trains_ranks_by_budget_and_weighs_by_norm():
    config = lora_config(fl__algorithm="hetlora")
    algorithm = algorithm_of(config)
    rule = compose(config).rule._replace(start=adapters.truncate(RANK))
    members_of = trained_alone(config, rule, frozen_fields=MODEL | LORA)
    experts = MODEL["model__num_experts"]
    state = algorithm.init(begin())
    for data, key in rounds(config):
        before = jax.tree.map(np.array, state.params)
        members = members_of(before, data, key)
        state, _ = run_round(algorithm, state, data, key)
        sizes = {int(c): float(s) for c, s in zip(data.client, data.size, strict=True)}
        total = norm = 0.0
        for member in members:
            after = jax.tree.map(np.add, doubles(before), member.change)
            rank = int(np.ceil(RANK * BUDGETS[member.client] / experts))
            assert rank < RANK
            for a, b in adapter_pairs(after.experts).values():
                trained = np.asarray(member.upload.trained)
                assert not np.any(a[trained][..., rank:]) and not np.any(b[trained][..., rank:, :])
                assert np.any(a[..., :rank])
            squares = sum(np.sum(x**2, (-1, -2)) for x in products(after.experts).values())
            own = sizes[member.client] * np.sqrt(squares)
            total = total + np.stack([own[..., None, None] * x for x in leaves_2d(after.experts)])
            norm = norm + own
        expected = total / norm[..., None, None]
        np.testing.assert_allclose(np.stack(leaves_2d(state.params.experts)), expected, rtol=1e-4, atol=1e-5)


def leaves_2d(experts):
    """Returns the factors, all cut to one shape."""
    return [np.asarray(x, np.float64)[..., :RANK, :RANK] for x in jax.tree.leaves(experts)]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
def test_factors_are_the_best_approximation(rows, columns, rank, seed):
    matrix = np.random.default_rng(seed).normal(size=(2, rows, columns)).astype(np.float32)
    a, b = adapters.factorise(matrix, rank)
    assert a.shape == (2, rows, rank) and b.shape == (2, rank, columns)
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    room = min(rank, s.shape[-1])
    best = (u[..., :room] * s[..., None, :room]) @ v[..., :room, :]
    np.testing.assert_allclose(a @ b, best, atol=1e-4)


@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 64))
def test_a_client_has_a_rank_of_one_to_all(budget, rank, experts):
    share = np.float32(min(budget, experts) / experts)
    own = int(adapters.client_rank(np.asarray(share), rank))
    assert 1 <= own <= rank and own >= share * rank - 1e-3
    assert own == rank or budget < experts


@pytest.mark.parametrize("name", ["flexlora", "flora", "hetlora"])
def test_what_has_no_adapters_is_refused(name):
    config = get_config("smoke")
    config.fl.algorithm = name
    with pytest.raises(InputError, match=rf"fl\.algorithm='{name}'.*model\.train=all"):
        Experiment(config, make_mesh(jax.devices()[:1]))
    for field, fields in {
        "server.optimizer": dict(fl__base="fedadam"),
        "aggregation.literal_gating": dict(aggregation__literal_gating=True),
    }.items():
        with pytest.raises(InputError) as error:
            algorithm_of(config_of(**{"fl__algorithm": name, "fl__base": "fedavg"} | LORA | fields))
        assert error.value.field == field
    if name == "hetlora":
        with pytest.raises(InputError, match=r"fl\.base='hfedmoe'"):
            algorithm_of(config_of(fl__algorithm=name, fl__base="hfedmoe", **LORA))
