"""Which token gets which slot, against a queue of Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_jax import slots as s
from hfedmoe_jax.mesh import ALONE

plan_slots = jax.jit(functools.partial(s.plan_slots, place=ALONE), static_argnums=(2, 3))


@st.composite
def assignments(draw):
    """Draws (expert [N, K], wanted [N, K], E), a token's experts distinct."""
    tokens, experts, k = draw(st.sampled_from([(1, 1, 1), (9, 3, 1), (9, 3, 2), (12, 5, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    expert = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    return expert, rng.random((tokens, k)) < 0.8, experts


@given(assignments(), st.sampled_from([1, 2, 3, 12]))
def test_slots_go_to_first_choices_and_early_tokens(drawn, capacity):
    expert, wanted, num_experts = drawn
    (tokens, k), room = expert.shape, [0] * num_experts
    of_assignment = np.full((k, tokens), num_experts * capacity)
    token = np.full((num_experts, capacity), tokens)
    assignment = np.full((num_experts, capacity), k * tokens)
    for choice, which in np.ndindex(k, tokens):
        e = expert[which, choice]
        if wanted[which, choice] and room[e] < capacity:
            of_assignment[choice, which] = e * capacity + room[e]
            token[e, room[e]], assignment[e, room[e]] = which, choice * tokens + which
            room[e] += 1
    slots = plan_slots(expert, wanted, num_experts, capacity)
    jax.tree.map(
        np.testing.assert_array_equal, slots, s.Slots(of_assignment, token, assignment, np.array(room))
    )


def test_rows_beyond_the_last_are_zeros():
    rows = s.take_rows(jnp.arange(6.0).reshape(3, 2), np.array([[2, 3], [0, 9]]))
    np.testing.assert_array_equal(rows, [[[4, 5], [0, 0]], [[0, 1], [0, 0]]])


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "slots"),
    [(64, 8, 1, 1.0, 8), (64, 8, 1, 1.25, 10), (10, 4, 2, 1.0, 5), (4, 8, 1, 0.1, 1), (16, 4, 1, 100.0, 16)],
)
def test_capacity_is_a_multiple_of_the_even_share(tokens, experts, k, factor, slots):
    assert s.expert_capacity(tokens, experts, k, factor) == slots
