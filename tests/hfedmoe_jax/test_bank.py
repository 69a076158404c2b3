"""A client's bank of experts against a dictionary."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_oracle import bits

from hfedmoe_jax.bank import BankLayout, as_floats, read, restore_types
from hfedmoe_jax.experts import flat
from hfedmoe_jax.mesh import ALONE

LAYERS, HELD, WIDTH = 2, 3, 2
EXPERTS = LAYERS * HELD
ADAM = optax.adam(0.1)
jitted_read = jax.jit(read)
SIZES = [1, 3, 4, 6, 12]
"""Experts that a round touches: fewer rows than experts, and a row for each."""


@functools.cache
def bank_of(touched):
    """Returns a layout and its operations, compiled once."""
    layout = BankLayout(LAYERS, HELD, touched, ADAM, ALONE)
    rules = layout.rules(None, touched, True)

    def step(bank, expert, gradient, reached):
        row = bank.row[expert]
        weights = rules.reread(bank.rows, None, row, expert)
        rows = rules.write(bank.rows, (np.float32(1), ()), row, expert, weights, gradient, reached)
        return bank._replace(rows=rows)

    return layout, *map(jax.jit, (layout.open, layout.add, step, layout.rows_of))


def start_of(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (LAYERS, HELD, WIDTH), "b": (LAYERS, HELD)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def on_host(tree, rows):
    """Returns rows of arrays; nothing is compiled."""
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(rows)], tree)


def expert_of(start, expert):
    return jax.tree.map(lambda x: x.reshape(EXPERTS, *x.shape[2:])[expert], start)


@jax.jit
def adam_step(gradient, state, weights):
    updates, state = ADAM.update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state


@st.composite
def rounds(draw):
    """Draws a number of rows, and the experts of each batch, no more than that in all."""
    touched = draw(st.sampled_from(SIZES))
    allowed = draw(st.permutations(range(EXPERTS)))[:touched]
    return touched, draw(st.lists(st.lists(st.sampled_from(allowed), unique=True), max_size=3))


@given(rounds(), st.integers(0, 2**16))
@settings(max_examples=40)
def test_a_bank_is_a_dictionary_of_the_experts_it_was_given(drawn, seed):
    """Rows are added once and in order; a step moves one row, if a token came; `rows_of` finds them again."""
    touched, batches = drawn
    layout, open_bank, add, step, rows_of = bank_of(touched)
    start, rng = start_of(seed), np.random.default_rng(seed)
    bank = open_bank(start)
    held: dict = {}
    order = list(range(EXPERTS)) if layout.every else []

    def own(expert):
        """An expert's weights and optimizer state."""
        return on_host(bank.rows, bank.row[expert])

    for batch in batches:
        active = np.zeros((LAYERS, HELD), bool)
        active.reshape(-1)[batch] = True
        before = bank
        bank = add(bank, start, active)
        order += [expert for expert in sorted(batch) if expert not in order]
        kept = np.asarray(before.row) < layout.num_rows
        np.testing.assert_array_equal(np.asarray(bank.row)[kept], np.asarray(before.row)[kept])
        assert bits(bank.rows.state) == bits(before.rows.state)
        expected = np.where(active, np.asarray(bank.row).reshape(LAYERS, HELD), -1)
        np.testing.assert_array_equal(layout.rows_for(bank, active), expected)
        for expert in sorted(batch):
            weights, state = held.get(expert, (expert_of(start, expert), ADAM.init(expert_of(start, expert))))
            assert bits(own(expert).weights) == bits(weights)
            gradient = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), weights)
            reached = bool(rng.random() < 0.7)
            others = np.delete(np.arange(layout.num_rows), int(bank.row[expert]))
            rest = bits(on_host(bank.rows, others))
            unmoved = bits(own(expert))
            bank = step(bank, np.int32(expert), gradient, np.bool_(reached))
            assert bits(on_host(bank.rows, others)) == rest
            if reached:
                weights, state = adam_step(gradient, state, weights)
                chex.assert_trees_all_close(
                    tuple(own(expert)), (weights, as_floats(state)), rtol=1e-5, atol=1e-6
                )
                weights = own(expert).weights
            else:
                assert bits(own(expert)) == unmoved
            held[expert] = weights, state
    assert int(bank.count) == len(order)
    readable = layout.readable(bank, start, routed=True)
    for expert in range(EXPERTS):  # of those without a row the global weights
        expected = own(expert).weights if expert in order else expert_of(start, expert)
        assert bits(jitted_read(readable, expert)) == bits(expected)
    trained = np.zeros((LAYERS, HELD), bool)
    trained.reshape(-1)[list(held)] = rng.random(len(held)) < 0.7
    rows = rows_of(bank, trained)
    owners = np.flatnonzero(trained).tolist()
    assert rows.count == len(owners)
    assert np.asarray(rows.expert).tolist() == owners + [EXPERTS] * (layout.num_rows - len(owners))
    for owner, row in zip(owners, np.asarray(rows.row).tolist(), strict=False):
        assert bits(on_host(bank.rows.weights, row)) == bits(held[owner][0])
    assert np.all((np.asarray(rows.row) >= 0) & (np.asarray(rows.row) < layout.num_rows))


@pytest.mark.parametrize("touched", SIZES)
def test_arrays_have_a_row_for_each_expert_that_a_round_touches(touched):
    layout = BankLayout(LAYERS, HELD, touched, ADAM, ALONE)
    bank = jax.eval_shape(layout.open, start_of())
    rows = min(max(touched, 2), EXPERTS)  # two at least, see `BankLayout`
    assert {leaf.shape[0] for leaf in jax.tree.leaves((bank.rows, layout.tape(bank)))} == {rows}
    trained = jax.eval_shape(layout.rows_of, bank, jax.ShapeDtypeStruct((LAYERS, HELD), bool))
    chex.assert_shape([trained.expert, trained.row], (rows,))


def test_a_client_that_selects_nothing_brings_nothing():
    layout, open_bank, add, *_ = bank_of(4)
    bank = open_bank(start_of())
    assert layout.add(bank, start_of(), None) is bank
    assert bits(add(bank, start_of(), np.zeros((LAYERS, HELD), bool))) == bits(bank)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(bank.rows.weights))


def test_an_adjustment_sees_what_belongs_to_its_expert():
    """A gradient twice as large, less what the context has for the expert; half the step."""
    layout = BankLayout(LAYERS, HELD, EXPERTS, optax.sgd(1.0), ALONE)
    start, context = jax.tree.map(jnp.asarray, start_of(1)), (np.float32(0.5), (flat(start_of(2)),))

    def adjust(gradient, weights, offset, expert):
        return jax.tree.map(lambda g, o: 2 * g - o[expert], gradient, offset)

    rules, rows = layout.rules(adjust, EXPERTS, True), layout.open(start).rows
    weights, gradient = (expert_of(start_of(seed), 4) for seed in (1, 3))
    after = rules.write(rows, context, 4, 4, weights, gradient, True)
    offset = expert_of(start_of(2), 4)
    expected = jax.tree.map(lambda w, g, o: w - 0.5 * (2 * g - o), weights, gradient, offset)
    chex.assert_trees_all_close(on_host(after.weights, 4), expected, rtol=1e-6)


def test_counters_come_back_from_floats():
    state = (jnp.int32(2**24), jnp.uint8(7), jnp.bfloat16(1.5))
    chex.assert_trees_all_equal_dtypes(as_floats(state), (jnp.float32(0), jnp.float32(0), jnp.bfloat16(0)))
    chex.assert_trees_all_equal(restore_types(as_floats(state), state), state)
