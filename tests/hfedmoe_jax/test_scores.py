"""Equations (3)-(5), (10)-(14), (16) against loops in float64, written from the formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from strategies import routings

from hfedmoe_jax import scores as s
from hfedmoe_jax.errors import InputError

TOLERANCE = dict(rtol=2e-5, atol=2e-6)


def loop(gates, token_mask, one_expert):
    """Applies `one_expert(list of the real tokens' gates)` to each (layer, expert)."""
    layers, tokens, experts = gates.shape
    result = np.zeros((layers, experts))
    for layer in range(layers):
        for expert in range(experts):
            real = [float(gates[layer, i, expert]) for i in range(tokens) if token_mask[i]]
            result[layer, expert] = one_expert(real)
    return result


def mean(values):
    return sum(values) / len(values)


def kl(values):
    prior = mean(values)
    return sum(g * math.log(g / prior) for g in values if g > 0) / len(values)


@given(routings(), st.floats(0, 1))
def test_importance_is_the_mix_of_mean_and_maximum(routing, lam):
    gates, _, token_mask, _ = routing
    expected = loop(gates, token_mask, lambda g: lam * mean(g) + (1 - lam) * max(g))
    np.testing.assert_allclose(s.routing_importance(gates, token_mask, lam), expected, **TOLERANCE)
    np.testing.assert_allclose(s.cumulative(gates, token_mask), loop(gates, token_mask, mean), **TOLERANCE)
    np.testing.assert_allclose(s.specific(gates, token_mask), loop(gates, token_mask, max), **TOLERANCE)


@given(routings())
def test_redundancy_is_the_mean_divergence_from_the_prior(routing):
    gates, _, token_mask, _ = routing
    result = s.redundancy(gates, token_mask)
    np.testing.assert_allclose(result, loop(gates, token_mask, kl), **TOLERANCE)
    assert np.all(np.asarray(result) >= -1e-6)


def test_redundancy_vanishes_where_gates_do_not_depend_on_the_token():
    gates = np.broadcast_to(np.float32([0.7, 0.2, 0.1]), (1, 5, 3))
    np.testing.assert_allclose(s.redundancy(gates, np.ones(5, bool)), 0, atol=1e-7)


def test_redundancy_of_a_dead_expert_is_zero_and_not_nan():
    gates = np.float32([[[1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_array_equal(s.redundancy(gates, np.ones(2, bool)), [[0.0, 0.0]])


@given(routings(), st.floats(0, 5))
def test_information_bottleneck_score_is_share_less_beta_share(routing, beta):
    gates, _, token_mask, _ = routing
    information = loop(gates, token_mask, mean)
    divergence = loop(gates, token_mask, kl)
    total, total_kl = np.abs(information).sum(), np.abs(divergence).sum()
    expected = information / total - beta * (divergence / total_kl if total_kl > 1e-5 else 0 * divergence)
    result = s.information_bottleneck_score(
        jnp.float32(information), jnp.float32(divergence if total_kl > 1e-5 else 0 * divergence), beta
    )
    np.testing.assert_allclose(result, expected, **TOLERANCE)


@given(routings())
def test_usage_counts_gates_of_chosen_experts_over_all_tokens(routing):
    gates, chosen, token_mask, _ = routing
    layers, tokens, experts = gates.shape
    expected = np.zeros((layers, experts))
    for layer in range(layers):
        for token in range(tokens):
            for expert in range(experts):
                if token_mask[token] and chosen[layer, token, expert]:
                    expected[layer, expert] += float(gates[layer, token, expert])
    np.testing.assert_allclose(s.usage(gates, chosen, token_mask), expected / token_mask.sum(), **TOLERANCE)


@given(routings())
def test_padding_tokens_change_nothing(routing):
    gates, chosen, token_mask, _ = routing
    rng = np.random.default_rng(0)
    other = np.where(token_mask[:, None], gates, rng.random(gates.shape).astype(np.float32))
    for function in (s.cumulative, s.specific, s.redundancy):
        np.testing.assert_array_equal(function(gates, token_mask), function(other, token_mask))
    np.testing.assert_array_equal(s.usage(gates, chosen, token_mask), s.usage(other, chosen, token_mask))


def test_contribution_is_the_likelihood_lost_to_first_order():
    # A loss that is linear in the multipliers: the first order is exact.
    weight = jnp.float32([[0.5, -1.0], [2.0, 0.0]])

    def loss(z):
        return 3.0 - jnp.sum(weight * z)

    ones = jnp.ones((2, 2))
    contribution = s.expert_contribution(loss, ones)
    for layer in range(2):
        for expert in range(2):
            lost = loss(ones.at[layer, expert].set(0.0)) - loss(ones)
            np.testing.assert_allclose(contribution[layer, expert], lost, rtol=1e-6)


def evidence(gates, token_mask, chosen, contribution=None, gradient_norm=None):
    return s.Evidence(gates, chosen, token_mask, jax.random.key(0), contribution, gradient_norm)


IMPORTANCE = ConfigDict(dict(lam=0.3, beta=0.7, estimate="routing"))


@given(routings())
def test_registered_scores_follow_their_definitions(routing):
    gates, chosen, token_mask, _ = routing
    contribution = jnp.asarray(np.random.default_rng(1).standard_normal(gates.shape[::2]), jnp.float32)
    given_evidence = evidence(gates, token_mask, chosen, lambda: contribution, lambda: contribution**2)
    expected = s.information_bottleneck_score(
        s.routing_importance(gates, token_mask, 0.3), s.redundancy(gates, token_mask), 0.7
    )
    np.testing.assert_array_equal(
        s.score_rules["information_bottleneck"](given_evidence, IMPORTANCE), expected
    )
    by_gradient = ConfigDict({**IMPORTANCE, "estimate": "gradient"})
    expected = s.information_bottleneck_score(contribution, s.redundancy(gates, token_mask), 0.7)
    np.testing.assert_array_equal(
        s.score_rules["information_bottleneck"](given_evidence, by_gradient), expected
    )
    counts = (chosen & token_mask[:, None]).sum(axis=1) / token_mask.sum()
    np.testing.assert_allclose(s.score_rules["frequency"](given_evidence, IMPORTANCE), counts, **TOLERANCE)
    np.testing.assert_array_equal(s.score_rules["gradient_norm"](given_evidence, IMPORTANCE), contribution**2)


def test_evidence_computes_gradients_only_when_asked():
    def refuse():
        raise AssertionError("asked for a gradient")

    gates = np.full((1, 2, 3), 1 / 3, np.float32)
    given_evidence = evidence(gates, np.ones(2, bool), gates > 0, refuse, refuse)
    s.score_rules["information_bottleneck"](given_evidence, IMPORTANCE)
    with pytest.raises(AssertionError, match="asked for a gradient"):
        s.score_rules["gradient_norm"](given_evidence, IMPORTANCE)


def test_random_scores_depend_on_the_key_alone():
    gates = np.full((2, 2, 3), 1 / 3, np.float32)
    first = s.Evidence(gates, gates > 0, np.ones(2, bool), jax.random.key(1), None, None)
    again = s.Evidence(gates**2, gates > 0, np.ones(2, bool), jax.random.key(1), None, None)
    other = s.Evidence(gates, gates > 0, np.ones(2, bool), jax.random.key(2), None, None)
    draw = s.score_rules["random"]
    np.testing.assert_array_equal(draw(first, IMPORTANCE), draw(again, IMPORTANCE))
    assert not np.array_equal(draw(first, IMPORTANCE), draw(other, IMPORTANCE))


@pytest.mark.parametrize(
    ("name", "estimate", "reads"),
    [
        ("information_bottleneck", "routing", set()),
        ("information_bottleneck", "gradient", {"contribution"}),
        ("gradient_norm", "routing", {"gradient_norm"}),
        ("random", "routing", set()),
    ],
)
def test_what_a_score_reads_is_known_before_the_run(name, estimate, reads):
    importance = ConfigDict({**IMPORTANCE, "estimate": estimate})
    assert s.gradients_read(s.score_rules[name], importance, 2, 3) == reads


def test_a_score_of_the_wrong_shape_is_refused():
    def by_token(evidence, importance):
        return evidence.gates

    with pytest.raises(InputError, match=r"fl\.score='by_token': returns an array of shape \(2, 2, 3\)"):
        s.gradients_read(by_token, IMPORTANCE, 2, 3)


def test_redundancy_keeps_its_digits_when_gates_are_nearly_uniform():
    rng = np.random.default_rng(0)
    logits = 1e-4 * rng.standard_normal((1, 50, 4))
    wide = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gates = wide.astype(np.float32)
    result = np.asarray(s.redundancy(gates, np.ones(50, bool)))
    np.testing.assert_allclose(result, loop(gates, np.ones(50, bool), kl_stable), rtol=0.05)
    assert np.all(result >= 0)


def kl_stable(values):
    prior = mean(values)
    return sum(g * math.log1p((g - prior) / prior) - (g - prior) for g in values) / len(values)
