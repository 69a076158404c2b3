"""A client's bank of experts against a dictionary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_oracle import bits

from hfedmoe_jax.bank import BankLayout

LAYERS, HELD, WIDTH = 2, 3, 2
EXPERTS = LAYERS * HELD
ADAM = optax.adam(0.1)
# (tier, experts that a round touches): fewer rows than experts, and a row for each.
SIZES = [(2, 4), (3, 3), (1, 5), (6, 6), (4, 12)]


@functools.cache
def bank_of(tier, touched):
    """Returns a layout and its operations, compiled once."""
    layout = BankLayout(LAYERS, HELD, tier, touched)

    def step(bank, expert, gradient, trained):
        return layout.update(bank, expert, layout.read(bank, expert), gradient, trained, ADAM)

    return (
        layout,
        jax.jit(lambda start: layout.open(start, ADAM)),
        jax.jit(layout.enter),
        jax.jit(step),
        jax.jit(layout.rows_of),
        jax.jit(layout.read_any),
    )


def start_of(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (LAYERS, HELD, WIDTH), "b": (LAYERS, HELD)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def row_of(tree, row):
    return jax.tree.map(lambda x: np.asarray(x)[row], tree)


def expert_of(start, expert):
    return jax.tree.map(lambda x: x.reshape(EXPERTS, *x.shape[2:])[expert], start)


@jax.jit
def adam_step(gradient, state, weights):
    updates, state = ADAM.update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state


@st.composite
def rounds(draw):
    """Draws a layout's sizes and the experts of each batch, no more than its tier and rows allow."""
    tier, touched = draw(st.sampled_from(SIZES))
    allowed = draw(st.permutations(range(EXPERTS)))[:touched]
    batches = draw(st.lists(st.lists(st.sampled_from(allowed), max_size=tier, unique=True), max_size=3))
    return tier, touched, batches


@given(rounds(), st.integers(0, 2**16))
@settings(max_examples=40)
def test_a_bank_is_a_dictionary_of_the_experts_it_was_given(drawn, seed):
    """Rows enter once and in order; an update moves one row, if it trained; `rows_of` finds them again."""
    tier, touched, batches = drawn
    layout, open_bank, enter, step, rows_of, read_any = bank_of(tier, touched)
    start, rng = start_of(seed), np.random.default_rng(seed)
    bank = open_bank(start)
    held: dict = {}
    order = list(range(EXPERTS)) if layout.every else []
    for batch in batches:
        active = np.zeros((LAYERS, HELD), bool)
        active.reshape(-1)[batch] = True
        before = bank
        bank = enter(bank, start, active)
        order += [expert for expert in sorted(batch) if expert not in order]
        kept = np.asarray(before.row) < layout.num_rows
        np.testing.assert_array_equal(np.asarray(bank.row)[kept], np.asarray(before.row)[kept])
        assert bits(bank.state) == bits(before.state)
        for expert in sorted(batch):
            weights, state = held.get(expert, (expert_of(start, expert), ADAM.init(expert_of(start, expert))))
            assert bits(layout.read(bank, expert)) == bits(weights)
            gradient = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), weights)
            trained = bool(rng.random() < 0.7)
            others = [other for other in order if other != expert]
            rest = bits([layout.read(bank, other) for other in others])
            row = int(bank.row[expert])
            other_rows = [index for index in range(layout.num_rows) if index != row]
            states = bits(row_of(bank.state, other_rows))
            bank = step(bank, np.int32(expert), gradient, np.bool_(trained))
            assert bits([layout.read(bank, other) for other in others]) == rest
            assert bits(row_of(bank.state, other_rows)) == states
            held[expert] = adam_step(gradient, state, weights) if trained else (weights, state)
            own = layout.read(bank, expert), row_of(bank.state, row)
            if trained:
                jax.tree.map(
                    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own, held[expert]
                )
                held[expert] = own
            else:
                assert bits(own) == bits(held[expert])
    assert int(bank.count) == len(order)
    for expert in range(EXPERTS):  # of those that never entered the global weights
        expected = layout.read(bank, expert) if expert in order else expert_of(start, expert)
        assert bits(read_any(bank, start, expert)) == bits(expected)
    trained = np.zeros((LAYERS, HELD), bool)
    trained.reshape(-1)[list(held)] = rng.random(len(held)) < 0.7
    rows = rows_of(bank, trained)
    owners = np.flatnonzero(trained).tolist()
    assert rows.count == len(owners)
    assert np.asarray(rows.expert).tolist() == owners + [EXPERTS] * (layout.num_rows - len(owners))
    for owner, row in zip(owners, np.asarray(rows.row).tolist(), strict=False):
        assert bits(row_of(bank.weights, row)) == bits(held[owner][0])
    size = jax.tree.leaves(bank.weights)[0].shape[0]
    assert np.all((np.asarray(rows.row) >= 0) & (np.asarray(rows.row) < size))


@pytest.mark.parametrize(("tier", "touched"), SIZES)
def test_arrays_have_a_row_for_each_expert_that_a_round_touches(tier, touched):
    layout = BankLayout(LAYERS, HELD, tier, touched)
    bank = jax.eval_shape(lambda start: layout.open(start, ADAM), start_of())
    rows = min(max(touched, 2), EXPERTS)  # two at least, see `BankLayout`
    assert {leaf.shape[0] for leaf in jax.tree.leaves(bank.state)} == {rows}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(bank.weights)} == {rows}
    trained = jax.eval_shape(layout.rows_of, bank, jax.ShapeDtypeStruct((LAYERS, HELD), bool))
    assert trained.expert.shape == trained.row.shape == (rows,)
    slots = jax.eval_shape(layout.slots, jax.ShapeDtypeStruct((LAYERS, HELD), bool))
    assert slots.expert.shape == (min(max(tier, 2), EXPERTS),)
    assert layout.slots(None).expert.shape == (EXPERTS,)


def test_a_client_that_selects_nothing_brings_nothing():
    layout, open_bank, enter, *_ = bank_of(2, 4)
    bank = open_bank(start_of())
    assert layout.enter(bank, start_of(), None) is bank
    assert bits(enter(bank, start_of(), np.zeros((LAYERS, HELD), bool))) == bits(bank)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(bank.weights))
