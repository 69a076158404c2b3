"""The written-out passes of a step against `jax.grad` of the masked all-experts oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from masked_oracle import bits, make_look
from tiny import tiny_batches, tiny_config, tiny_model, tiny_params

from hfedmoe_jax.bank import flat, row_of
from hfedmoe_jax.budgeted import ALONE, Place, backward_pass, forward_pass, predict
from hfedmoe_jax.models import all_slots, open_controls, slots_of

LAYERS, EXPERTS, TIER = 2, 3, 4
SELECTIONS = {
    "some": [[1, 0, 1], [0, 1, 0]],
    "as many as the tier": [[0, 1, 1], [1, 1, 0]],
    "one layer": [[1, 1, 1], [0, 0, 0]],
    "the other layer": [[0, 0, 0], [0, 1, 1]],
    "one": [[0, 0, 0], [1, 0, 0]],
    "none": [[0, 0, 0], [0, 0, 0]],
}
# Room for every token, and room for so few that some are dropped.
MODELS = {1: {}, 2: {"model__top_k": 2, "model__capacity_factor": 0.3}}
BALANCE = tiny_config().model.load_balance


def chosen(name):
    return np.array(SELECTIONS[name], bool)


def make_step(config, forward: str, place: Place = ALONE):
    """Returns a step, (params, tokens, labels, selected) -> losses, gradients (of multipliers), seen."""
    model = tiny_model(config)

    def step(params, tokens, labels, selected):
        experts = flat(params.experts)
        slots = slots_of(selected, TIER)
        run, ran = (all_slots(LAYERS, EXPERTS), None) if forward == "routed" else (slots, selected)

        x, seen, balance, residuals = forward_pass(
            model, params, lambda expert: row_of(experts, expert), run, ran, tokens,
            config.model.capacity_factor, place, config.model.remat,
        )  # fmt: skip

        def cross_entropy(head, x):
            logits = model.pieces.head(head, x, model.real(tokens))
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        head = {name: params.shared[name] for name in model.pieces.head_parts}
        loss, (d_head, dx) = jax.value_and_grad(cross_entropy, (0, 1))(head, x)

        def consume(gradients, expert, weights, gradient, reached):
            return jax.tree.map(
                lambda rows, row: rows.at[expert].set(jnp.where(reached, row, rows[expert])),
                gradients,
                gradient,
            )

        rest, multiplier, gradients = backward_pass(
            model, params, tokens, residuals, run, ran, dx, BALANCE, slots,
            lambda _, expert: jax.tree.map(lambda w: w[expert], experts), consume,
            jax.tree.map(jnp.zeros_like, experts), place,
        )  # fmt: skip
        gradients = jax.tree.map(lambda g, w: g.reshape(w.shape), gradients, params.experts)
        rest = rest._replace(experts=gradients, shared={**rest.shared, **d_head})
        return loss + BALANCE * balance, loss, rest, multiplier, seen

    return step


@functools.cache
def compiled(forward, **fields):
    return jax.jit(make_step(tiny_config(**fields), forward))


def looked(top_k, forward, selected, dispatch="capacity", seed=0):
    tokens, labels = tiny_batches(seed, 4)
    everything = np.ones((LAYERS, EXPERTS), bool)
    params = tiny_params(**MODELS[top_k])
    look = make_look(dispatch, **MODELS[top_k])
    ran = everything if forward == "routed" else selected
    return look(params, tokens, labels, ran, selected, params, 0.0)


def close(one, other, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 2e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("forward", ["routed", "active"])
@pytest.mark.parametrize(("top_k", "remat"), [(1, False), (1, True), (2, False), (2, True)])
def test_passes_are_those_of_the_masked_oracle(top_k, remat, forward, selection):
    """Losses, routing, the gradient of every parameter and multiplier; `SELECTIONS` fill the tier or less."""
    selected = chosen(selection)
    params, (tokens, labels) = tiny_params(**MODELS[top_k]), tiny_batches(0, 4)
    fields = MODELS[top_k] | {"model__remat": remat}
    loss, cross_entropy, gradient, multiplier, seen = compiled(forward, **fields)(
        params, tokens, labels, selected
    )
    expected = looked(top_k, forward, selected)
    close((loss, cross_entropy), (expected.loss, expected.cross_entropy), rtol=1e-6)
    close(gradient, expected.gradient)
    # `multiplier` counts experts that may serve; the oracle's others serve nobody and have zeros.
    close(multiplier, expected.by_multiplier)
    real = np.asarray(tokens).reshape(-1) != 0
    close(np.asarray(seen.gates)[:, real], np.asarray(expected.gates)[:, real])
    np.testing.assert_array_equal(seen.own, expected.own)
    np.testing.assert_array_equal(np.asarray(seen.kept) > 0, expected.served)
    dropped = np.sum(seen.sent) - np.sum(seen.kept)
    assert dropped == 0 if top_k == 1 else dropped > 0 or not selected.any()
    for leaf in jax.tree.leaves(gradient.experts):
        np.testing.assert_array_equal(np.asarray(leaf)[~selected], 0)


@pytest.mark.parametrize("forward", ["routed", "active"])
def test_the_dense_oracle_agrees_where_nothing_is_dropped(forward):
    selected = chosen("some")
    one, other = (looked(1, forward, selected, dispatch) for dispatch in ("dense", "capacity"))
    close(one, other)


def test_members_of_a_chunk_with_unlike_budgets_get_what_one_alone_gets():
    """Under a `vmap` the loop over slots runs as long as the member with the most needs."""
    names = ["some", "one", "one layer", "none"]
    selections = np.stack([chosen(name) for name in names])
    params, config = tiny_params(), tiny_config()
    tokens, labels = tiny_batches(5, len(names), 4)
    together = jax.jit(
        jax.vmap(
            make_step(config, "active", Place(chunk="chunk")), in_axes=(None, 0, 0, 0), axis_name="chunk"
        )
    )(params, tokens, labels, selections)
    for index in range(len(names)):
        alone = compiled("active")(params, tokens[index], labels[index], selections[index])
        close(jax.tree.map(lambda x, i=index: x[i], together), alone, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("forward", ["routed", "active"])
def test_bfloat16_gradients_are_near_those_of_float32_and_stay_float32(forward):
    """Within a tenth of the gradient's norm in each group; a rounding to bfloat16 is up to 0.4%."""
    selected = chosen("as many as the tier")
    params, (tokens, labels) = tiny_params(), tiny_batches(0, 4)
    arguments = params, tokens, labels, selected
    full, half = compiled(forward)(*arguments), compiled(forward, model__precision="bfloat16")(*arguments)
    floats = [leaf.dtype for leaf in jax.tree.leaves(half) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert set(floats) == {jnp.dtype("float32")}
    np.testing.assert_array_equal(half[-1].own, full[-1].own)  # no token is near the edge of two experts
    np.testing.assert_allclose(half[0], full[0], rtol=0.01)
    for one, other in zip((*half[2], half[3]), (*full[2], full[3]), strict=True):
        difference = float(optax.tree.norm(optax.tree.sub(one, other)))
        assert 0 < difference < 0.1 * float(optax.tree.norm(other))


@pytest.mark.parametrize("top_k", [1, 2])
def test_predictions_are_those_of_the_reference(top_k):
    config = tiny_config(**MODELS[top_k])
    model, params = tiny_model(config), tiny_params(**MODELS[top_k])
    tokens, _ = tiny_batches(2, 4)
    predicted = jax.jit(lambda p, t: predict(model, p, t, config.model.capacity_factor, ALONE))
    reference = jax.jit(lambda p, t: model.apply(p, t, open_controls(LAYERS, EXPERTS), True))
    (logits, seen), (expected, routing) = predicted(params, tokens), reference(params, tokens)
    close(logits, expected)
    real = tokens.reshape(-1) != 0
    close(np.asarray(seen.gates)[:, real], np.asarray(routing.gates)[:, real])
    np.testing.assert_array_equal(seen.sent, np.sum(routing.chosen, axis=1))
    np.testing.assert_array_equal(seen.kept, np.sum(routing.kept, axis=1))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("size", [TIER, 6])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_slots_list_the_selected_experts_by_layer(selection, size):
    selected = chosen(selection)
    slots = slots_of(selected, size)
    experts = np.flatnonzero(selected)
    np.testing.assert_array_equal(slots.expert[: len(experts)], experts)
    np.testing.assert_array_equal(slots.count, selected.sum(axis=1))
    np.testing.assert_array_equal(slots.first, np.cumsum(slots.count) - slots.count)
    place = np.full(selected.size, size)
    place[experts] = np.arange(len(experts))
    np.testing.assert_array_equal(slots.slot.reshape(-1), place)


def test_all_slots_are_the_slots_of_everything():
    everything, listed = all_slots(LAYERS, EXPERTS), slots_of(np.ones((LAYERS, EXPERTS), bool), 6)
    assert everything.most == EXPERTS
    assert bits(everything._replace(most=None)) == bits(listed)
