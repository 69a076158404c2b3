"""Local training: what is selected, what moves, what is reported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_batches, tiny_config, tiny_model, tiny_params

from hfedmoe_jax import client as c
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import load_balancing_loss, open_controls, own_choice
from hfedmoe_jax.optimizers import build_optimizer, per_expert
from hfedmoe_jax.scores import information_bottleneck_score, redundancy, routing_importance
from hfedmoe_jax.selection import select

LAYERS, EXPERTS = 2, 3


def member(config, seed=0, budget=2, available=True, steps=None):
    tokens, labels = tiny_batches(seed, steps or config.fl.local_steps, config.fl.batch_size)
    return c.ClientData(np.int32(seed), tokens, labels, np.float32(10), np.int32(budget), np.bool_(available))


@functools.cache
def setup(score="information_bottleneck", fail_over_budget=False, proximal_mu=0.0, **fields):
    config = tiny_config(**fields)
    model = tiny_model(config)
    optimizer = build_optimizer(config.client, config.client.optimizer, "client")
    train = jax.jit(
        c.make_client(model, optimizer, c.LocalRule(score, fail_over_budget, proximal_mu), config)
    )
    return config, model, tiny_params(), train


def moved(update, start):
    """bool [L, E]: experts whose parameters changed."""
    changes = [
        np.any(np.asarray(new) != np.asarray(old), axis=(-1, -2))
        for new, old in zip(
            jax.tree.leaves(update.params.experts), jax.tree.leaves(start.experts), strict=True
        )
    ]
    return np.any(changes, axis=0)


@pytest.mark.parametrize(
    ("forward", "refresh", "estimate"),
    [("routed", "step", "routing"), ("routed", "previous", "gradient"), ("active", "step", "gradient"),
     ("active", "previous", "routing")],
)  # fmt: skip
def test_untrained_experts_keep_their_parameters_bit_for_bit(forward, refresh, estimate):
    config, _, start, train = setup(
        fl__forward=forward, importance__refresh=refresh, importance__estimate=estimate
    )
    update = train(start, member(config), jax.random.key(1))
    trained = np.asarray(update.upload.trained)
    assert 0 < trained.sum() <= 2 * config.fl.local_steps
    np.testing.assert_array_equal(moved(update, start), trained)
    assert float(update.report.trained_size) <= 2
    assert all(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (update.params.router, start.router)), strict=True)
    )


@pytest.mark.parametrize("estimate", ["routing", "gradient"])
def test_one_step_trains_the_selection_of_equation_15(estimate):
    """The same step composed by hand from the equations, on the dense model."""
    config, model, start, train = setup(
        importance__estimate=estimate, client__optimizer="sgd", client__learning_rate=0.1, fl__local_steps=1
    )
    data = member(config, budget=2)
    update = train(start, data, jax.random.key(1))

    tokens, labels = data.tokens[0], data.labels[0]
    mask = tokens.reshape(-1) != 0
    everything = open_controls(LAYERS, EXPERTS)

    def cross_entropy(params, controls):
        logits, routing = model.apply(params, tokens, controls, True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), routing

    plain, routing = jax.jit(cross_entropy)(start, everything)
    if estimate == "routing":
        information = routing_importance(routing.gates, mask, config.importance.lam)
    else:
        by_multiplier = jax.grad(lambda z: cross_entropy(start, everything._replace(multiplier=z))[0])
        information = -jax.jit(by_multiplier)(everything.multiplier)
    score = information_bottleneck_score(information, redundancy(routing.gates, mask), config.importance.beta)
    active = select(score, np.asarray(routing.chosen).any(axis=1), 2)

    def objective(params):
        loss, routing = cross_entropy(params, everything._replace(backward=active))
        own = own_choice(routing.gates, mask, model.top_k)
        return loss + config.model.load_balance * load_balancing_loss(routing.gates, own, mask)

    gradient = jax.jit(jax.grad(objective))(start)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start, gradient)
    np.testing.assert_array_equal(update.upload.trained, active)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), update.params, expected)
    np.testing.assert_allclose(update.report.loss, plain, rtol=1e-5)


@pytest.mark.parametrize("forward", ["routed", "active"])
def test_a_running_score_is_half_old_half_new(forward):
    """`refresh=previous` over two steps, composed by hand: probe, step, running score, step."""
    config, model, start, train = setup(
        importance__refresh="previous", fl__local_steps=2, fl__forward=forward, client__optimizer="sgd",
        client__learning_rate=0.5, importance__beta=2.0,
    )  # fmt: skip
    data, budget = member(config, seed=5, budget=2), 2
    _, _, _, one_step = setup(
        importance__refresh="previous", fl__local_steps=1, fl__forward=forward, client__optimizer="sgd",
        client__learning_rate=0.5, importance__beta=2.0,
    )  # fmt: skip

    def look(params, step, controls):
        tokens = data.tokens[step]
        mask = tokens.reshape(-1) != 0
        _, routing = jax.jit(model.apply, static_argnums=3)(params, tokens, controls, True)
        information = routing_importance(routing.gates, mask, config.importance.lam)
        kl = redundancy(routing.gates, mask)
        own = own_choice(routing.gates, mask, model.top_k)
        return information_bottleneck_score(information, kl, 2.0), np.asarray(own).any(axis=1), routing

    everything = open_controls(LAYERS, EXPERTS)
    first, union, _ = look(start, 0, everything)
    active = select(first, union, budget)
    # The training pass of step 0 sees the same gates in the first layer, others below closed experts.
    during = everything._replace(
        forward=active if forward == "active" else everything.forward, backward=active
    )
    fresh, seen, _ = look(start, 0, during)
    running = 0.5 * np.asarray(first) + 0.5 * np.asarray(fresh)
    key = jax.random.key(1)
    after = one_step(start, jax.tree.map(lambda x: x[:1] if x.ndim > 1 else x, data), key).params
    chosen = np.asarray(select(running, union | seen, budget))
    during = everything._replace(forward=chosen if forward == "active" else everything.forward)
    reached = np.asarray(look(after, 1, during)[2].chosen).any(axis=1)
    update = train(start, data, key)
    first_trained = np.asarray(active) & np.asarray(
        look(start, 0, everything._replace(forward=active if forward == "active" else everything.forward))[
            2
        ].chosen
    ).any(axis=1)
    np.testing.assert_array_equal(update.upload.trained, first_trained | (chosen & reached))


def test_gradient_norms_need_a_pass_of_their_own():
    with pytest.raises(InputError, match=r"importance\.refresh='previous'.*use importance\.refresh=step"):
        setup(score="gradient_norm", importance__refresh="previous")


def test_active_forward_uses_selected_experts_alone():
    """With the forward closed too, the values of the other experts do not matter."""
    config, _, start, train = setup(score="random", fl__forward="active", fl__local_steps=1)
    data = member(config)
    update = train(start, data, jax.random.key(3))
    trained = update.upload.trained
    # The random choice does not read the experts, so it is the same for other values of the rest.
    other = start._replace(
        experts=jax.tree.map(lambda w: jnp.where(trained[..., None, None], w, 9 * w), start.experts)
    )
    again = train(other, data, jax.random.key(3))
    if np.array_equal(trained, again.upload.trained) and float(trained.sum()) == 2:
        np.testing.assert_array_equal(update.report.loss, again.report.loss)
    else:
        pytest.fail("the random selection changed with the experts' values")


def test_a_full_budget_trains_as_if_there_were_no_selection():
    config, _, start, train = setup()
    _, _, _, train_all = setup(score=None)
    data = member(config, budget=LAYERS * EXPERTS)
    key = jax.random.key(1)
    selected, everything = train(start, data, key), train_all(start, data, key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        selected.params,
        everything.params,
    )


def test_a_client_that_activates_more_than_its_budget_fails():
    config, _, start, train = setup(score=None, fail_over_budget=True)
    key = jax.random.key(1)
    generous = train(start, member(config, budget=LAYERS * EXPERTS), key)
    assert generous.report.status == c.OK
    tight = int(generous.report.max_union_size) - 1
    assert train(start, member(config, budget=tight), key).report.status == c.OVER_BUDGET
    assert train(start, member(config, budget=tight + 1), key).report.status == c.OK


def test_status_names_dropout_and_nonfinite_loss():
    config, _, start, train = setup()
    key = jax.random.key(1)
    assert train(start, member(config, available=False), key).report.status == c.DROPPED_OUT
    broken = jax.tree.map(lambda x: x * jnp.nan, start)
    assert train(broken, member(config), key).report.status == c.NONFINITE


def test_proximal_term_holds_a_client_back():
    config, _, start, free = setup(score=None, client__optimizer="sgd", client__learning_rate=0.05)
    _, _, _, held = setup(score=None, proximal_mu=10.0, client__optimizer="sgd", client__learning_rate=0.05)
    data, key = member(config, steps=8), jax.random.key(1)

    def distance(update):
        return float(optax.tree.norm(optax.tree.sub(update.params, start)))

    assert distance(held(start, data, key)) < 0.9 * distance(free(start, data, key))


def test_report_counts_assignments():
    config, model, start, train = setup(score=None)
    data = member(config)
    update = train(start, data, jax.random.key(1))
    real = LAYERS * np.count_nonzero(data.tokens) / config.fl.local_steps
    np.testing.assert_allclose(update.report.assignments, real * model.top_k, rtol=1e-6)
    np.testing.assert_allclose(update.report.trained_assignments, real * model.top_k, rtol=1e-6)
    assert update.report.dropped == 0  # the tiny model has room for every token
    np.testing.assert_allclose(np.sum(update.upload.usage, axis=1) <= 1, True)


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
        np.testing.assert_array_equal(moved(c.ClientUpdate(now, None, None), before), trained)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):

            def of(tree, layer=layer, expert=expert):
                return jax.tree.map(lambda x: x[layer, expert], tree.experts)

            alone, alone_state = of(params), adam.init(of(params))
            for gradient, trained in zip(gradients, masks, strict=True):
                if trained[layer, expert]:
                    updates, alone_state = adam.update(of(gradient), alone_state, alone)
                    alone = optax.apply_updates(alone, updates)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), of(now), alone)
