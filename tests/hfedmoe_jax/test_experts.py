"""The budgeted expert layer against `jax.grad` of the masked oracle, whose experts all compute everything."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_switch import Controls, mixture, relu_expert
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_oracle import assert_near, make_look
from own_process import run_python
from selected_pass import make_pass
from tiny import tiny_batches, tiny_config, tiny_model, tiny_params

from hfedmoe_jax import experts as x
from hfedmoe_jax.mesh import ALONE, Place
from hfedmoe_jax.models import switch
from hfedmoe_jax.models.routing import RouterRule, assign
from hfedmoe_jax.tasks import classification

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


def chosen(name):
    return np.array(SELECTIONS[name], bool)


def pass_of(active, keep=True, place=ALONE, **fields):
    config = tiny_config(**fields)
    return make_pass(tiny_model(config), classification, config.model.load_balance, active, TIER, keep, place)


@functools.cache
def compiled(active, keep=True, **fields):
    return jax.jit(pass_of(active, keep, **fields))


def looked(top_k, active, selected, seed=0):
    params, everything = tiny_params(**MODELS[top_k]), np.ones((LAYERS, EXPERTS), bool)
    ran = selected if active else everything
    return make_look(**MODELS[top_k])(params, {}, tiny_batches(seed, 4), ran, selected, params, 0.0)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("active", [False, True], ids=["routed", "active"])
@pytest.mark.parametrize(("top_k", "keep"), [(1, True), (2, True), (2, False)])
def test_passes_are_those_of_the_masked_oracle(top_k, keep, active, selection):
    """Losses, routing, the gradient of every parameter and multiplier; `SELECTIONS` fill the tier or less.

    Without `keep` attention is computed again too, as in a client.
    """
    selected, batch = chosen(selection), tiny_batches(0, 4)
    fields = MODELS[top_k] | {"model__remat": not keep}
    done = compiled(active, keep, **fields)(tiny_params(**MODELS[top_k]), {}, batch, selected)
    expected = looked(top_k, active, selected)
    np.testing.assert_allclose(done[:2], (expected.loss, expected.cross_entropy), rtol=1e-6)
    assert_near(done.gradient, expected.gradient)
    assert_near(done.by_multiplier, expected.by_multiplier)
    for leaf in jax.tree.leaves(done.gradient.experts):
        np.testing.assert_array_equal(np.asarray(leaf)[~selected], 0)
    real, seen = batch["tokens"].reshape(-1) != 0, done.routing
    assert_near(seen.gates[:, real], expected.gates[:, real])
    for name in ("own", "sent", "kept"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(expected, name))
    dropped = np.sum(seen.sent) - np.sum(seen.kept)
    assert dropped == 0 if top_k == 1 else dropped > 0 or not selected.any()


@pytest.mark.parametrize("keep", [True, False])
def test_whole_blocks_may_be_computed_again(monkeypatch, keep):
    selected, batch, params = chosen("some"), tiny_batches(0, 4), tiny_params()
    monkeypatch.setattr(switch, "Block", nn.remat(switch.Block, prevent_cse=False))
    again = jax.jit(pass_of(True, keep))(params, {}, batch, selected)
    assert_near(again, compiled(True)(params, {}, batch, selected))


def test_members_of_a_chunk_with_unlike_budgets_get_what_one_alone_gets():
    """Under a `vmap` the loop over experts runs as long as the member with the most needs."""
    names, params = ["some", "one", "one layer", "none"], tiny_params()
    selections, batches = np.stack([chosen(name) for name in names]), tiny_batches(5, len(names), 4)
    step = pass_of(True, place=Place(chunk="chunk"))
    together = jax.jit(jax.vmap(step, (None, None, 0, 0), axis_name="chunk"))(params, {}, batches, selections)
    for index in range(len(names)):
        member = jax.tree.map(lambda x, i=index: x[i], (together, batches, selections))
        assert_near(member[0], compiled(True)(params, {}, *member[1:]))


def test_bfloat16_gradients_are_near_those_of_float32_and_stay_float32():
    """Within a tenth of the gradient's norm in each group; a rounding to bfloat16 is up to 0.4%."""
    arguments = tiny_params(), {}, tiny_batches(0, 4), chosen("as many as the tier")
    full, half = compiled(False)(*arguments), compiled(False, model__precision="bfloat16")(*arguments)
    floats = {leaf.dtype for leaf in jax.tree.leaves(half) if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    assert floats == {jnp.dtype("float32")}
    np.testing.assert_array_equal(half.routing.own, full.routing.own)  # no token is near two experts' edge
    np.testing.assert_allclose(half.loss, full.loss, rtol=0.01)
    for one, other in zip(
        (*half.gradient, half.by_multiplier), (*full.gradient, full.by_multiplier), strict=True
    ):
        difference = float(optax.tree.norm(optax.tree.sub(one, other)))
        assert 0 < difference < 0.1 * float(optax.tree.norm(other))


SHARDS = """
import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from masked_oracle import assert_near
from test_experts import LAYERS, Place, compiled, pass_of, tiny_batches, tiny_params
from hfedmoe_jax.mesh import BY_EXPERT, make_mesh
from hfedmoe_jax.models import params_specs
from selected_pass import Pass

assert jax.device_count() == 2
fields = {"model__num_experts": 4, "model__top_k": 2, "model__capacity_factor": 0.5}
params, batch = tiny_params(**fields), tiny_batches(0, 4)
specs = params_specs(params)
out = Pass(P(), P(), specs, P(), P())
step = pass_of(True, place=Place(shard="experts"), **fields)
sharded = jax.jit(jax.shard_map(
    step, mesh=make_mesh(experts=2), in_specs=(specs, P(), P(), P()), out_specs=out, check_vma=False
))
for selected in ([[1, 0, 1, 0], [0, 1, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 1]]):
    selected = np.array(selected, bool)
    assert_near(sharded(params, {}, batch, selected), compiled(True, **fields)(params, {}, batch, selected))
    print("equal")
"""


def test_experts_spread_over_devices_give_what_one_device_gives():
    """Two devices with half of each layer's experts; in one selection the first has none to train."""
    assert run_python(SHARDS, devices=2).split() == ["equal", "equal"]


D, F, ROWS = 3, 4, 5


@st.composite
def layers(draw):
    """Draws a seed, sizes (N, E, k) of few shapes, slots, which experts run, and their rows or -1."""
    tokens, experts, k = draw(st.sampled_from([(1, 1, 1), (9, 4, 1), (9, 4, 2)]))
    forward = draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    rows = draw(st.permutations(range(ROWS)))[:experts]
    trained = draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    row = np.float32([r if t else -1 for r, t in zip(rows, trained, strict=True)])
    return draw(st.integers(0, 2**31)), (tokens, experts, k), draw(st.sampled_from([1, 2, 9])), forward, row


def layer_inputs(seed, tokens, experts):
    """Returns h [N, D], router logits, multipliers, the experts' weights, and dy [N, D]."""
    rng = np.random.default_rng(seed)
    shapes = {"w_in_df": (experts, D, F), "w_out_fd": (experts, F, D)}
    h, logits, dy = (rng.standard_normal((tokens, width)).astype(np.float32) for width in (D, experts, D))
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return h, logits, rng.uniform(0.5, 2, experts).astype(np.float32), weights, dy


def mixed(h, logits, multiplier, tape, weights, forward, real, k, capacity, rules):
    """Returns (y, tape, permit) of one layer."""
    layer = x.LayerBudget(jnp.int32(0), multiplier, forward)
    _, (index, weight) = assign(logits, layer, real, RouterRule(k))
    experts = x.Experts(weights, (), rules)
    y, tape, served = x.mix_experts(relu_expert, capacity, experts, layer, tape, h, index, weight)
    return y, tape, served.permit


@functools.partial(jax.jit, static_argnums=(7, 8))
def layer_gradients(h, logits, multiplier, weights, dy, controls, rows_before, k, capacity):
    """Returns the cotangents of (h, logits, multiplier, tape)."""
    forward, row, real = controls
    rules = x.gradient_rules(len(multiplier))

    def layer(h, logits, multiplier, tape):
        return mixed(h, logits, multiplier, tape, weights, forward, real, k, capacity, rules)

    tape = jax.tree.map(jnp.zeros_like, rows_before)
    (y, threaded, permit), pull = jax.vjp(layer, h, logits, multiplier, tape)
    return y, threaded, permit, pull((dy, rows_before, row))


@functools.partial(jax.jit, static_argnums=(6, 7))
def oracle_gradients(h, logits, multiplier, weights, dy, controls, k, capacity):
    """Returns the output, the cotangents of (h, logits, multiplier, weights), and the tokens kept."""
    forward, row, real = controls

    def layer(h, logits, multiplier, weights):
        given = Controls(forward, row >= 0, multiplier)
        done = mixture(h, logits, weights, relu_expert, given, real, k, capacity)
        return done.y, done.kept

    y, pull, kept = jax.vjp(layer, h, logits, multiplier, weights, has_aux=True)
    return y, pull(dy), kept


@given(layers())
@settings(max_examples=40)
def test_a_layer_writes_each_trained_experts_row_and_leaves_the_others(drawn):
    """Rows nobody has, and those of experts without a token, come out bit for bit as they went in."""
    seed, (tokens, experts, k), capacity, forward, row = drawn
    given_layer = layer_inputs(seed, tokens, experts)
    rng = np.random.default_rng(seed)
    controls = np.array(forward), row, rng.random(tokens) < 0.8
    before = jax.tree.map(
        lambda w: rng.standard_normal((ROWS, *w.shape[1:])).astype(np.float32), given_layer[3]
    )
    y, threaded, permit, (dh, dlogits, dz, after) = layer_gradients(
        *given_layer, controls, before, k, capacity
    )
    expected, pulled, kept = oracle_gradients(*given_layer, controls, k, capacity)
    assert_near((y, dh, dlogits, dz), (expected, *pulled[:3]), 1e-4)
    assert not np.any(permit) and not any(map(np.any, jax.tree.leaves(threaded)))
    owner = {int(r): e for e, r in enumerate(row) if r >= 0 and kept[e]}
    for r in range(ROWS):
        found = jax.tree.map(lambda rows, r=r: rows[r], after)
        if r in owner:
            assert_near(found, jax.tree.map(lambda g, r=r: g[owner[r]], pulled[3]), 1e-4)
        else:
            chex.assert_trees_all_equal(found, jax.tree.map(lambda rows, r=r: rows[r], before))


@jax.jit
def count_writes(h, logits, multiplier, weights, dy, before, rows):
    """Returns the cotangent of a tape whose rule counts, through as many layers as `rows` has."""

    def write(tape, context, row, expert, weights, gradient, reached):
        return tape.at[row].add(reached)

    rules, real = x.gradient_rules(len(multiplier))._replace(write=write), jnp.ones(len(h), bool)

    def network(tape):
        y, permits = h, []
        for _ in rows:
            y, tape, permit = mixed(y, logits, multiplier, tape, weights, None, real, 1, len(h), rules)
            permits.append(permit)
        return y, tape, permits

    _, pull = jax.vjp(network, jnp.zeros(ROWS))
    return pull((dy, before, rows))[0]


@given(
    st.integers(0, 2**31), st.lists(st.lists(st.integers(-1, ROWS - 1), min_size=4, max_size=4), max_size=3)
)
@settings(max_examples=30)
def test_the_tape_goes_through_all_layers_and_each_writes_once(seed, rows):
    """As many writes to a row as layers have experts of that row which serve a token."""
    inputs = layer_inputs(seed, 9, 4)
    before = np.random.default_rng(seed).integers(0, 9, ROWS).astype(np.float32)
    after = count_writes(*inputs, before, [np.float32(row) for row in rows])
    serves = np.bincount(inputs[1].argmax(axis=1), minlength=4) > 0
    written = [
        row for layer in rows for row, serving in zip(layer, serves, strict=True) if serving and row >= 0
    ]
    expected = np.bincount(np.array(written, int), minlength=ROWS)
    np.testing.assert_array_equal(after - before, expected)


def glu(weights, x_sd):
    return (jax.nn.silu(x_sd @ weights["gate"]) * (x_sd @ weights["up"])) @ weights["down"]


def expert_inputs(seed, names):
    rng = np.random.default_rng(seed)
    shapes = [(D, F)] * (len(names) - 1) + [(F, D)]
    weights = {n: jnp.float32(rng.standard_normal(s)) for n, s in zip(names, shapes, strict=True)}
    return weights, *(jnp.float32(rng.standard_normal((6, D))) for _ in range(2))


EXPERTS_OF = {
    "switch": (switch.relu_expert, ("w_in_df", "w_out_fd")),
    "relu": (relu_expert, ("w_in_df", "w_out_fd")),
    "glu": (glu, ("gate", "up", "down")),
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", EXPERTS_OF)
def test_what_is_kept_gives_the_gradients_of_what_is_computed(name, keep):
    expert, names = EXPERTS_OF[name]
    weights, x_sd, dy = expert_inputs(0, names)
    y, saved = x.run_keeping(expert, keep, weights, x_sd)
    expected, pull = jax.vjp(expert, weights, x_sd)
    assert bool(saved) == keep
    chex.assert_trees_all_close(
        (y, x.pull_kept(expert, weights, x_sd, saved, dy)), (expected, pull(dy)), rtol=1e-6
    )


def test_of_a_switch_expert_the_hidden_units_alone_are_kept_and_used():
    """Twice the hidden units where they are read: twice the gradient of the second matrix, and no other."""
    weights, x_sd, dy = expert_inputs(1, ("w_in_df", "w_out_fd"))
    _, saved = x.run_keeping(switch.relu_expert, True, weights, x_sd)
    (hidden,) = saved
    np.testing.assert_allclose(hidden, x_sd @ weights["w_in_df"], rtol=1e-6)
    d_weights, dx = x.pull_kept(switch.relu_expert, weights, x_sd, [hidden], dy)
    doubled, dx_doubled = x.pull_kept(switch.relu_expert, weights, x_sd, [2 * hidden], dy)
    chex.assert_trees_all_close(doubled, d_weights | {"w_out_fd": 2 * d_weights["w_out_fd"]}, rtol=1e-6)
    chex.assert_trees_all_close(dx_doubled, dx, rtol=1e-6)


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_visits_list_the_selected_experts_in_order(selected):
    visit, which = x.visits(np.array(selected), len(selected)), np.flatnonzero(selected).tolist()
    assert int(visit.count) == len(which)
    assert visit.expert[: len(which)].tolist() == which
    place = [which.index(e) if e in which else len(selected) for e in range(len(selected))]
    assert visit.place.tolist() == place
    if all(selected):
        every = x.visits(None, len(selected))
        assert (every.expert.tolist(), every.place.tolist(), every.count) == (which, which, len(which))


def test_members_of_a_chunk_take_turns_until_the_last_is_done():
    """Each sums its own experts' numbers; turns of others are not valid to it."""
    place = Place(chunk="chunk")
    selected = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)

    def total(selected):
        def add(carry, index, expert, valid):
            turns, total = carry
            return turns + 1, total + jnp.where(valid, expert + 1, 0)

        return x.for_each(x.visits(selected, 3), place, add, (0, 0))

    turns, totals = jax.vmap(total, axis_name="chunk")(selected)
    assert turns.tolist() == [3, 3, 3] and totals.tolist() == [4, 0, 6]
