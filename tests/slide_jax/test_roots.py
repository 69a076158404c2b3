"""Roots of scalar equations: derivatives by closed forms, brackets by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slide_jax.roots import bisect, differentiable_root, earliest_gain, root_tangent


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def excess(root, square, scale):
    """Its root is scale * sqrt(square)."""
    return (root / scale) ** 2 - square


@differentiable_root(excess)
def scaled_root(guess, square, scale):
    return scale * jnp.sqrt(square)


@differentiable_root(excess, has_aux=True)
def scaled_root_and_steps(guess, square, scale):
    return scale * jnp.sqrt(square), jnp.int32(1)


SQUARE, SCALE = np.array([4.0, 9.0, 2.0]), np.array([1.0, 2.0, 0.5])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_derivatives_are_those_of_the_closed_form(transform):
    by_square, by_scale = transform(jax.grad(lambda *a: scaled_root(None, *a).sum(), (0, 1)))(SQUARE, SCALE)
    np.testing.assert_allclose(by_square, SCALE / (2 * np.sqrt(SQUARE)), rtol=1e-14)
    np.testing.assert_allclose(by_scale, np.sqrt(SQUARE), rtol=1e-14)
    with_steps = jax.grad(lambda square: scaled_root_and_steps(None, square, SCALE)[0].sum())
    np.testing.assert_array_equal(with_steps(SQUARE), by_square)


def test_forward_and_reverse_mode_agree():
    tangents = (np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.0, 1.0]))
    forward = root_tangent(excess, SCALE * np.sqrt(SQUARE), (SQUARE, SCALE), tangents)
    reverse = jax.grad(lambda *a: scaled_root(None, *a).sum(), (0, 1))(SQUARE, SCALE)
    np.testing.assert_allclose(
        forward, sum(r * t for r, t in zip(reverse, tangents, strict=True)), rtol=1e-14
    )


def test_without_a_slope_there_are_no_derivatives():
    """At the root 0 the slope of the square is 0; a residual that falls is no residual of ours."""
    assert jax.grad(scaled_root, 1)(0.0, 0.0, 1.0) == 0
    falling = differentiable_root(lambda root, square: square - root**2)(
        lambda guess, square: jnp.sqrt(square)
    )
    assert jax.grad(falling, 1)(0.0, 4.0) == 0


@jax.jit
def upper_ends(root, low, high):
    """Of a residual that rises and of one that falls."""
    return bisect(lambda x: x - root, low, high), bisect(lambda x: root - x, low, high)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_the_upper_end_of_the_bracket_is_at_the_root_and_never_below_it(root, width):
    rising, falling = upper_ends(root, root - width, root + width / 3)
    assert root <= rising <= root + 1e-12 * (abs(root) + width)
    assert falling == rising


def test_an_exact_root_in_the_middle_does_not_end_the_search():
    found = bisect(lambda x: x - 1.0, jnp.float64(0.0), jnp.float64(2.0))
    assert 1.0 <= found <= 1.0 + 1e-15


def test_a_bracket_without_a_root_gives_its_upper_end():
    assert bisect(lambda x: x + 1.0, jnp.float64(0.0), jnp.float64(2.0)) == 2.0


@pytest.mark.parametrize("shift", [0.0, 1.7e9])
@pytest.mark.parametrize("power", [1, 3, 9])
def test_the_earliest_gain_is_the_root_and_never_below_it(power, shift):
    def gain(x, root):
        return jnp.clip((x - shift) ** power / root**power - 1, -1.0, 1.0)

    def find(root):
        low, high = jnp.zeros_like(root), jnp.full_like(root, 8.0 + shift)
        return earliest_gain(lambda x: gain(x, root), low, high, 1e-13)

    for root in (0.01, 0.7, 5.0, 7.999):
        found = jax.jit(find)(jnp.float64(root))
        # As near as the numbers around the shift are to each other, and never on the side of a loss.
        np.testing.assert_allclose(found - shift, root, rtol=1e-12, atol=8 * np.spacing(shift))
        assert gain(found, root) >= 0
    assert jax.jit(find)(jnp.float64(9.0)) == 8.0 + shift  # no root in the bracket
    if not shift:
        np.testing.assert_allclose(jax.grad(find)(jnp.float64(0.7)), 1.0, rtol=1e-9)
