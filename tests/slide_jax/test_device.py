"""The clock against SciPy's root finder, a grid of clocks and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import assume, given
from hypothesis import strategies as st

from slide_jax.device import best_clock, inference_energy

KAPPA = 1e-27
F_MIN, F_MAX = 3e8, 1.3e9


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


devices = st.fixed_dictionaries(
    {
        "cycles": st.floats(1e6, 1e10),
        "energy_j": st.floats(1e-3, 20.0),
        "f_min_hz": st.floats(1e7, 5e8),
        "f_max_hz": st.floats(5e8, 3e9),
        "kappa_j_per_hz2_cycle": st.floats(1e-29, 1e-26),
        "static_power_w": st.one_of(st.just(0.0), st.floats(1e-6, 10.0)),
    }
)


def energy_at(clock, device):
    """The formula, in NumPy."""
    return (
        device["kappa_j_per_hz2_cycle"] * clock**2 * device["cycles"]
        + device["static_power_w"] * device["cycles"] / clock
    )


def clock_by_search(device):
    """Largest fitting clock by SciPy: the energy is convex in the clock."""
    low, high, budget = device["f_min_hz"], device["f_max_hz"], device["energy_j"]
    if energy_at(high, device) <= budget:
        return high
    cheapest = (device["static_power_w"] / (2 * device["kappa_j_per_hz2_cycle"])) ** (1 / 3)
    cheapest = min(max(cheapest, low), high)
    if energy_at(cheapest, device) > budget:
        return 0.0
    return scipy.optimize.brentq(
        lambda f: energy_at(f, device) - budget, cheapest, high, xtol=1e-3, rtol=1e-14
    )


@given(devices)
def test_energy_is_the_formula(device):
    clock = device["f_max_hz"]
    result = inference_energy(
        clock, device["cycles"], device["kappa_j_per_hz2_cycle"], device["static_power_w"]
    )
    np.testing.assert_allclose(result, energy_at(clock, device), rtol=1e-14)


def test_energy_at_the_corners():
    clock = np.array([0.0, 0.0, 0.0, 1e9])
    cycles = np.array([0.0, 1e9, 1e9, 0.0])
    power = np.array([1.0, 0.0, 1.0, 1.0])
    np.testing.assert_array_equal(inference_energy(clock, cycles, KAPPA, power), [0, 0, np.inf, 0])
    gradients = jax.vmap(jax.grad(inference_energy, (0, 1, 2, 3)), (0, 0, None, 0))(
        clock, cycles, KAPPA, power
    )
    assert not any(np.any(np.isnan(gradient)) for gradient in gradients)


@given(devices)
def test_clock_agrees_with_search(device):
    expected, result = clock_by_search(device), float(best_clock(**device))
    least = min(energy_at(np.geomspace(device["f_min_hz"], device["f_max_hz"], 400), device))
    assume(abs(least / device["energy_j"] - 1) > 1e-3)  # at the very tip the clock is a double root
    np.testing.assert_allclose(result, expected, rtol=1e-9)


@given(devices)
def test_clock_fits_and_no_faster_one_does(device):
    clock = float(best_clock(**device))
    faster = np.geomspace(max(clock, device["f_min_hz"]) * (1 + 1e-6), device["f_max_hz"], 500)
    if clock:
        assert device["f_min_hz"] <= clock <= device["f_max_hz"]
        assert energy_at(clock, device) <= device["energy_j"] * (1 + 2e-12)
    if clock < device["f_max_hz"]:
        assert np.all(energy_at(faster, device) > device["energy_j"] * (1 - 1e-9))


@given(devices, st.floats(1, 3))
def test_more_energy_is_never_slower_and_any_other_load_never_faster(device, factor):
    clock = best_clock(**device)
    slack = 1 + 1e-9
    assert best_clock(**(device | {"energy_j": device["energy_j"] * factor})) * slack >= clock
    for name in ("cycles", "kappa_j_per_hz2_cycle", "static_power_w"):
        assert best_clock(**(device | {name: device[name] * factor})) <= clock * slack
    more_power = device | {"static_power_w": device["static_power_w"] + factor - 1}
    assert best_clock(**more_power) <= clock * slack


@given(devices)
def test_users_without_static_power_do_not_depend_on_those_with(device):
    alone = best_clock(**(device | {"static_power_w": 0.0}))
    together = best_clock(**(device | {"static_power_w": np.array([0.0, 1.0])}))
    np.testing.assert_allclose(together[0], alone, rtol=1e-12)


# cycles, energy, kappa, static power -> clock
CORNERS = [
    (0.0, 0.0, KAPPA, 0.0, F_MAX),
    (0.0, 0.0, KAPPA, 1.0, F_MAX),
    (0.0, 1.0, KAPPA, 1.0, F_MAX),
    (1e9, np.inf, KAPPA, 0.0, F_MAX),
    (1e9, np.inf, KAPPA, 1.0, F_MAX),
    (0.0, np.inf, 0.0, 0.0, F_MAX),
    (1e9, 0.0, KAPPA, 0.0, 0.0),
    (1e9, 0.0, KAPPA, 1.0, 0.0),
    (1e9, 0.0, 0.0, 1.0, 0.0),
    (1e9, 0.0, 0.0, 0.0, F_MAX),
    (1.3e9, 1.001, 0.0, 1.0, F_MAX),  # energy P c / f falls with the clock
    (1.3e9, 0.999, 0.0, 1.0, 0.0),
    (1e9, KAPPA * 1e9 * F_MIN**2, KAPPA, 0.0, F_MIN),  # an exact fit
    (1e9, KAPPA * 1e9 * F_MIN**2 * (1 - 1e-9), KAPPA, 0.0, 0.0),
    (1e9, KAPPA * 1e9 * 6e8**2 + 0.3e9 / 6e8, KAPPA, 0.3, 6e8),
    (1e9, 0.999 * 3 * KAPPA * 1e9 * 5e8**2, KAPPA, 2 * KAPPA * 5e8**3, 0.0),  # below the cheapest clock's
    (1e9, 3 * KAPPA * 1e9 * 5e8**2, KAPPA, 2 * KAPPA * 5e8**3, 5e8),  # exactly the cheapest clock's
    (1e9, KAPPA * 1e9 * 2e9**2 + 15.0, KAPPA, 30.0, 0.0),  # the range lies below the interval
    (1e9, KAPPA * 1e9 * 1e8**2 + 1e-7, KAPPA, 1e-8, 0.0),  # the range lies above the interval
]


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(corner):
    cycles, energy, kappa, power, expected = corner
    result = best_clock(cycles, energy, F_MIN, F_MAX, kappa, power)
    # The double root of the cheapest clock is known to the square root of the rounding.
    np.testing.assert_allclose(result, expected, rtol=1e-6 if expected == 5e8 else 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_corners_together_have_finite_gradients_and_keep_the_type(dtype):
    cycles, energy, kappa, power, expected = (
        np.array(column, dtype) for column in zip(*CORNERS, strict=True)
    )
    clock = jax.jit(best_clock)(cycles, energy, dtype(F_MIN), dtype(F_MAX), kappa, power)
    assert clock.dtype == dtype
    coarse = np.isclose(energy, dtype(CORNERS[13][1])) | (expected == dtype(5e8))  # lost in float32
    np.testing.assert_allclose(clock[~coarse], expected[~coarse], rtol=1e-5)

    def total(*values):
        return jnp.sum(best_clock(*values))

    ends = np.full_like(cycles, F_MIN), np.full_like(cycles, F_MAX)
    gradients = jax.grad(total, tuple(range(6)))(cycles, energy, *ends, kappa, power)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("power", [0.0, 0.05, 0.3])
def test_gradients_inside_the_range_are_those_of_the_energy_equation(power):
    def scaled(cycles, energy, kappa, static_power):
        return best_clock(1e9 * cycles, energy, F_MIN, F_MAX, kappa * KAPPA, static_power) / 1e9

    point = [1.0, 0.9, 1.0, power]
    gradients = jax.grad(scaled, (0, 1, 2, 3))(*point)
    for index, gradient in enumerate(gradients):
        step = 1e-6
        up, down = list(point), list(point)
        up[index] += step
        if power == 0 and index == 3:  # static power has no other side
            difference = (scaled(*up) - scaled(*point)) / step
        else:
            down[index] -= step
            difference = (scaled(*up) - scaled(*down)) / (2 * step)
        np.testing.assert_allclose(gradient, difference, rtol=1e-4)
        assert gradient != 0


def test_gradients_at_the_ends_of_the_range():
    gradient = jax.grad(best_clock, (1, 2, 3))
    np.testing.assert_array_equal(
        gradient(1e9, 5.0, F_MIN, F_MAX, KAPPA, 0.1), [0, 0, 1]
    )  # all of the range fits
    np.testing.assert_array_equal(gradient(1e9, 0.01, F_MIN, F_MAX, KAPPA, 0.1), [0, 0, 0])  # nothing fits


def test_second_derivative():
    # f = sqrt(E / (kappa c)): f'' = -f / (4 E^2)
    second = jax.grad(jax.grad(best_clock, 1), 1)(1e9, 0.5, F_MIN, F_MAX, KAPPA, 0.0)
    np.testing.assert_allclose(second, -np.sqrt(0.5 / (KAPPA * 1e9)) / (4 * 0.5**2), rtol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.2])
def test_models_and_users_broadcast_and_batches_agree_with_loops(power):
    rng = np.random.default_rng(0)
    cycles, energy = rng.uniform(1e8, 2e9, (4, 3, 5)), rng.uniform(0.1, 2, (4, 5))
    powers = power * rng.integers(0, 2, (4, 5))

    def drop(cycles, energy, powers):
        return best_clock(cycles, energy, F_MIN, F_MAX, KAPPA, powers)

    together = jax.vmap(drop)(cycles, energy, powers)
    assert together.shape == (4, 3, 5)
    for index in range(4):
        alone = jax.jit(drop)(cycles[index], energy[index], powers[index])
        np.testing.assert_allclose(together[index], alone, rtol=1e-12)
    gradient = jax.vmap(jax.grad(lambda *a: jnp.sum(drop(*a)), 1))(cycles, energy, powers)
    assert gradient.shape == (4, 5) and np.all(gradient >= 0) and np.any(gradient > 0)


def operations(program):
    """Yields (name, operations of each branch) of a traced program; only a `cond` has branches."""
    for equation in program.eqns:
        yield (
            equation.primitive.name,
            [list(operations(b.jaxpr)) for b in equation.params.get("branches", ())],
        )
        for inner in equation.params.keys() & {"jaxpr", "call_jaxpr"}:
            yield from operations(equation.params[inner].jaxpr)


def test_the_cubic_is_computed_only_if_someone_has_static_power():
    program = list(operations(jax.make_jaxpr(jax.jit(best_clock))(*np.ones((6, 2))).jaxpr))
    (branches,) = [branches for name, branches in program if name == "cond"]
    without_static_power, with_static_power = [[name for name, _ in branch] for branch in branches]
    assert "cos" in with_static_power
    assert "cos" not in without_static_power and "cos" not in [name for name, _ in program]
