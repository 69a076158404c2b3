"""Fixed-point sums against integers and fractions of Python."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_jax.aggregation import sums as s

LARGE = 150.0  # times MOST_TERMS is below the largest sum, 2^15
TERMS = s.MOST_TERMS
WIDTH = 2
add_terms, add_rows = jax.jit(s.add_terms), jax.jit(s.add_rows)
settle, merge, from_fixed = jax.jit(s.settle), jax.jit(s.merge_over_devices), jax.jit(s.from_fixed)


@st.composite
def terms(draw):
    """Draws float32 [TERMS, WIDTH] of very unlike sizes, some of them zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponent = rng.uniform(-50, np.log2(LARGE), (TERMS, WIDTH))
    values = rng.choice([-1, 0, 1], (TERMS, WIDTH), p=[0.45, 0.1, 0.45]) * 2.0**exponent
    return values.astype(np.float32)


def number(fixed) -> list[int]:
    """Returns the numbers in units of 2^-40."""
    high, low = (np.asarray(part).reshape(-1).tolist() for part in fixed)
    return [h * 2**s.LOW_BITS + x for h, x in zip(high, low, strict=True)]


def exact(values) -> list[Fraction]:
    """Returns the sum over the leading axis in units of 2^-40."""
    columns = np.asarray(values).reshape(len(values), -1).T.tolist()
    return [sum(map(Fraction, column), Fraction(0)) * 2**40 for column in columns]


def summed(groups):
    """Adds groups [count, WIDTH] one after another and settles; absent terms of a group are zeros."""
    total = s.fixed_zeros((WIDTH,))
    for group in groups:
        filled = np.zeros((TERMS, WIDTH), np.float32)
        filled[: len(group)] = group
        total = settle(add_terms(total, filled))
    return total


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(terms())
def test_a_sum_is_within_half_a_unit_a_term_of_the_exact_one(values):
    """A unit is 2^-40, so the bound is 2^-41 a term."""
    total = add_terms(s.fixed_zeros((WIDTH,)), values)
    for result, expected in zip(number(total), exact(values), strict=True):
        assert abs(result - expected) <= Fraction(TERMS, 2)
    one = s.to_fixed(values)
    for result, value in zip(number(one), values.reshape(-1).tolist(), strict=True):
        assert abs(result - Fraction(value) * 2**40) <= Fraction(1, 2)
    assert np.all((np.asarray(one.low) >= 0) & (np.asarray(one.low) <= 2**s.LOW_BITS))


@given(terms(), st.randoms(use_true_random=False), st.lists(st.integers(0, TERMS), max_size=5))
def test_order_and_grouping_do_not_matter(values, random, cuts):
    order = list(range(TERMS))
    random.shuffle(order)
    groups = np.split(values[order], sorted(cuts))
    assert same(summed(groups), summed([values]))


@given(terms(), st.randoms(use_true_random=False), st.integers(1, 8))
def test_any_split_over_devices_gives_the_same_bits(values, random, devices):
    device = np.array([random.randrange(devices) for _ in range(TERMS)])
    parts = [summed([values[device == index]]) for index in range(8)]  # some devices have nothing
    merged = merge(s.Fixed(*(jnp.stack(part) for part in zip(*parts, strict=True))))
    assert same(merged, summed([values]))


@given(terms(), st.randoms(use_true_random=False))
def test_rows_are_sums_over_the_terms_that_name_them(values, random):
    index = np.array([random.randrange(4) for _ in range(TERMS)], np.int32)  # 3 is beyond the last row
    total = settle(add_rows(s.fixed_zeros((3, WIDTH)), index, values))
    for row in range(3):
        assert same((part[row] for part in total), summed([values[index == row]]))


@given(
    st.lists(st.tuples(st.integers(-(2**30), 2**30), st.integers(0, TERMS * 2**24)), min_size=4, max_size=4)
)
def test_settling_and_merging_keep_the_value(parts):
    total = s.Fixed(*(jnp.array(part, jnp.int32) for part in zip(*parts, strict=True)))
    settled = settle(total)
    assert number(settled) == number(total)
    assert np.all((np.asarray(settled.low) >= 0) & (np.asarray(settled.low) < 2**s.LOW_BITS))
    assert same(settle(settled), settled)
    high = settled.high // 4  # a sum of four is in range
    merged = merge(settled._replace(high=high))
    assert number(s.Fixed(*(part[None] for part in merged))) == [sum(number(settled._replace(high=high)))]
    assert 0 <= int(merged.low) < 2**s.LOW_BITS


@pytest.mark.parametrize("devices", [TERMS, TERMS + 1, 1000])
def test_sums_of_many_devices_merge_to_the_integer(devices):
    """The largest `low` everywhere: with more devices than a sum has room for, halves are added apart."""
    rng = np.random.default_rng(devices)
    high = rng.integers(-(2**20), 2**20, (devices, 3)).astype(np.int32)
    low = np.full((devices, 3), 2**s.LOW_BITS - 1, np.int32)
    merged = s.merge_over_devices(s.Fixed(jnp.array(high), jnp.array(low)))
    rows = [number(row) for row in zip(high, low, strict=True)]
    assert number(merged) == [sum(column) for column in zip(*rows, strict=True)]
    assert np.all((np.asarray(merged.low) >= 0) & (np.asarray(merged.low) < 2**s.LOW_BITS))


def test_many_rounds_of_terms_settle_into_range():
    """A thousand times the most terms between two settlings, each with the largest `low`."""
    value = jnp.full((TERMS, 1), 2.0**-16 - 2.0**-40, jnp.float32)
    total = s.fixed_zeros((1,))
    for _ in range(1000):
        total = settle(add_terms(total, value))
    assert number(total) == [1000 * TERMS * (2**24 - 1)]


@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, -3.7e-5, 1234.5678, 2.0**14, -(2.0**14), 2.0**-40, 0.0])
def test_a_number_comes_back(value):
    value = jnp.float32(value)
    result = float(from_fixed(s.to_fixed(value)))
    np.testing.assert_allclose(result, value, rtol=2**-23, atol=2**-41)


@pytest.mark.parametrize("value", [2.0**14 + 1, 1e30, np.inf])
def test_terms_beyond_the_range_are_cut_to_it(value):
    for sign in (1, -1):
        assert float(from_fixed(s.to_fixed(jnp.float32(sign * value)))) == sign * s.LARGEST
