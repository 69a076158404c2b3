"""Equations (3)-(5), (10)-(14), (16) against loops in float64, written from the formulas."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hfedmoe_jax import scores as s
from hfedmoe_jax.errors import InputError

TOLERANCE = dict(rtol=2e-5, atol=2e-6)
UNITS = pytest.mark.parametrize("unit", ["sample", "token"])


class Routing(NamedTuple):
    """A made-up batch: gates and chosen [L, B * T, E], token_mask [B, T]."""

    gates: np.ndarray
    chosen: np.ndarray
    token_mask: np.ndarray


@st.composite
def routings(draw, length=None):
    """Draws a `Routing` whose first sample has a real token and, if there are several, whose last has none.

    Args:
      length: of every sample, padding not counted; None for unequal ones.
    """
    # Few shapes, because each compiles anew.
    layers, samples, tokens, experts = 2, draw(st.sampled_from((1, 4))), 5, draw(st.sampled_from((1, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 10.0]))
    logits = sharpness * rng.standard_normal((layers, samples * tokens, experts))
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    gates = (gates / gates.sum(-1, keepdims=True)).astype(np.float32)
    lengths = rng.integers(1, tokens + 1, samples) if length is None else np.full(samples, length)
    if samples > 1:
        lengths[-1] = 0
    token_mask = rng.permuted(np.arange(tokens) < lengths[:, None], axis=1)
    rank = np.argsort(np.argsort(-gates, axis=-1, kind="stable"), axis=-1)
    chosen = (rank < draw(st.integers(1, experts))) & token_mask.reshape(-1, 1)
    return Routing(gates, chosen, token_mask)


def loop(routing, unit, one_expert, of_token=lambda gate, chosen: gate):
    """Applies `one_expert(list of the units' values)` to each (layer, expert)."""
    gates, chosen, token_mask = routing
    layers, _, experts = gates.shape
    samples, tokens = token_mask.shape
    result = np.zeros((layers, experts))
    for layer in range(layers):
        for expert in range(experts):
            by_sample = []
            for sample in range(samples):
                real = []
                for token in range(tokens):
                    at = layer, sample * tokens + token, expert
                    if token_mask[sample, token]:
                        real.append(of_token(float(gates[at]), bool(chosen[at])))
                by_sample.append(real)
            every_token = [value for real in by_sample for value in real]
            every_sample = [mean(real) for real in by_sample if real]
            result[layer, expert] = one_expert(every_token if unit == "token" else every_sample)
    return result


def mean(values):
    return sum(values) / len(values)


def kl(values):
    prior = mean(values)
    return sum(g * math.log(g / prior) for g in values if g > 0) / len(values)


def chosen_gate(gate, chosen):
    return gate if chosen else 0.0


def was_chosen(gate, chosen):
    return float(chosen)


def measures(routing, unit):
    """Returns every equation of a batch, by name."""
    units = s.units_of(*routing, unit)
    return dict(
        cumulative=s.cumulative(units.gates, units.mask),
        specific=s.specific(units.gates, units.mask),
        importance=s.routing_importance(units.gates, units.mask, 0.3),
        redundancy=s.redundancy(units.gates, units.mask),
        usage=s.usage(units.chosen_gates, units.mask),
        frequency=s.masked_mean(units.chosen, units.mask),
        union=jnp.float32(s.union(routing.chosen)),
    )


def assert_same(one, other):
    for name in one:
        np.testing.assert_allclose(one[name], other[name], err_msg=name, **TOLERANCE)


@UNITS
@given(routings(), st.floats(0, 1))
def test_importance_is_the_mix_of_mean_and_maximum(unit, routing, lam):
    units = s.units_of(*routing, unit)
    found = (
        s.cumulative(units.gates, units.mask),
        s.specific(units.gates, units.mask),
        s.routing_importance(units.gates, units.mask, lam),
    )
    formulas = (mean, max, lambda g: lam * mean(g) + (1 - lam) * max(g))
    for value, one_expert in zip(found, formulas, strict=True):
        np.testing.assert_allclose(value, loop(routing, unit, one_expert), **TOLERANCE)


@UNITS
@given(routings())
def test_redundancy_is_the_mean_divergence_from_the_prior(unit, routing):
    units = s.units_of(*routing, unit)
    result = s.redundancy(units.gates, units.mask)
    np.testing.assert_allclose(result, loop(routing, unit, kl), **TOLERANCE)
    assert np.all(np.asarray(result) >= -1e-6)


@UNITS
@given(routings())
def test_usage_and_frequency_count_the_chosen_experts(unit, routing):
    units = s.units_of(*routing, unit)
    np.testing.assert_allclose(
        s.usage(units.chosen_gates, units.mask), loop(routing, unit, mean, chosen_gate), **TOLERANCE
    )
    np.testing.assert_allclose(
        s.masked_mean(units.chosen, units.mask), loop(routing, unit, mean, was_chosen), **TOLERANCE
    )


def test_units_of_a_batch_by_hand():
    """Two experts; samples of two real tokens, one real token and none."""
    gates = np.float32([[[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [1, 0], [1, 0], [0, 1]]])
    token_mask = np.array([[True, True], [True, False], [False, False]])
    chosen = np.array([[[True, False], [False, True], [True, False], *3 * [[False, False]]]])
    samples = s.units_of(gates, chosen, token_mask, "sample")
    np.testing.assert_array_equal(samples.mask, [True, True, False])
    np.testing.assert_array_equal(samples.gates[:, :2], [[[0.5, 0.5], [0.5, 0.5]]])
    np.testing.assert_array_equal(samples.chosen, [[[0.5, 0.5], [1, 0], [0, 0]]])
    np.testing.assert_array_equal(samples.chosen_gates, [[[0.375, 0.375], [0.5, 0], [0, 0]]])
    tokens = s.units_of(gates, chosen, token_mask, "token")
    np.testing.assert_array_equal(tokens.mask, token_mask.reshape(-1))
    np.testing.assert_array_equal(tokens.gates, gates)
    np.testing.assert_array_equal(tokens.chosen, chosen)
    np.testing.assert_array_equal(s.specific(samples.gates, samples.mask), [[0.5, 0.5]])
    np.testing.assert_array_equal(s.specific(tokens.gates, tokens.mask), [[0.75, 0.75]])


@given(routings(), routings(length=2), st.sampled_from(["sample", "token"]))
def test_layers_that_see_other_tokens_are_measured_each_on_its_own(one, other, unit):
    assume(one.gates.shape == other.gates.shape)
    pair = Routing(*(np.stack([a[0], b[0]]) for a, b in zip(one[:2], other[:2], strict=True)),
                   np.stack([one.token_mask, other.token_mask]))  # fmt: skip
    together = measures(pair, unit)
    for layer, routing in enumerate((one, other)):
        for name, value in measures(routing, unit).items():
            np.testing.assert_allclose(together[name][layer], value[0], err_msg=name, **TOLERANCE)


@given(routings(), st.randoms())
def test_samples_in_another_order_are_the_same_batch(routing, random):
    samples, tokens = routing.token_mask.shape
    order = random.sample(range(samples), samples)
    by_token = (np.array(order)[:, None] * tokens + np.arange(tokens)).reshape(-1)
    moved = Routing(routing.gates[:, by_token], routing.chosen[:, by_token], routing.token_mask[order])
    assert_same(measures(moved, "sample"), measures(routing, "sample"))


@UNITS
@given(routings())
def test_more_padding_changes_nothing(unit, routing):
    """Another three tokens at the end of each sample, then another sample, with any gates."""
    layers, _, experts = routing.gates.shape
    samples, tokens = routing.token_mask.shape
    rng = np.random.default_rng(0)

    def padded(values, fill):
        by_sample = fill((layers, samples + 1, tokens + 3, experts)).astype(values.dtype)
        by_sample[:, :samples, :tokens] = values.reshape(layers, samples, tokens, experts)
        return by_sample.reshape(layers, -1, experts)

    token_mask = np.pad(routing.token_mask, ((0, 1), (0, 3)))
    longer = Routing(padded(routing.gates, rng.random), padded(routing.chosen, np.zeros), token_mask)
    assert_same(measures(longer, unit), measures(routing, unit))


@UNITS
@given(routings())
def test_gates_of_padding_are_not_read(unit, routing):
    broken = np.where(routing.token_mask.reshape(-1, 1), routing.gates, np.float32(np.nan))
    found, expected = measures(routing._replace(gates=broken), unit), measures(routing, unit)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@given(routings(length=1))
def test_samples_of_one_token_are_their_tokens(routing):
    assert_same(measures(routing, "sample"), measures(routing, "token"))


@UNITS
def test_a_batch_without_a_real_token_measures_zero(unit):
    gates = np.full((2, 6, 3), 1 / 3, np.float32)
    nothing = Routing(gates, np.zeros(gates.shape, bool), np.zeros((2, 3), bool))
    for name, value in measures(nothing, unit).items():
        np.testing.assert_array_equal(value, np.zeros((2, 3)), err_msg=name)


@UNITS
def test_measures_are_float32_and_the_same_for_a_chunk_of_clients(unit):
    rng = np.random.default_rng(0)
    gates = np.asarray(jax.nn.softmax(rng.standard_normal((4, 2, 6, 3)).astype(np.float32)))
    token_mask = rng.random((4, 2, 3)) < 0.7
    batches = Routing(gates, (gates > 0.4) & token_mask.reshape(4, 1, 6, 1), token_mask)
    together = jax.jit(jax.vmap(lambda routing: measures(routing, unit)))(jax.tree.map(jnp.asarray, batches))
    for index in range(4):
        alone = measures(jax.tree.map(lambda x, index=index: x[index], batches), unit)
        for name, value in alone.items():
            assert value.dtype == together[name].dtype == np.float32
            np.testing.assert_allclose(together[name][index], value, err_msg=name, **TOLERANCE)


def test_redundancy_vanishes_where_gates_do_not_depend_on_the_unit():
    gates = np.broadcast_to(np.float32([0.7, 0.2, 0.1]), (1, 5, 3))
    np.testing.assert_allclose(s.redundancy(gates, np.ones(5, bool)), 0, atol=1e-7)


def test_redundancy_of_a_dead_expert_is_zero_and_not_nan():
    gates = np.float32([[[1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_array_equal(s.redundancy(gates, np.ones(2, bool)), [[0.0, 0.0]])


def test_redundancy_keeps_its_digits_when_gates_are_nearly_uniform():
    rng = np.random.default_rng(0)
    logits = 1e-4 * rng.standard_normal((1, 50, 4))
    wide = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    routing = Routing(wide.astype(np.float32), np.ones(wide.shape, bool), np.ones((1, 50), bool))
    result = np.asarray(s.redundancy(routing.gates, np.ones(50, bool)))
    np.testing.assert_allclose(result, loop(routing, "token", kl_stable), rtol=0.05)
    assert np.all(result >= 0)


def kl_stable(values):
    prior = mean(values)
    return sum(g * math.log1p((g - prior) / prior) - (g - prior) for g in values) / len(values)


@given(routings(), st.floats(0, 5))
def test_information_bottleneck_score_is_share_less_beta_share(routing, beta):
    information = loop(routing, "sample", mean)
    divergence = loop(routing, "sample", kl)
    total, total_kl = np.abs(information).sum(), np.abs(divergence).sum()
    expected = information / total - beta * (divergence / total_kl if total_kl > 1e-5 else 0 * divergence)
    result = s.information_bottleneck_score(
        jnp.float32(information), jnp.float32(divergence if total_kl > 1e-5 else 0 * divergence), beta
    )
    np.testing.assert_allclose(result, expected, **TOLERANCE)


@given(st.integers(0, 2**16))
def test_usage_over_batches_weighs_each_unit_alike(seed):
    rng = np.random.default_rng(seed)
    count = [3, 0, 5]
    units = [rng.random((2, n, 4)) for n in count]
    usages = np.float32([x.mean(axis=1) if x.size else np.zeros((2, 4)) for x in units])
    expected = np.concatenate(units, axis=1).mean(axis=1)
    np.testing.assert_allclose(s.usage_over_batches(usages, np.float32(count)), expected, rtol=1e-5)
    np.testing.assert_array_equal(s.usage_over_batches(usages, np.zeros(3, np.float32)), np.zeros((2, 4)))


def evidence(routing, unit, contribution=None, gradient_norm=None, key=0):
    units = s.units_of(*routing, unit)
    key = jax.random.key(key)
    return s.Evidence(units.gates, units.chosen, units.mask, key, contribution, gradient_norm)


IMPORTANCE = ConfigDict(dict(lam=0.3, beta=0.7, estimate="routing"))
UNIFORM = Routing(np.full((2, 4, 3), 1 / 3, np.float32), np.ones((2, 4, 3), bool), np.ones((2, 2), bool))


@UNITS
@given(routings())
def test_registered_scores_follow_their_definitions(unit, routing):
    shape = routing.gates.shape[::2]
    contribution = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    given_evidence = evidence(routing, unit, lambda: contribution, lambda: contribution**2)
    redundancy = measures(routing, unit)["redundancy"]
    for estimate, information in (
        ("routing", measures(routing, unit)["importance"]),
        ("gradient", contribution),
    ):
        expected = s.information_bottleneck_score(information, redundancy, 0.7)
        importance = ConfigDict({**IMPORTANCE, "estimate": estimate})
        found = s.score_rules["information_bottleneck"](given_evidence, importance)
        np.testing.assert_array_equal(found, expected)
    frequency = s.score_rules["frequency"](given_evidence, IMPORTANCE)
    np.testing.assert_allclose(frequency, loop(routing, unit, mean, was_chosen), **TOLERANCE)
    np.testing.assert_array_equal(s.score_rules["gradient_norm"](given_evidence, IMPORTANCE), contribution**2)


def test_evidence_computes_gradients_only_when_asked():
    def refuse():
        raise AssertionError("asked for a gradient")

    given_evidence = evidence(UNIFORM, "sample", refuse, refuse)
    s.score_rules["information_bottleneck"](given_evidence, IMPORTANCE)
    with pytest.raises(AssertionError, match="asked for a gradient"):
        s.score_rules["gradient_norm"](given_evidence, IMPORTANCE)


def test_random_scores_depend_on_the_key_alone():
    draw = s.score_rules["random"]
    first = draw(evidence(UNIFORM, "sample", key=1), IMPORTANCE)
    other_gates = UNIFORM._replace(gates=UNIFORM.gates**2)
    np.testing.assert_array_equal(first, draw(evidence(other_gates, "token", key=1), IMPORTANCE))
    assert not np.array_equal(first, draw(evidence(UNIFORM, "sample", key=2), IMPORTANCE))


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
    assert s.gradients_read(s.score_rules[name], importance) == reads


def test_a_score_of_the_wrong_shape_is_refused():
    def by_unit(evidence, importance):
        return evidence.gates

    def nothing(evidence, importance):
        pass

    for score, problem in (
        (by_unit, r"returns an array of shape \(2, 2, 3\)"),
        (nothing, "returns no array"),
    ):
        with pytest.raises(InputError, match=rf"fl\.score='{score.__name__}': {problem}"):
            s.gradients_read(score, IMPORTANCE)
