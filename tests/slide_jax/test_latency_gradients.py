"""Gradients of latency and least rate: finite differences, and subgradients where layers tie."""

import functools
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from slide_jax.latency import latency, latency_associative, latency_closed_form, least_rate

FORMS = {"recursion": latency, "associative": latency_associative, "closed form": latency_closed_form}
jitted = {name: jax.jit(form) for name, form in FORMS.items()}
jitted_least_rate = jax.jit(least_rate)
gradient_of = {
    name: jax.jit(jax.grad(lambda *a, form=form: jnp.sum(form(*a)), tuple(range(5))))
    for name, form in FORMS.items()
}
"""Gradients in layer bits, layer FLOP, rate, speed and start."""


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@st.composite
def chains(draw, number=(1, 2, 5)):
    """Draws layers in whole numbers, many of them 0, with ties between layers that can decide."""
    size = draw(st.sampled_from(number))
    amounts = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    return draw(amounts), draw(amounts)


paces = st.sampled_from([Fraction(1, 3), Fraction(1), Fraction(2), Fraction(7, 2)])


def floats(*values):
    return [np.asarray(value, np.float64) for value in values]


def apart(bits, flop, rate, speed):
    """Whether the deciding layer stands clear of all others, for every chain."""
    paths = np.cumsum(bits, 0) / rate + np.cumsum(flop[::-1], 0)[::-1] / speed
    first, second = np.sort(paths, axis=0)[[-1, -2]]
    return first > second * (1 + 1e-2)


def chains_apart(layers=6, batch=20, seed=5):
    rng = np.random.default_rng(seed)
    bits, flop = rng.lognormal(0, 1, (2, layers, 400))
    rate, speed = rng.uniform(0.5, 2, (2, 400))
    keep = np.flatnonzero(apart(bits, flop, rate, speed))[:batch]
    assert keep.size == batch
    return bits[:, keep], flop[:, keep], rate[keep], speed[keep], rng.random(batch)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_agree_with_finite_differences_away_from_ties(form):
    arguments = chains_apart()
    gradients = gradient_of[form](*arguments)
    for number, gradient in enumerate(gradients):
        argument = arguments[number]
        assert gradient.shape == argument.shape

        def value_at(step, number=number, argument=argument):
            return jitted[form](*arguments[:number], argument + step, *arguments[number + 1 :])

        # Chains do not touch each other, so all of a batch move at once; layers move one by one.
        steps = np.eye(len(argument))[:, :, None] if argument.ndim == 2 else np.ones((1, len(argument)))
        for row, step in zip(np.atleast_2d(gradient), 1e-6 * steps, strict=True):
            slope = (value_at(step) - value_at(-step)) / 2e-6
            np.testing.assert_allclose(row, slope, rtol=1e-6, atol=1e-8)


def test_check_grads_of_the_custom_rule():
    arguments = chains_apart(batch=3)
    check_grads(lambda *a: latency(*a) ** 2, arguments, order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize("pace", ["per model", "per user and model", "one"])
def test_gradients_of_broadcast_arguments_are_summed(pace):
    rng = np.random.default_rng(6)
    bits, flop = rng.lognormal(0, 1, (2, 5, 4))
    rate = rng.uniform(0.5, 2, (3, 1))
    speed = {
        "per model": rng.uniform(0.5, 2, 4),
        "per user and model": rng.uniform(0.5, 2, (3, 4)),
        "one": np.float64(1.5),
    }[pace]
    weights = rng.random((3, 4))

    def weighted(form, *arguments):
        return jnp.sum(weights * form(*arguments))

    ours, automatic = (
        jax.jit(jax.grad(functools.partial(weighted, form), (0, 1, 2, 3)))(bits, flop, rate, speed)
        for form in (latency, latency_closed_form)
    )
    for gradient, expected, argument in zip(ours, automatic, (bits, flop, rate, speed), strict=True):
        assert gradient.shape == np.shape(argument)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_gradients_under_vmap():
    bits, flop, rate, speed, start = chains_apart()
    together = gradient_of["recursion"](bits, flop, rate, speed, start)
    axes = (1, 1, 0, 0, 0)
    one = jax.grad(latency, tuple(range(5)))
    apart_from_each_other = jax.jit(jax.vmap(one, axes, axes))(bits, flop, rate, speed, start)
    chex.assert_trees_all_close(tuple(together), tuple(apart_from_each_other), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@given(chains(number=(1, 5)), chains(number=(1, 5)), st.lists(paces, min_size=4, max_size=4))
def test_gradients_are_subgradients_at_ties(form, chain, other, pace):
    """Latency is convex in sizes and workloads together, and in rate and speed together."""
    if len(chain[0]) != len(other[0]):
        other = chain[::-1]
    rate, speed, other_rate, other_speed = floats(*pace)
    here, there = floats(*chain), floats(*other)
    value, gradients = jitted[form], gradient_of[form](*here, rate, speed, 0.0)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    base = value(*here, rate, speed)
    by_layers = sum(np.vdot(g, y - x) for g, x, y in zip(gradients[:2], here, there, strict=True))
    assert value(*there, rate, speed) >= base + by_layers - 1e-9
    by_pace = gradients[2] * (other_rate - rate) + gradients[3] * (other_speed - speed)
    assert value(*here, other_rate, other_speed) >= base + by_pace - 1e-9


def test_gradient_is_that_of_the_last_deciding_layer():
    """Bits 1, 1 and FLOP 1, 1 at unit pace: both layers decide."""
    gradients = jax.grad(latency, (0, 1, 2, 3))(*floats([1, 1], [1, 1], 1, 1))
    for gradient, expected in zip(gradients, ([1, 1], [0, 1], -2, -1), strict=True):
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize(
    ("bits", "flop", "rate", "speed", "expected"),
    [
        ([0, 0], [1, 2], 0, 2, (0, 0.5, 0, -3 / 4, 1)),
        ([1, 2], [0, 0], 2, 0, (0.5, 0, -3 / 4, 0, 1)),
        ([1, 2], [1, 2], 0, 2, (0, 0, 0, 0, 1)),
        ([1, 2], [1, 2], 2, 0, (0, 0, 0, 0, 1)),
        ([0, 0], [0, 0], 0, 0, (0, 0, 0, 0, 1)),
    ],
)
def test_a_pace_of_zero_leaves_no_nan_in_the_gradients(bits, flop, rate, speed, expected):
    gradients = gradient_of["recursion"](*floats(bits, flop, rate, speed, 0))
    for gradient, slope in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(gradient, slope)


def test_gradients_of_the_least_rate():
    rng = np.random.default_rng(8)
    bits, flop = rng.lognormal(0, 1, (2, 6))
    arguments = (bits, flop, 3 * flop.sum(), 1.3)
    check_grads(jitted_least_rate, arguments, order=1, eps=1e-6, rtol=1e-5)
    late = jax.grad(jitted_least_rate, (0, 1, 2, 3))(bits, flop, 0.5 * flop.sum(), 1.0)
    assert not any(np.any(np.isnan(gradient)) for gradient in late)
