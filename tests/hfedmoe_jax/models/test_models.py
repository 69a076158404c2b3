"""The whole model: parameter groups, the controls of a client, both dispatches, its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CLASSES, TOKENS, VOCABULARY, tiny_batches, tiny_config, tiny_model, tiny_params

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import (
    build_model,
    merge_params,
    model_cost,
    open_controls,
    split_params,
    tree_bytes,
)
from hfedmoe_jax.optimizers import build_optimizer, per_expert


def jitted(model):
    """The model with `apply` compiled once a shape."""
    return model._replace(apply=jax.jit(model.apply, static_argnums=3))


@pytest.fixture(scope="module")
def model():
    return jitted(tiny_model(tiny_config(model__top_k=2)))


@pytest.fixture(scope="module")
def params():
    return tiny_params(model__top_k=2)


def test_groups_have_the_promised_axes_and_merge_back(model, params):
    layers, experts = model.num_layers, model.num_experts
    assert all(leaf.shape[:2] == (layers, experts) for leaf in jax.tree.leaves(params.experts))
    assert [leaf.shape for leaf in jax.tree.leaves(params.router)] == [(layers, 8, experts)]
    merged = merge_params(params)
    again = split_params(merged)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert tree_bytes(merged) == sum(tree_bytes(group) for group in params)


def test_both_dispatches_give_the_same_model(params):
    tokens, _ = tiny_batches(1, 4)
    outputs = []
    for dispatch in ("dense", "capacity"):
        config = tiny_config(model__top_k=2)
        model = jitted(build_model(config.model, CLASSES, VOCABULARY, TOKENS, dispatch))
        outputs.append(model.apply(params, tokens, open_controls(2, 3), True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *outputs)


def test_padding_does_not_reach_the_logits(model, params):
    tokens = np.random.default_rng(2).integers(1, VOCABULARY, (3, 5)).astype(np.int32)
    padded = np.pad(tokens, [(0, 0), (0, TOKENS - 5)])
    controls = open_controls(model.num_layers, model.num_experts)
    short, _ = model.apply(params, tokens, controls, True)
    long, routing = model.apply(params, padded, controls, True)
    np.testing.assert_allclose(long, short, rtol=1e-4, atol=1e-5)
    assert not np.asarray(routing.chosen)[:, (padded == 0).reshape(-1)].any()


def test_unselected_experts_get_exactly_zero_gradient_and_routers_do_not(model, params):
    tokens, labels = tiny_batches(3, 4)
    backward = jnp.array([[True, False, False], [False, True, False]])
    controls = open_controls(2, 3)._replace(backward=backward)

    def loss(params, controls):
        logits, _ = model.apply(params, tokens, controls, True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    gradient = jax.jit(jax.grad(loss))(params, controls)
    for leaf in jax.tree.leaves(gradient.experts):
        np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(backward)], 0)
        assert np.all(np.any(np.asarray(leaf)[np.asarray(backward)] != 0, axis=(-1, -2)))
    assert np.all(np.any(np.asarray(jax.tree.leaves(gradient.router)[0]) != 0, axis=1))
    # Forward is untouched by `backward`.
    assert loss(params, controls) == loss(params, open_controls(2, 3))


def test_a_constant_expert_has_the_gradient_of_a_constant(model, params):
    """Closing an expert's backward equals freezing its output at the value it has."""
    tokens, _ = tiny_batches(4, 2)
    closed = open_controls(2, 3)._replace(backward=jnp.zeros((2, 3), bool))

    def logits_sum(shared, controls):
        return jnp.sum(model.apply(params._replace(shared=shared), tokens, controls, True)[0])

    gradient = jax.jit(jax.grad(logits_sum))
    direct, full = gradient(params.shared, closed), gradient(params.shared, open_controls(2, 3))
    difference = [
        float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (direct, full)), strict=True)
    ]
    assert max(difference) > 1e-4  # the path through the experts is gone
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(direct["head"]))  # the others are not


def test_closed_experts_serve_no_token(model, params):
    tokens, _ = tiny_batches(5, 4)
    forward = jnp.array([[True, False, False], [False, False, False]])
    logits, routing = model.apply(params, tokens, open_controls(2, 3)._replace(forward=forward), True)
    served = np.asarray(routing.chosen).any(axis=1)
    np.testing.assert_array_equal(served, forward)
    assert np.all(np.isfinite(logits))
    # Weights of closed experts do not matter at all.
    poisoned = params._replace(
        experts=jax.tree.map(
            lambda w: jnp.where(forward[..., None, None], w, jnp.float32(1e6)), params.experts
        )
    )
    again, _ = model.apply(poisoned, tokens, open_controls(2, 3)._replace(forward=forward), True)
    np.testing.assert_array_equal(logits, again)


