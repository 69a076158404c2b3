"""When and by what experts are scored: which settings are refused, and what a batch selects by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from hfedmoe_jax import scoring as r
from hfedmoe_jax.devices import NO_SCORING, ScoringPasses
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import RouterRule, Routing, own_choice
from hfedmoe_jax.scores import routing_importance, score_rules, units_of

LAYERS, EXPERTS = 2, 3
MASK = np.array([[True, True, False], [True, False, False], [True, True, True]])
KEY = jax.random.key(0)


def scoring(name, refresh, forward="routed", estimate="routing", unit="sample"):
    config = tiny_config(importance__refresh=refresh, importance__estimate=estimate, importance__unit=unit)
    return r.Scoring(name, config.importance, forward == "routed")


def batch(seed):
    """Returns what the routers did, the contributions and the gradient norms of a made-up batch."""
    rng = np.random.default_rng(seed)
    gates = jax.nn.softmax(2 * rng.standard_normal((LAYERS, MASK.size, EXPERTS)).astype(np.float32))
    own = own_choice(gates, MASK.reshape(-1), RouterRule(1))
    sent = jnp.sum(own, axis=1)
    return (
        Routing(gates, own, sent, sent, jnp.zeros(LAYERS, jnp.int32), jnp.zeros(LAYERS)),
        rng.standard_normal((LAYERS, EXPERTS)).astype(np.float32),
        rng.random((LAYERS, EXPERTS)).astype(np.float32),
    )


def scored(seed, first=True):
    return r.SeenBatch(batch(seed)[0], MASK, KEY, jnp.array(first))


def contributions(evidence, importance):
    """A score that reads contributions, and nothing that normalises them."""
    return evidence.contribution


def both_gradients(evidence, importance):
    return evidence.contribution + evidence.gradient_norm


@pytest.fixture(autouse=True, scope="module")
def registered():
    """Scores of this module's own, taken out again."""
    with pytest.MonkeyPatch.context() as patch:
        for score in (contributions, both_gradients):
            patch.setitem(score_rules._parts, score.__name__, score)
        yield


ACCEPTED = {
    # (score, estimate): (refresh, forward) that work.
    (
        "information_bottleneck",
        "routing",
    ): "routed step, routed previous, routed round, active previous, active round",
    ("frequency", "routing"): "routed step, routed previous, routed round, active previous, active round",
    ("random", "gradient"): "routed step, routed previous, routed round, active previous, active round",
    ("information_bottleneck", "gradient"): "routed step, routed previous, active previous",
    ("contributions", "routing"): "routed step, routed previous, active previous",
    ("gradient_norm", "routing"): "routed step",
    ("both_gradients", "routing"): "routed step",
}


@pytest.mark.parametrize("refresh", ["step", "previous", "round"])
@pytest.mark.parametrize("forward", ["routed", "active"])
@pytest.mark.parametrize(("score", "estimate"), ACCEPTED)
def test_what_cannot_be_had_is_refused(score, estimate, forward, refresh):
    if f"{forward} {refresh}" in ACCEPTED[score, estimate].split(", "):
        scoring(score, refresh, forward, estimate)
        return
    with pytest.raises(InputError, match=rf"importance\.refresh='{refresh}'.*use ") as caught:
        scoring(score, refresh, forward, estimate)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("score", "refresh", "forward", "remedy"),
    [
        ("gradient_norm", "previous", "routed", "use importance.refresh=step with the score gradient_norm"),
        ("contributions", "round", "active", "use importance.refresh=previous"),
        ("frequency", "step", "active", "use importance.refresh=previous or round, or fl.forward=routed"),
    ],
)
def test_a_refusal_says_what_works_instead(score, refresh, forward, remedy):
    with pytest.raises(InputError) as caught:
        scoring(score, refresh, forward)
    assert remedy in str(caught.value)


def test_only_gradient_norms_and_a_closed_forward_cost_passes():
    assert scoring("gradient_norm", "step").passes(7) == ScoringPasses(7, shared=2, experts=3)
    assert scoring("contributions", "previous").passes(7) == NO_SCORING
    assert scoring("information_bottleneck", "round").passes(7) == NO_SCORING
    assert scoring("frequency", "previous", "active").passes(7) == ScoringPasses(1, shared=1, experts=0)


def unread():
    raise AssertionError("gradient norms cost a backward pass")


def routed_scores(score, refresh, seeds, norms=False):
    """Returns the score and the eligible experts that each batch selects by."""
    rule, known, asked = scoring(score, refresh), scoring(score, refresh).start(LAYERS, EXPERTS), []
    for index, seed in enumerate(seeds):
        _, contribution, norm = batch(seed)
        now = scored(seed, index == 0)
        known = rule.of_batch(known, now, (lambda n=norm: n) if norms else unread)
        asked.append((np.asarray(known.score), np.asarray(known.eligible)))
        known = rule.after_batch(known, now, contribution, None)
    return asked


def units(seed, unit="sample"):
    seen = batch(seed)[0]
    return units_of(seen.gates, seen.own, MASK, unit)


def of(score, seed, contribution=None, unit="sample"):
    """Returns the plain score of one batch, and its union."""
    seen, own_contribution, norm = batch(seed)
    importance = tiny_config().importance
    contribution = own_contribution if contribution is None else contribution
    gates, chosen, _, mask = units(seed, unit)
    evidence = r.Evidence(gates, chosen, mask, KEY, lambda: contribution, lambda: norm)
    return np.asarray(score_rules[score](evidence, importance)), np.asarray(seen.own).any(axis=1)


