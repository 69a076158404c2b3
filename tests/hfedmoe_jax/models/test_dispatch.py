"""Routing and the two dispatch implementations against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_jax.models import dispatch, routing
from hfedmoe_jax.models.dispatch import ExpertWeights, expert_capacity
from hfedmoe_jax.models.routing import Assignment, load_balancing_loss, own_choice

D, F = 5, 7
dense = jax.jit(dispatch.dense, static_argnums=5)
capacity_gather = jax.jit(dispatch.capacity_gather, static_argnums=5)
assign = jax.jit(routing.assign, static_argnums=3)


def naive(x, assignment, weights, kept):
    """Each kept assignment on its own, in float64."""
    result = np.zeros(x.shape)
    for token in range(len(x)):
        for choice in range(assignment.expert.shape[1]):
            if kept[token, choice]:
                expert = int(assignment.expert[token, choice])
                w_in, w_out = (np.asarray(w[expert], np.float64) for w in weights)
                hidden = np.maximum(np.asarray(x[token], np.float64) @ w_in, 0)
                result[token] += float(assignment.weight[token, choice]) * (hidden @ w_out)
    return result


@st.composite
def layers(draw):
    """Draws (x [N, D], router logits [N, E], weights, forward [E], token mask [N], k)."""
    tokens, experts = draw(st.sampled_from([(1, 1), (9, 3), (12, 5)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = ExpertWeights(
        rng.standard_normal((experts, D, F)).astype(np.float32),
        rng.standard_normal((experts, F, D)).astype(np.float32),
    )
    x = rng.standard_normal((tokens, D)).astype(np.float32)
    logits = rng.standard_normal((tokens, experts)).astype(np.float32)
    forward = rng.random(experts) < 0.6
    token_mask = rng.random(tokens) < 0.8
    return x, logits, weights, forward, token_mask, draw(st.integers(1, min(2, experts)))


@given(layers())
def test_tokens_go_to_their_best_open_experts(layer):
    x, logits, weights, forward, token_mask, k = layer
    gates, assignment = assign(logits, forward, token_mask, k)
    exact = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(gates, exact / exact.sum(-1, keepdims=True), rtol=1e-5)
    for token in range(len(x)):
        ranked = sorted(np.flatnonzero(forward), key=lambda e: -logits[token, e])[:k]
        served = {
            int(e): float(w)
            for e, w in zip(assignment.expert[token], assignment.weight[token], strict=True)
            if w > 0
        }
        if not token_mask[token]:
            assert served == {}
            continue
        assert set(served) == {int(e) for e in ranked}
        open_total = exact[token][forward].sum()
        for expert, weight in served.items():
            np.testing.assert_allclose(weight, exact[token, expert] / open_total, rtol=1e-5)


@given(layers())
def test_open_experts_leave_the_routing_of_the_paper(layer):
    _, logits, _, forward, token_mask, k = layer
    gates, assignment = assign(logits, np.ones_like(forward), token_mask, k)
    taken = np.take_along_axis(np.asarray(gates), np.asarray(assignment.expert), axis=1)
    np.testing.assert_array_equal(assignment.weight, np.where(token_mask[:, None], taken, 0))
    chosen = np.asarray(own_choice(gates, token_mask, k))
    assert set(chosen.sum(-1)[token_mask].tolist()) <= {k}
    assert not chosen[~token_mask].any()


@given(layers())
def test_dense_is_the_sum_over_assignments(layer):
    x, logits, weights, forward, token_mask, k = layer
    _, assignment = assign(logits, forward, token_mask, k)
    everything = np.ones(len(forward), bool)
    y, kept = dense(x, assignment, weights, everything, np.ones(len(forward), np.float32), 0)
    np.testing.assert_array_equal(kept, np.asarray(assignment.weight) > 0)
    np.testing.assert_allclose(y, naive(x, assignment, weights, kept), rtol=1e-4, atol=1e-4)


@given(layers(), st.sampled_from([1, 2, 3]))
def test_capacity_drops_late_tokens_and_computes_the_rest(layer, capacity):
    x, logits, weights, forward, token_mask, k = layer
    _, assignment = assign(logits, forward, token_mask, k)
    everything, ones = np.ones(len(forward), bool), np.ones(len(forward), np.float32)
    y, kept = capacity_gather(x, assignment, weights, everything, ones, capacity)
    # The queue: first choices of all tokens, then second choices; each expert takes `capacity`.
    room = dict.fromkeys(range(len(forward)), capacity)
    expected = np.zeros(kept.shape, bool)
    for choice in range(k):
        for token in range(len(x)):
            expert = int(assignment.expert[token, choice])
            if assignment.weight[token, choice] > 0 and room[expert] > 0:
                room[expert] -= 1
                expected[token, choice] = True
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_allclose(y, naive(x, assignment, weights, kept), rtol=1e-4, atol=1e-4)


@given(layers(), st.integers(0, 2**16))
@settings(max_examples=25)
def test_both_dispatches_agree_where_nothing_is_dropped(layer, seed):
    x, logits, weights, forward, token_mask, k = layer
    _, assignment = assign(logits, forward, token_mask, k)
    backward = np.random.default_rng(seed).random(len(forward)) < 0.5
    multiplier = jnp.float32(np.random.default_rng(seed).random(len(forward)))

    def loss(function, x, weight, weights, multiplier):
        weight = jnp.where(assignment.weight > 0, weight, 0.0)  # as `assign` does
        y, _ = function(x, Assignment(assignment.expert, weight), weights, backward, multiplier, len(x))
        return jnp.sum(jnp.sin(y))

    arguments = (x, assignment.weight, weights, multiplier)
    results = [
        jax.value_and_grad(loss, argnums=(1, 2, 3, 4))(function, *arguments)
        for function in (dense, capacity_gather)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)
    for gradient in results[1][1][2]:
        np.testing.assert_array_equal(np.asarray(gradient)[~backward], 0)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "slots"),
    [(64, 8, 1, 1.0, 8), (64, 8, 1, 1.25, 10), (10, 4, 2, 1.0, 5), (4, 8, 1, 0.1, 1), (16, 4, 1, 100.0, 16)],
)
def test_capacity_is_a_multiple_of_the_even_share(tokens, experts, k, factor, slots):
    assert expert_capacity(tokens, experts, k, factor) == slots


def test_load_balancing_is_one_when_even_and_the_number_of_experts_when_not():
    even = np.full((1, 4, 4), 0.25, np.float32)
    chosen = np.eye(4, dtype=bool)[None]
    mask = np.ones(4, bool)
    np.testing.assert_allclose(load_balancing_loss(even, chosen, mask), 1.0, rtol=1e-6)
    one = np.zeros((1, 4, 4), np.float32)
    one[..., 0] = 1
    np.testing.assert_allclose(load_balancing_loss(one, one > 0, mask), 4.0, rtol=1e-6)