def test_multiplier_zero_removes_an_expert(params):
    model = jitted(tiny_model(tiny_config(model__top_k=3)))  # every token uses every expert
    tokens, _ = tiny_batches(6, 2)
    multiplier = jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    without, _ = model.apply(params, tokens, open_controls(2, 3)._replace(multiplier=multiplier), True)
    zeroed = params._replace(experts=jax.tree.map(lambda w: w * multiplier[..., None, None], params.experts))
    expected, _ = model.apply(zeroed, tokens, open_controls(2, 3), True)
    np.testing.assert_allclose(without, expected, rtol=1e-5, atol=1e-6)


def test_cost_counts_the_real_arrays():
    config = tiny_config(model__width=32, model__hidden=64, model__num_heads=4)
    model = tiny_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(per_expert(build_optimizer(config.client, "adam", "client")).init, params)
    cost = model_cost(config.model, params, state, batch_size=4, seq_len=TOKENS)
    expert_numbers = 2 * 32 * 64
    assert cost.expert_parameter_bytes == 4 * expert_numbers
    assert cost.num_experts * cost.expert_parameter_bytes + cost.shared_parameter_bytes == tree_bytes(params)
    slots = 4 * TOKENS  # capacity factor 3 with 3 experts
    adam_bytes = 4 * (2 * expert_numbers + 1)  # two moments and a step count
    assert cost.expert_training_bytes == 4 * expert_numbers + adam_bytes + 4 * slots * (32 + 2 * 64)


def test_activations_follow_precision_and_remat():
    """[N, D] is 32 x 16, the attention maps are 2 x 4 x 2 x 8 x 8, an expert has 32 slots."""
    sizes = dict(model__width=16, model__hidden=64, model__num_layers=3)

    def activations(**fields):
        config = tiny_config(**sizes, **fields)
        params = jax.eval_shape(tiny_model(config).init, jax.random.key(0))
        state = jax.eval_shape(per_expert(build_optimizer(config.client, "sgd", "client")).init, params)
        cost = model_cost(config.model, params, state, batch_size=4, seq_len=TOKENS)
        held = 2 * cost.shared_parameter_bytes + tree_bytes(state.rest)
        expert = cost.expert_parameter_bytes + tree_bytes(state.experts) // cost.num_experts
        return cost.shared_training_bytes - held, cost.expert_training_bytes - expert

    layer, expert = 9 * 32 * 16 + 2 * 4 * 2 * 8 * 8, 32 * (16 + 2 * 64)
    assert activations() == (4 * 3 * layer, 4 * expert)
    assert activations(model__precision="bfloat16") == (2 * 3 * layer, 2 * expert)
    assert activations(model__remat=True) == (4 * (3 * 3 * 32 * 16 + layer), 4 * 32 * 16)


def test_activation_estimate_is_near_what_autodiff_stores():
    config = tiny_config(model__width=64, model__hidden=128, model__num_heads=4, model__capacity_factor=1.0)
    config.data.seq_len = 32
    model = build_model(config.model, CLASSES, VOCABULARY, 32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(per_expert(build_optimizer(config.client, "sgd", "client")).init, params)
    cost = model_cost(config.model, params, state, batch_size=16, seq_len=32)
    tokens = jax.ShapeDtypeStruct((16, 32), jnp.int32)
    controls = open_controls(model.num_layers, model.num_experts)

    def residuals(params, tokens):
        return jax.vjp(lambda p: model.apply(p, tokens, controls, True)[0], params)[1]

    stored = tree_bytes(jax.eval_shape(residuals, params, tokens)) - tree_bytes(params)
    activations = (
        cost.shared_training_bytes - 2 * cost.shared_parameter_bytes
        + cost.num_experts * (cost.expert_training_bytes - cost.expert_parameter_bytes)
    )  # fmt: skip
    assert 0.5 < activations / stored < 2


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("num_heads", 3, "divisor"),
        ("top_k", 9, "at most all"),
        ("precision", "bfloat", "did you mean 'bfloat16'"),
        ("num_layers", 0, "positive"),
        ("capacity_factor", 0.0, "e.g."),
    ],
)
def test_impossible_models_are_refused(field, value, remedy):
    config = tiny_config(**{f"model__{field}": value})
    with pytest.raises(InputError, match=rf"model\.{field}=.*{remedy}"):
        tiny_model(config)