def stand_in(seed, unit="sample"):
    gates, _, _, mask = units(seed, unit)
    return np.asarray(routing_importance(gates, mask, tiny_config().importance.lam))


@pytest.mark.parametrize("score", ["information_bottleneck", "frequency"])
def test_step_selects_by_the_batch_itself(score):
    for (found, eligible), seed in zip(routed_scores(score, "step", range(4)), range(4), strict=True):
        expected, union = of(score, seed)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(eligible, union)


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_the_unit_is_that_of_the_config(unit):
    """In scores, and in the routing importance that stands in for contributions; not in the union."""
    rules = scoring("information_bottleneck", "step", unit=unit), scoring("contributions", "step", unit=unit)
    known, by_stand_in = (rule.of_batch(rule.start(LAYERS, EXPERTS), scored(0), unread) for rule in rules)
    expected, union = of("information_bottleneck", 0, unit=unit)
    np.testing.assert_allclose(known.score, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(known.eligible, union)
    np.testing.assert_allclose(by_stand_in.score, stand_in(0, unit), rtol=1e-6)
    other = {"sample": "token", "token": "sample"}[unit]
    assert np.abs(known.score - of("information_bottleneck", 0, unit=other)[0]).max() > 1e-3
    assert np.abs(by_stand_in.score - stand_in(0, other)).max() > 1e-3


def test_step_reads_a_running_mean_of_the_contributions_before_it():
    """c1; then (c1 + c2) / 2; then a quarter, a quarter and a half."""
    c = [batch(seed)[1] for seed in range(3)]
    expected = [stand_in(0), c[0], (c[0] + c[1]) / 2, (c[0] + c[1] + 2 * c[2]) / 4]
    for (found, _), score in zip(routed_scores("contributions", "step", range(4)), expected, strict=True):
        np.testing.assert_allclose(found, score, rtol=1e-5, atol=1e-6)


def test_step_reads_the_norms_of_the_batch_itself():
    for seed, (found, _) in enumerate(routed_scores("gradient_norm", "step", range(3), norms=True)):
        np.testing.assert_array_equal(found, batch(seed)[2])


@pytest.mark.parametrize("score", ["information_bottleneck", "frequency", "contributions"])
def test_previous_selects_by_a_running_mean_of_the_batches_before(score):
    """The first batch has none before it: it is scored itself, contributions by routing importance."""
    start = of(score, 0, stand_in(0))[0]
    past = [of(score, seed)[0] for seed in range(3)]
    second = (start + past[0]) / 2
    third = (second + past[1]) / 2
    expected = [start, second, third, (third + past[2]) / 2]
    for seed, (found, eligible) in enumerate(routed_scores(score, "previous", range(4))):
        np.testing.assert_allclose(found, expected[seed], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(eligible, of(score, seed)[1])  # the batch's own union


@pytest.mark.parametrize("score", ["information_bottleneck", "frequency"])
def test_round_keeps_the_first_batch(score):
    expected, union = of(score, 0)
    for found, eligible in routed_scores(score, "round", range(3)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(eligible, union)


@pytest.mark.parametrize("refresh", ["previous", "round"])
def test_active_begins_with_what_the_routers_say(refresh):
    rule = scoring("frequency", refresh, "active")
    known = rule.of_batch(rule.start(LAYERS, EXPERTS), scored(0))
    expected, union = of("frequency", 0)
    np.testing.assert_allclose(known.score, expected)
    np.testing.assert_array_equal(known.eligible, union)
    after = rule.after_batch(known, scored(1), batch(1)[1], jnp.ones((LAYERS, EXPERTS), bool))
    if refresh == "round":
        np.testing.assert_array_equal(after.score, known.score)
        np.testing.assert_array_equal(after.eligible, known.eligible)
    else:
        fresh, more = of("frequency", 1)
        np.testing.assert_allclose(after.score, (expected + fresh) / 2)
        np.testing.assert_array_equal(after.eligible, union | more)


@given(st.integers(0, 2**16))
@settings(max_examples=10)
def test_active_keeps_the_score_of_experts_that_did_not_run(seed):
    """Their contribution was not measured."""
    ran = np.random.default_rng(seed).random((LAYERS, EXPERTS)) < 0.5
    rule = scoring("contributions", "previous", "active")
    known = rule.of_batch(rule.start(LAYERS, EXPERTS), scored(seed))
    contribution = batch(seed + 1)[1]
    after = rule.after_batch(known, scored(seed + 1), contribution, ran)
    np.testing.assert_allclose(
        after.score, np.where(ran, (known.score + contribution) / 2, known.score), rtol=1e-6
    )


@pytest.mark.parametrize("budget", [0, 1, 3, 6])
def test_selection_is_of_the_eligible_within_the_budget(budget):
    rule = scoring("frequency", "step")
    known = rule.of_batch(rule.start(LAYERS, EXPERTS), scored(3), unread)
    active = np.asarray(rule.select(known, budget))
    assert active.sum() == min(budget, int(known.eligible.sum()))
    assert not active[~np.asarray(known.eligible)].any()
