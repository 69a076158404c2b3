"""The Switch encoder as a `MoeModel`: against the dense oracle, under budgets, with parameters frozen."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_switch import Controls, dense_switch
from tiny import TOKENS, VOCABULARY, tiny_batches, tiny_config, tiny_frozen, tiny_model, tiny_params

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import open_budget
from hfedmoe_jax.models import Params, families, merge_params, split_params, tree_bytes
from hfedmoe_jax.models.family import ModelSizes

LAYERS, EXPERTS = 2, 3
TOP_2 = {"model__top_k": 2}


@functools.cache
def applied(training=True, **fields):
    """Returns (params, tokens, forward, multiplier) -> ModelOutput, compiled once; all experts by default."""
    model, frozen = tiny_model(tiny_config(**fields)), tiny_frozen(**fields)

    @jax.jit
    def apply(params, tokens, forward=None, multiplier=None, bias=None):
        budget = open_budget(params.experts, EXPERTS)
        layers = budget.layers._replace(forward=forward, bias=bias)
        if multiplier is not None:
            layers = layers._replace(multiplier=multiplier)
        return model.apply(params, frozen, {"tokens": tokens}, budget._replace(layers=layers), training)

    return apply


def assert_like_the_oracle(out, params, tokens, controls, factor, **fields):
    logits, layers = dense_switch(params, {}, tokens, controls, tiny_config(**fields).model, factor)
    real = tokens.reshape(-1) != 0
    chex.assert_trees_all_close(
        (out.output, out.routing.gates[:, real]), (logits, layers.gates[:, real]), rtol=1e-4, atol=1e-5
    )
    found = out.routing.own, out.routing.sent, out.routing.kept
    chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (found, (layers.own, layers.sent, layers.kept))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_outputs_are_those_of_the_dense_oracle(top_k, training):
    """With few slots in training and more in evaluation; all experts open, and some."""
    fields = {"model__top_k": top_k, "model__capacity_factor": 0.5, "model__eval_capacity_factor": 1.0}
    params, tokens = tiny_params(**fields), tiny_batches(1, 4)["tokens"]
    ones = jnp.ones((LAYERS, EXPERTS))
    for forward in (ones > 0, jnp.array([[True, False, True], [False, False, True]])):
        out = applied(training, **fields)(params, tokens, forward, ones * 0.7)
        controls = Controls(forward, ones > 0, ones * 0.7)
        factor = 0.5 if training else 1.0
        assert_like_the_oracle(out, params, tokens, controls, factor, **fields)
        assert not training or np.sum(out.routing.kept) < np.sum(out.routing.sent)
        slots = max(1, int(np.ceil(factor * tokens.size * top_k / EXPERTS)))
        np.testing.assert_array_equal(out.routing.slots, slots * np.sum(forward, axis=1))


def test_a_module_runs_its_own_experts_without_a_budget():
    config, params = tiny_config(), tiny_params()
    tokens = tiny_batches(1, 4)["tokens"]
    module = families["switch"](config.model, ModelSizes(3, VOCABULARY, TOKENS))
    variables = merge_params({"experts": params.experts}, params.router, params.shared)
    own = jax.jit(module.apply)({"params": variables}, {"tokens": tokens})
    chex.assert_trees_all_close(own, applied()(params, tokens), rtol=1e-6)


def test_padding_does_not_reach_the_logits():
    tokens = np.random.default_rng(2).integers(1, VOCABULARY, (3, 5)).astype(np.int32)
    padded = np.pad(tokens, [(0, 0), (0, TOKENS - 5)])
    params, apply = tiny_params(**TOP_2), applied(**TOP_2)
    short, long = apply(params, tokens), apply(params, padded)
    np.testing.assert_allclose(long.output, short.output, rtol=1e-4, atol=1e-5)
    assert not np.asarray(long.routing.own)[:, (padded == 0).reshape(-1)].any()
    np.testing.assert_array_equal(long.routing.sent, short.routing.sent)


def test_closed_experts_serve_no_token():
    params, tokens = tiny_params(**TOP_2), tiny_batches(5, 4)["tokens"]
    forward = jnp.array([[True, False, False], [False, False, False]])
    out = applied(**TOP_2)(params, tokens, forward)
    np.testing.assert_array_equal(np.asarray(out.routing.sent) > 0, forward)
    assert np.all(np.isfinite(out.output))
    # Weights of closed experts do not matter at all.
    poisoned = jax.tree.map(lambda w: jnp.where(forward[..., None, None], w, jnp.nan), params.experts)
    again = applied(**TOP_2)(params._replace(experts=poisoned), tokens, forward)
    np.testing.assert_array_equal(out.output, again.output)


def test_multiplier_zero_removes_an_expert():
    fields = {"model__top_k": 3}  # every token uses every expert
    params, tokens = tiny_params(**fields), tiny_batches(6, 2)["tokens"]
    multiplier = jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    without = applied(**fields)(params, tokens, None, multiplier)
    zeroed = params._replace(experts=jax.tree.map(lambda w: w * multiplier[..., None, None], params.experts))
    expected = applied(**fields)(zeroed, tokens)
    np.testing.assert_allclose(without.output, expected.output, rtol=1e-5, atol=1e-6)


def test_a_bias_moves_tokens_between_experts():
    params, tokens = tiny_params(), tiny_batches(7, 4)["tokens"]
    out = applied()(params, tokens, bias=jnp.array([[0.0, 100.0, 0.0], [0.0, 0.0, 100.0]]))
    real = np.count_nonzero(tokens)
    np.testing.assert_array_equal(out.routing.sent, [[0, real, 0], [0, 0, real]])


def test_groups_have_the_promised_axes_and_merge_back():
    params = tiny_params(**TOP_2)
    chex.assert_tree_shape_prefix(params.experts, (LAYERS, EXPERTS))
    assert [leaf.shape for leaf in jax.tree.leaves(params.router)] == [(LAYERS, 8, EXPERTS)]
    merged = merge_params({"experts": params.experts}, params.router, params.shared)
    again, frozen = split_params(merged)
    chex.assert_trees_all_equal(again, params)
    assert not frozen
    assert tree_bytes(merged) == sum(tree_bytes(group) for group in params)


HEAD = {("head", *path) for path in itertools.product(("norm",), ("scale", "bias"))}
HEAD |= {("head", *path) for path in itertools.product(("classes",), ("kernel", "bias"))}
ROUTER = {("blocks", "router", "kernel")}
TRAINED = [
    ("embed", {("embed",)}),
    ("head/norm/scale$", {("head", "norm", "scale")}),
    ("^(position|blocks/router)", {("position",), *ROUTER}),
    ("experts", set()),
    ("experts_router_head", HEAD | ROUTER),
]


@pytest.mark.parametrize(("train", "paths"), TRAINED)
def test_parameters_are_trained_by_their_paths(train, paths):
    params, everything = tiny_params(), tiny_params()
    merged = merge_params({"experts": params.experts}, params.router, params.shared)
    params, frozen = split_params(merged, train)
    leaves = jax.tree_util.tree_leaves_with_path(merge_params(params.router, params.shared))
    assert {tuple(key.key for key in path) for path, _ in leaves} == paths
    again = Params(params.experts, *merge_both(params, frozen))
    chex.assert_trees_all_equal(again, everything)


def merge_both(params, frozen):
    """Returns routers and shared parameters with the frozen ones back among them."""
    merged = merge_params(params.router, params.shared, frozen)
    again, _ = split_params({"experts": (), **merged})
    return again.router, again.shared


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [("(", "regular expression"), ("expert$", "no parameter's path"), ("Embed", "such as")],
)
def test_patterns_that_are_found_nowhere_are_refused(pattern, problem):
    with pytest.raises(InputError, match=rf"model\.train=.*{problem}"):
        tiny_model(tiny_config(model__train=pattern))


def test_clients_may_hold_rows_of_a_table_that_is_trained():
    """The same outputs with the rows of the batch's tokens alone; a frozen table is whole on the device."""
    params, tokens = tiny_params(), tiny_batches(8, 4)["tokens"]
    model = tiny_model(tiny_config())
    assert model.table == "embed" and tiny_model(tiny_config(model__train="^(?!embed)")).table is None
    used, index = np.unique(tokens, return_inverse=True)
    assert used[0] == 0  # padding stays padding
    rows = params._replace(shared=params.shared | {"embed": params.shared["embed"][used]})
    compact = applied()(rows, index.reshape(tokens.shape).astype(np.int32))
    np.testing.assert_array_equal(compact.output, applied()(params, tokens).output)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("num_heads", 3, "divisor"),
        ("top_k", 9, "at most all"),
        ("precision", "bfloat", "did you mean 'bfloat16'"),
        ("family", "swich", "did you mean 'switch'"),
    ],
)
def test_impossible_models_are_refused(field, value, remedy):
    config = tiny_config(**{f"model__{field}": value})
    with pytest.raises(InputError, match=rf"model\.{field}=.*{remedy}"):
        tiny_model(config)
