"""Aggregation (17)-(21) against naive float64 loops that hold every client's model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hfedmoe_jax import aggregation as a

TOLERANCE = dict(rtol=1e-5, atol=1e-6)


@st.composite
def populations(draw):
    """Draws clients' experts [C, L, E, 2], usage, importance, trained and sizes."""
    clients, layers, experts = (
        draw(st.integers(1, 5)),
        draw(st.sampled_from([1, 3])),
        draw(st.sampled_from([1, 4])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (clients, layers, experts)
    return dict(
        experts=rng.standard_normal((*shape, 2)).astype(np.float32),
        router=rng.standard_normal((clients, layers, 3)).astype(np.float32),
        usage=(rng.random(shape) * (rng.random(shape) < 0.8)).astype(np.float32),
        importance=rng.random(shape).astype(np.float32),
        trained=rng.random(shape) < 0.6,
        sizes=rng.integers(1, 50, clients).astype(np.float32),
        tau=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )


def uploads(p):
    return [
        a.Upload(p["usage"][c], p["importance"][c], p["trained"][c], p["sizes"][c])
        for c in range(len(p["sizes"]))
    ]


def streamed(values, weights, previous):
    """The streaming mean over a list of clients."""
    mean = a.mean_init(values[0], jax.tree.map(jnp.asarray, weights[0]))
    for value, weight in zip(values, weights, strict=True):
        mean = a.mean_accumulate(mean, value, weight)
    return mean, a.mean_finalize(mean, previous)


@given(populations())
def test_experts_are_averaged_over_the_clients_that_hold_them(p):
    clients, layers, experts = p["usage"].shape
    previous = np.full((layers, experts, 2), 7.0, np.float32)
    expected = previous.astype(np.float64)
    for layer in range(layers):
        for expert in range(experts):
            holders = [
                c for c in range(clients)
                if p["usage"][c, layer, expert] >= p["tau"] and p["trained"][c, layer, expert]
            ]  # fmt: skip
            if holders:
                total = sum(float(p["sizes"][c]) for c in holders)
                expected[layer, expert] = (
                    sum(
                        float(p["sizes"][c]) * p["experts"][c, layer, expert].astype(np.float64)
                        for c in holders
                    )
                    / total
                )
    section = ConfigDict(dict(tau=p["tau"]))
    weights = [a.expert_rules["dominant"](upload, section) for upload in uploads(p)]
    _, result = streamed(list(p["experts"]), weights, previous)
    np.testing.assert_allclose(result, expected, **TOLERANCE)
    untouched = ~np.any([np.asarray(w) > 0 for w in weights], axis=0)
    np.testing.assert_array_equal(np.asarray(result)[untouched], 7.0)


@given(populations())
def test_gating_is_averaged_by_importance(p):
    clients, layers, experts = p["usage"].shape
    dominant = (p["usage"] >= p["tau"]) & p["trained"]
    union_size = np.any(dominant, axis=0).sum()
    alpha = np.zeros(clients)
    for c in range(clients):
        for layer in range(layers):
            for expert in range(experts):
                if dominant[c, layer, expert]:
                    alpha[c] += float(p["usage"][c, layer, expert]) * float(p["importance"][c, layer, expert])
    previous = np.full((layers, 3), 7.0, np.float32)
    section = ConfigDict(dict(tau=p["tau"]))
    weights = [a.gating_rules["importance"](upload, section) for upload in uploads(p)]
    mean, result = streamed(list(p["router"]), weights, previous)
    router = p["router"].astype(np.float64)
    if alpha.sum() > 0:
        expected = np.einsum("c,cld->ld", alpha / alpha.sum(), router)
        literal = np.einsum("c,cld->ld", alpha / union_size, router)  # (20)-(21) as printed
        np.testing.assert_allclose(a.literal_gating(mean, union_size), literal, **TOLERANCE)
    else:
        expected = previous
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@given(populations())
def test_consistency_is_the_share_of_the_union(p):
    clients = len(p["sizes"])
    dominant = (p["usage"] >= p["tau"]) & p["trained"]
    took_part = p["sizes"] > 10
    sets = [
        set(zip(*np.nonzero(dominant[c]), strict=True)) if took_part[c] else set() for c in range(clients)
    ]
    union = set().union(*sets)
    expected = [len(s & union) / max(len(union), 1) for s in sets]
    np.testing.assert_allclose(a.routing_consistency(dominant, took_part), expected, **TOLERANCE)


@given(populations(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_of_clients_does_not_matter(p, random):
    order = list(range(len(p["sizes"])))
    random.shuffle(order)
    previous = np.zeros(p["experts"].shape[1:], np.float32)
    weights = [a.expert_rules["all"](upload, ConfigDict()) for upload in uploads(p)]
    _, one = streamed(list(p["experts"]), weights, previous)
    _, other = streamed([p["experts"][c] for c in order], [weights[c] for c in order], previous)
    np.testing.assert_allclose(one, other, **TOLERANCE)


def test_a_zero_weight_hides_even_a_nan():
    mean = a.mean_init(jnp.zeros(2), jnp.zeros(()))
    mean = a.mean_accumulate(mean, jnp.float32([1.0, 2.0]), jnp.float32(3.0))
    mean = a.mean_accumulate(mean, jnp.float32([jnp.nan, jnp.inf]), jnp.float32(0.0))
    np.testing.assert_array_equal(a.mean_finalize(mean, jnp.zeros(2)), [1.0, 2.0])


@pytest.mark.parametrize("size", [1.0, 3.0, 81.0])
def test_one_client_alone_gets_its_own_parameters_back(size):
    value = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    _, result = streamed([value], [np.float32(size)], np.zeros_like(value))
    np.testing.assert_allclose(result, value, rtol=2e-7)
