"""Routing against loops over tokens."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_jax.experts import LayerBudget
from hfedmoe_jax.models import routing
from hfedmoe_jax.models.routing import RouterRule, load_balancing_loss, model_balance, own_choice

assign = jax.jit(routing.assign, static_argnums=3)


def budget_of(forward, bias=None):
    return LayerBudget(np.int32(0), np.ones(len(forward), np.float32), forward, bias)


@st.composite
def layers(draw):
    """Draws (router logits [N, E], forward [E], token mask [N], k)."""
    tokens, experts = draw(st.sampled_from([(1, 1), (9, 3), (12, 5)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((tokens, experts)).astype(np.float32)
    forward = rng.random(experts) < 0.6
    token_mask = rng.random(tokens) < 0.8
    return logits, forward, token_mask, draw(st.integers(1, min(2, experts)))


@given(layers(), st.booleans())
def test_tokens_go_to_their_best_open_experts(layer, biased):
    logits, forward, token_mask, k = layer
    bias = np.linspace(-1, 2, len(forward), dtype=np.float32) if biased else None
    gates, assignment = assign(logits, budget_of(forward, bias), token_mask, RouterRule(k))
    logits = logits if bias is None else logits + bias
    exact = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(gates, exact / exact.sum(-1, keepdims=True), rtol=1e-5)
    for token in range(len(logits)):
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
    logits, forward, token_mask, k = layer
    gates, assignment = assign(logits, budget_of(np.ones_like(forward)), token_mask, RouterRule(k))
    taken = np.take_along_axis(np.asarray(gates), np.asarray(assignment.expert), axis=1)
    np.testing.assert_array_equal(assignment.weight, np.where(token_mask[:, None], taken, 0))
    chosen = np.asarray(own_choice(gates, token_mask, RouterRule(k)))
    assert set(chosen.sum(-1)[token_mask].tolist()) <= {k}
    assert not chosen[~token_mask].any()
    unasked = budget_of(forward)._replace(forward=None)
    jax.tree.map(
        np.testing.assert_array_equal, (gates, assignment), assign(logits, unasked, token_mask, RouterRule(k))
    )


def test_load_balancing_is_one_when_even_and_the_number_of_experts_when_not():
    even = np.full((1, 4, 4), 0.25, np.float32)
    chosen = np.eye(4, dtype=bool)[None]
    mask = np.ones(4, bool)
    np.testing.assert_allclose(load_balancing_loss(even, chosen, mask), 1.0, rtol=1e-6)
    one = np.zeros((1, 4, 4), np.float32)
    one[..., 0] = 1
    np.testing.assert_allclose(load_balancing_loss(one, one > 0, mask), 4.0, rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_each_familys_balance_is_what_its_code_computes(seed, k):
    """DeepSeek's counts and mean scores by text; for Mixtral means over the tokens of all layers."""
    layers, texts, tokens, experts = 2, 3, 4, 5
    rng = np.random.default_rng(seed)
    gates = rng.dirichlet(np.ones(experts), (layers, texts * tokens)).astype(np.float32)
    mask = np.arange(tokens) < rng.integers(0, tokens + 1, texts)[:, None]
    mask[0, 0] = True
    own = np.asarray(own_choice(gates, mask.reshape(-1), RouterRule(k)))
    found = load_balancing_loss(gates, own, mask.reshape(-1), tokens)
    for layer in range(layers):
        losses = []
        for text in range(texts):
            real = np.flatnonzero(mask[text]) + text * tokens
            if len(real):
                count = own[layer, real].sum(0) / (len(real) * k / experts)
                losses.append(np.sum(count * gates[layer, real].mean(0, dtype=np.float64)))
        np.testing.assert_allclose(found[layer], np.mean(losses), rtol=1e-5)
    real = mask.reshape(-1)
    together, sent = (np.concatenate([x[layer][real] for layer in range(layers)]) for x in (gates, own))
    expected = experts * np.sum(sent.mean(0) * together.mean(0, dtype=np.float64))
    np.testing.assert_allclose(model_balance(gates, own, real), np.full(layers, expected), rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (2, 1)]), st.booleans())
def test_groups_renormalisation_and_scale_are_what_a_loop_gives(seed, groups, renormalise):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, 8)).astype(np.float32)
    rule = RouterRule(2, renormalise, 1.5, *groups)
    mask = np.ones(5, bool)
    gates, (expert, weight) = assign(logits, budget_of(np.ones(8, bool)), mask, rule)
    for n in range(5):
        parts = np.asarray(gates)[n].reshape(groups[0], -1)
        best = set(np.argsort(-parts.max(axis=1))[: groups[1]])
        size = 8 // groups[0]
        order = [e for e in np.argsort(-np.asarray(gates)[n]) if e // size in best][:2]
        assert np.asarray(expert)[n].tolist() == order
        expected = np.asarray(gates)[n][order]
        expected = 1.5 * (expected / expected.sum() if renormalise else expected)
        np.testing.assert_allclose(np.asarray(weight)[n], expected, rtol=1e-5)
    chosen = np.asarray(own_choice(gates, mask, rule))
    assert all(set(np.flatnonzero(row)) == set(map(int, e)) for row, e in zip(chosen, expert, strict=True))
