"""Local training against the masked oracle: what is selected, what moves, what is reported."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from masked_oracle import bits, local_round, whole
from tiny import TOKENS, VOCABULARY, tiny_batches, tiny_config, tiny_model, tiny_params

from hfedmoe_jax import client as c
from hfedmoe_jax.optimizers import build_optimizer, per_expert
from hfedmoe_jax.reports import DROPPED_OUT, NONFINITE, OK, OVER_BUDGET
from hfedmoe_jax.scores import routing_importance, units_of, usage, usage_over_batches
from hfedmoe_jax.scoring import build_scoring
from hfedmoe_jax.tasks import classification

LAYERS, EXPERTS, STEPS = 2, 3, 3
ALL = LAYERS * EXPERTS
ROWS = 40  # of the embedding table, less than the vocabulary
SGD = {"client__optimizer": "sgd", "client__learning_rate": 0.2}
# A large epsilon: where a gradient is nearly zero, Adam would follow the sign of rounding errors.
ADAM = {"client__optimizer": "adam", "client__learning_rate": 0.02, "client__epsilon": 1e-2}
ACTIVE = {"fl__forward": "active"}


def member(config, seed=0, budget=2, available=True):
    batch = tiny_batches(seed, config.fl.local_steps, config.fl.batch_size)
    budget, available = np.int32(budget), np.bool_(available)
    return c.ClientData(np.int32(seed), batch, np.float32(10), budget, available, np.float32(1))


@functools.cache
def setup(
    score="information_bottleneck", tier=2, fail_over_budget=False, proximal_mu=0.0, rows=ROWS, **fields
):
    config = tiny_config(**fields)
    optimizer = build_optimizer(config.client, config.client.optimizer, "client")
    rule = c.LocalRule(build_scoring(config, score or "none"), fail_over_budget, proximal_mu)
    train = c.make_client(tiny_model(config), classification, optimizer, rule, config, tier, rows)

    @jax.jit
    def trained(start, data, key):
        return train(c.Broadcast(start, {}, (), key), data)

    return config, tiny_params(), trained


def moved(params, start):
    """bool [L, E]: experts whose parameters changed."""
    pairs = zip(*map(jax.tree.leaves, (params.experts, start.experts)), strict=True)
    return np.any([np.any(np.asarray(new) != np.asarray(old), axis=(-1, -2)) for new, old in pairs], axis=0)


CASES = {
    "routed step": dict(tier=2, **SGD),
    "routed step gradient": dict(tier=5, importance__estimate="gradient", **ADAM),
    "routed step gradient norm": dict(tier=2, score="gradient_norm", **SGD),
    "routed previous gradient": dict(
        tier=2, importance__refresh="previous", importance__estimate="gradient", **ADAM
    ),
    "routed round frequency": dict(tier=1, score="frequency", importance__refresh="round", **ADAM),
    "active previous": dict(tier=1, importance__refresh="previous", importance__beta=2.0, **ACTIVE, **ADAM),
    "active previous gradient": dict(
        tier=4, importance__refresh="previous", importance__estimate="gradient", **ACTIVE, **SGD
    ),
    "active round": dict(tier=3, importance__refresh="round", importance__unit="token", **ACTIVE, **SGD),
    # Two experts a token, room for few of them, and layers that are computed twice.
    "two experts, few places": dict(
        tier=3,
        model__top_k=2,
        model__capacity_factor=0.3,
        model__remat=True,
        **ACTIVE,
        **SGD,
        importance__refresh="previous",
    ),
    "no selection": dict(tier=ALL, score=None, fail_over_budget=True, **ADAM),
    "no selection, proximal": dict(tier=ALL, score=None, proximal_mu=3.0, rows=VOCABULARY, **SGD),
}


@pytest.mark.parametrize("case", CASES)
def test_a_round_is_that_of_the_masked_oracle(case):
    """Parameters, selection and reports, for a budget as large as the tier and for a smaller one."""
    config, start, train = setup(**CASES[case])
    arguments = dict(CASES[case])
    tier, score = arguments.pop("tier"), arguments.pop("score", "information_bottleneck")
    mu = arguments.pop("proximal_mu", 0.0)
    for name in ("rows", "fail_over_budget"):
        arguments.pop(name, None)
    for seed, budget in ((0, tier), (3, max(1, tier - 1))):
        data, key = member(config, seed, budget), jax.random.key(1)
        assert len(np.unique(data.batch["tokens"])) <= ROWS < VOCABULARY
        update = train(start, data, key)
        expected = local_round(start, data.batch, budget, score, mu, **arguments)
        after = whole(update, start)
        np.testing.assert_array_equal(update.upload.trained, expected.trained.any(axis=0))
        # Three steps of Adam move a weight by up to 0.06.
        chex.assert_trees_all_close(after, expected.params, rtol=2e-4, atol=5e-5)
        np.testing.assert_array_equal(moved(after, start), update.upload.trained)
        owners = np.flatnonzero(update.upload.trained).tolist()
        found = np.asarray(update.trained.expert).tolist()
        assert found == owners + [ALL] * (len(found) - len(owners)) and update.trained.count == len(owners)
        np.testing.assert_allclose(update.report.loss, expected.cross_entropy.mean(), rtol=1e-4)
        assert update.report.trained_size == pytest.approx(expected.trained.sum() / STEPS)
        union = expected.own.any(axis=2).sum(axis=(1, 2))
        assert update.report.union_size == pytest.approx(union.mean())
        assert update.report.max_union_size == union.max()
        steps = zip(expected.gates, expected.own, data.batch["tokens"] != 0, strict=True)
        parts = [units_of(*step, config.importance.unit) for step in steps]
        used = jnp.stack([usage(units.chosen_gates, units.mask) for units in parts])
        np.testing.assert_allclose(
            update.upload.usage,
            usage_over_batches(used, np.float32([units.mask.sum() for units in parts])),
            rtol=1e-3,
            atol=1e-6,
        )
        lam = config.importance.lam
        important = [routing_importance(units.gates, units.mask, lam) for units in parts]
        np.testing.assert_allclose(update.upload.importance, np.mean(important, axis=0), rtol=1e-3)


@pytest.mark.parametrize(
    "case", ["routed step", "routed previous gradient", "active previous", "active round"]
)
def test_untrained_experts_and_unseen_words_keep_their_parameters_bit_for_bit(case):
    config, start, train = setup(**CASES[case])
    data = member(config)
    update = train(start, data, jax.random.key(1))
    trained = np.asarray(update.upload.trained)
    assert 0 < trained.sum() <= 2 * config.fl.local_steps
    after = whole(update, start)
    for new, old in zip(*map(jax.tree.leaves, (after.experts, start.experts)), strict=True):
        np.testing.assert_array_equal(new[~trained], np.asarray(old)[~trained])
    unseen = np.setdiff1d(np.arange(VOCABULARY), data.batch["tokens"])
    np.testing.assert_array_equal(after.shared["embed"][unseen], np.asarray(start.shared["embed"])[unseen])
    changed = [
        bool(np.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (after.router, start.router)), strict=True)
    ]
    assert all(changed)


@pytest.mark.parametrize("case", CASES)
def test_an_update_holds_no_more_rows_than_the_round_can_touch(case):
    """Shapes alone: nothing is compiled."""
    config, start, train = setup(**CASES[case])
    fields = CASES[case]
    update = jax.eval_shape(train, start, member(config), jax.random.key(0))
    per_round = 1 if fields.get("importance__refresh") == "round" else STEPS
    touched = min(ALL, max(2, fields["tier"] * per_round))  # two at least, see `BankLayout`
    assert update.trained.expert.shape == update.trained.row.shape == (touched,)
    for leaf, whole_leaf in zip(*map(jax.tree.leaves, (update.params.experts, start.experts)), strict=True):
        assert leaf.shape == (touched, *whole_leaf.shape[2:])
    table_rows = fields.get("rows", ROWS)
    assert update.params.shared["embed"].shape[0] == table_rows
    assert (update.token is None) == (table_rows == VOCABULARY)


def test_active_forward_uses_selected_experts_alone():
    """With the forward closed too, the values of the other experts do not matter."""
    config, start, train = setup(score="random", fl__forward="active", importance__refresh="round")
    data = member(config)
    update = train(start, data, jax.random.key(3))
    trained = update.upload.trained
    assert int(trained.sum()) == 2
    # The random choice does not read the experts, so it is the same for other values of the rest.
    other = start._replace(
        experts=jax.tree.map(lambda w: jnp.where(trained[..., None, None], w, 9 * w), start.experts)
    )
    again = train(other, data, jax.random.key(3))
    np.testing.assert_array_equal(again.upload.trained, trained)
    assert bits((update.params, update.report)) == bits((again.params, again.report))


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_the_rate_of_a_round_multiplies_the_learning_rate(optimizer):
    """Of experts and of everything else."""
    fields = CASES["no selection"] | optimizer
    config, start, train = setup(**fields)
    _, _, train_slowly = setup(**fields | {"client__learning_rate": optimizer["client__learning_rate"] / 4})
    data, key = member(config), jax.random.key(1)
    update, expected = train(start, data._replace(rate=np.float32(0.25)), key), train_slowly(start, data, key)
    chex.assert_trees_all_close(update.params, expected.params, rtol=1e-5, atol=1e-6)
    faster = train(start, data, key)
    assert not np.allclose(update.params.router["blocks"]["router"]["kernel"],
                           faster.params.router["blocks"]["router"]["kernel"], atol=1e-6)  # fmt: skip


def test_a_full_budget_trains_as_if_there_were_no_selection():
    config, start, train = setup(tier=ALL, **ADAM)
    _, _, train_all = setup(**CASES["no selection"])
    data = member(config, budget=ALL)
    key = jax.random.key(1)
    selected, everything = train(start, data, key), train_all(start, data, key)
    chex.assert_trees_all_close(selected.params, everything.params, rtol=1e-5, atol=1e-6)


def test_a_client_that_activates_more_than_its_budget_fails():
    config, start, train = setup(**CASES["no selection"])
    key = jax.random.key(1)
    generous = train(start, member(config, budget=ALL), key)
    assert generous.report.status == OK
    tight = int(generous.report.max_union_size) - 1
    assert train(start, member(config, budget=tight), key).report.status == OVER_BUDGET
    assert train(start, member(config, budget=tight + 1), key).report.status == OK


def test_status_names_dropout_and_nonfinite_loss():
    config, start, train = setup(**CASES["routed step"])
    key = jax.random.key(1)
    assert train(start, member(config, available=False), key).report.status == DROPPED_OUT
    broken = jax.tree.map(lambda x: x * jnp.nan, start)
    assert train(broken, member(config), key).report.status == NONFINITE


def test_report_counts_assignments():
    config, start, train = setup(**CASES["no selection"])
    data = member(config)
    update = train(start, data, jax.random.key(1))
    real = LAYERS * np.count_nonzero(data.batch["tokens"]) / config.fl.local_steps
    np.testing.assert_allclose(update.report.assignments, real, rtol=1e-6)
    np.testing.assert_allclose(update.report.trained_assignments, real, rtol=1e-6)
    assert update.report.dropped == 0  # the tiny model has room for every token
    room = config.fl.batch_size * TOKENS  # of an expert: the capacity factor is the number of experts
    np.testing.assert_allclose(update.report.empty_slots, 1 - real / (ALL * room), rtol=1e-6)
    np.testing.assert_allclose(update.report.padding, np.mean(data.batch["tokens"] == 0), rtol=1e-6)
    assert np.all(np.sum(update.upload.usage, axis=1) <= 1 + 1e-6)


def test_experts_that_do_not_run_have_no_empty_slots():
    config, start, train = setup(score="random", fl__forward="active", importance__refresh="round")
    report = train(start, member(config), jax.random.key(3)).report
    room = 2 * config.fl.batch_size * TOKENS
    np.testing.assert_allclose(report.empty_slots, 1 - report.assignments / room, rtol=1e-6)


def test_a_bfloat16_client_keeps_float32():
    """Shapes alone; how near its gradients are is for test_experts."""
    config, start, train = setup(**CASES["routed step"], model__precision="bfloat16")
    update = jax.eval_shape(train, start, member(config), jax.random.key(0))
    numbers = jax.tree.leaves((update.params, update.upload.usage, update.report.loss))
    assert {leaf.dtype for leaf in numbers} == {jnp.dtype("float32")}


@given(
    hnp.arrays(np.int32, (2, 7), elements=st.integers(0, 11)),
    st.sampled_from([10, 12, 13]),
)
def test_distinct_tokens_are_the_sorted_distinct_tokens(tokens, size):
    if len(np.union1d(tokens, 0)) > size:
        return
    used, index = c.distinct_tokens(tokens, 12, size)
    if size >= 12:
        assert used is None
        np.testing.assert_array_equal(index, tokens)
        return
    distinct = np.union1d(tokens, 0)
    np.testing.assert_array_equal(used[: len(distinct)], distinct)
    np.testing.assert_array_equal(used[len(distinct) :], 12)
    np.testing.assert_array_equal(np.asarray(used)[np.asarray(index)], tokens)


def test_optimizer_state_of_untrained_experts_does_not_move():
    """Each expert's Adam is the Adam of its own steps, count and bias correction included."""
    params = tiny_params()
    adam = optax.adam(1e-2)
    optimizer = per_expert(adam)
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    gradients = [
        jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params) for _ in range(3)
    ]
    masks = [rng.random((LAYERS, EXPERTS)) < 0.5 for _ in range(3)]
    now = params
    for gradient, trained in zip(gradients, masks, strict=True):
        before, state_before = now, state
        now, state = optimizer.update(gradient, state, now, trained)
        for new, old in zip(*map(jax.tree.leaves, (state.experts, state_before.experts)), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[~trained], np.asarray(old)[~trained])
        np.testing.assert_array_equal(moved(now, before), trained)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):

            def of(tree, layer=layer, expert=expert):
                return jax.tree.map(lambda x: x[layer, expert], tree.experts)

            alone, alone_state = of(params), adam.init(of(params))
            for gradient, trained in zip(gradients, masks, strict=True):
                if trained[layer, expert]:
                    updates, alone_state = adam.update(of(gradient), alone_state, alone)
                    alone = optax.apply_updates(alone, updates)
            chex.assert_trees_all_close(of(now), alone, rtol=1e-5, atol=1e-7)
