"""Admission against sorting and against every subset of users."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slide_jax import admission

SIZES = (1, 2, 6)
admit = jax.jit(admission.admit)
first_of = jax.jit(admission.first_of)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def needs_of(amounts):
    return st.sampled_from(SIZES).flatmap(
        lambda size: st.lists(amounts, min_size=size, max_size=size).map(lambda needs: np.array(needs, float))
    )


whole_needs = needs_of(st.sampled_from([0, 1, 1, 2, 3, 5, math.inf]))
"""In whole numbers sums are exact and many users need the same."""


def by_sorting(needs, spectrum):
    """The textbook's answer: in order of need, of equals the first ones, until the spectrum is full."""
    order = np.argsort(needs, kind="stable")
    fits = np.cumsum(needs[order]) <= spectrum
    admitted = np.zeros(needs.size, bool)
    admitted[order[fits]] = True
    return admitted


def largest_set(needs, spectrum):
    """Size of the largest set that fits, by trying all."""
    sets = itertools.chain.from_iterable(
        itertools.combinations(needs, size) for size in range(needs.size + 1)
    )
    return max(len(members) for members in sets if math.fsum(members) <= spectrum)


@given(whole_needs, st.integers(0, 20))
def test_admits_as_sorting_does(needs, spectrum):
    result = admit(needs, float(spectrum))
    np.testing.assert_array_equal(result, by_sorting(needs, spectrum))


@given(needs_of(st.one_of(st.just(math.inf), st.floats(0, 1e9, allow_subnormal=False))), st.floats(0, 3e9))
def test_no_set_that_fits_is_larger(needs, spectrum):
    admitted = np.asarray(admit(needs, spectrum))
    assert math.fsum(needs[admitted]) <= spectrum * (1 + 2e-12)
    assert largest_set(needs, spectrum) <= admitted.sum() <= largest_set(needs, spectrum * (1 + 2e-12))
    # Whoever is left out needs at least as much as whoever is in.
    assert max(needs[admitted], default=0) <= min(needs[~admitted], default=math.inf)


@given(whole_needs, st.integers(0, 20), st.integers(0, 20))
def test_more_spectrum_drops_nobody(needs, spectrum, more):
    few, many = admit(needs, float(spectrum)), admit(needs, float(spectrum + more))
    assert not np.any(np.asarray(few) & ~np.asarray(many))


@given(whole_needs, st.integers(0, 20), st.randoms(use_true_random=False))
def test_order_decides_among_equals_alone(needs, spectrum, random):
    order = np.array(random.sample(range(needs.size), needs.size))
    one, other = np.asarray(admit(needs, float(spectrum))), np.asarray(admit(needs[order], float(spectrum)))
    np.testing.assert_array_equal(np.sort(needs[one]), np.sort(needs[order][other]))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_many_users_as_sorting_does(seed, share):
    rng = np.random.default_rng(seed)
    # Groups of equals among continuous needs; a part is out of reach.
    needs = rng.lognormal(10, 2, 300)[rng.integers(0, 300, 500)]
    needs[rng.random(500) < 0.1] = np.inf
    spectrum = share * needs[np.isfinite(needs)].sum()
    np.testing.assert_array_equal(admit(needs, spectrum), by_sorting(needs, spectrum * (1 + 1e-12)))


def test_a_hundred_thousand_users():
    rng = np.random.default_rng(0)
    needs = rng.lognormal(0, 2, 100_000)
    spectrum = 0.3 * needs.sum()
    np.testing.assert_array_equal(admit(needs, spectrum), by_sorting(needs, spectrum))


CORNERS = [
    # needs, spectrum -> admitted
    ([0.0, 1.0, np.inf, 0.0], 0.0, [1, 0, 0, 1]),
    ([1.0, 2.0, 3.0], 6.0, [1, 1, 1]),
    ([1.0, 2.0, 3.0], 1e300, [1, 1, 1]),
    ([np.inf, np.inf], 1e300, [0, 0]),
    ([np.inf, 5.0], 1e308, [0, 1]),
    ([2.0, 2.0, 2.0, 2.0], 5.0, [1, 1, 0, 0]),
    ([2.0, 1.0, 2.0, 2.0], 5.0, [1, 1, 1, 0]),
    ([3.0, 2.0, 3.0], 4.9, [0, 1, 0]),
    ([1e308, 1e308], 1e308, [1, 0]),
    ([1e-300, 2e-300], 1e-300, [1, 0]),
    ([1.0, 1e-300, 1e300], 1.0, [1, 1, 0]),
    ([5.0], 4.0, [0]),
    ([5.0], 5.0, [1]),
    ([], 5.0, []),
]


@pytest.mark.parametrize(("needs", "spectrum", "expected"), CORNERS)
def test_corners(needs, spectrum, expected):
    np.testing.assert_array_equal(admit(np.array(needs, float), spectrum), np.array(expected, bool))


@pytest.mark.parametrize("users", [3, 7, 10, 101, 1000])
@pytest.mark.parametrize("equal", [True, False])
def test_an_exact_fit_is_a_fit_however_it_is_summed(users, equal):
    rng = np.random.default_rng(users)
    needs = np.full(users, 0.1) if equal else 0.1 + rng.random(users)
    needs = np.concatenate([needs, [50.0]])
    spectrum = math.fsum(needs[:-1])
    for order in (np.arange(users + 1), np.arange(users + 1)[::-1], rng.permutation(users + 1)):
        for rounded in (spectrum, spectrum * (1 - 4e-13)):
            assert np.asarray(admit(needs[order], rounded)).sum() == users
        assert np.asarray(admit(needs[order], spectrum * (1 - 1e-11))).sum() == users - 1


def test_drops_are_mapped():
    rng = np.random.default_rng(1)
    needs, spectrum = rng.integers(0, 5, (20, 6)).astype(float), rng.integers(0, 15, 20).astype(float)
    mapped = jax.vmap(admission.admit)(needs, spectrum)
    for ours, need, total in zip(mapped, needs, spectrum, strict=True):
        np.testing.assert_array_equal(ours, by_sorting(need, total))


@given(
    st.sampled_from(SIZES).flatmap(lambda size: st.lists(st.booleans(), min_size=size, max_size=size)),
    st.one_of(st.integers(0, 8).map(float), st.just(0.5), st.just(math.inf)),
)
def test_the_first_of_the_members(members, count):
    members = np.array(members)
    expected = members & (np.cumsum(members) <= count)
    np.testing.assert_array_equal(first_of(members, count), expected)
