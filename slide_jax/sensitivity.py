"""Sensitivities: what one more megahertz, one more millisecond or a smaller layer is worth.

The least bandwidth b of a user is where the latency meets the deadline,

    latency(layer_bits, layer_flop, rate(b, signal), speed, start) = deadline,

so its derivatives follow from those of the recursion by the implicit function theorem (`roots`),
db/dx = -(d latency / dx) / (d latency / db). Only the bits up to the layer that determines the latency, and
the work from it on, have derivatives other than 0. Where several layers determine it, or several models need
the same bandwidth, the derivatives are one-sided.

Axes: K users, I models, L layers.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from slide_jax.errors import unknown_name
from slide_jax.float64 import compute_in_float64, to_float64
from slide_jax.hull import Hull
from slide_jax.latency import latency, least_rate
from slide_jax.problem import RATE_MODELS, Allocation, Problem, refuse_traced
from slide_jax.provisioning import BANDWIDTHS, RATES, clock_of, provision, signal_of
from slide_jax.relaxed import Relaxation, relax
from slide_jax.roots import differentiable_root


class Sensitivities(NamedTuple):
    """Derivatives of each served user's least bandwidth, at its model and clock; 0 for the others.

    Attributes:
      deadline_hz_per_s: at most 0: a later deadline needs less.
      clock_hz_per_hz: by the clock, at most 0.
      layer_bits_hz_per_bit: at least 0; the same for every layer up to the deciding one, 0 beyond.
      layer_flop_hz_per_flop: at least 0; 0 before the deciding layer, the same from there on. The clock
        stays, though a heavier model may not keep it within the energy.
    """

    deadline_hz_per_s: Float[Array, " K"]
    clock_hz_per_hz: Float[Array, " K"]
    layer_bits_hz_per_bit: Float[Array, "K L"]
    layer_flop_hz_per_flop: Float[Array, "K L"]


class Margins(NamedTuple):
    """Derivatives of the users served, relaxed; clocks follow the energy, users keep their models.

    Attributes:
      served: the relaxed number itself.
      spectrum_users_per_hz: the shadow price of spectrum, at least 0.
      deadline_users_per_s: by each user's deadline, at least 0.
      energy_users_per_j: by each user's energy budget, at least 0.
      layer_bits_users_per_bit: by the size of each model's layers, for all its users, at most 0.
      layer_flop_users_per_flop: by their work, at most 0.
    """

    served: Float[Array, ""]
    spectrum_users_per_hz: Float[Array, ""]
    deadline_users_per_s: Float[Array, " K"]
    energy_users_per_j: Float[Array, " K"]
    layer_bits_users_per_bit: Float[Array, "I L"]
    layer_flop_users_per_flop: Float[Array, "I L"]


def least_bandwidth(
    layer_bits: Float[ArrayLike, "L ..."],
    layer_flop: Float[ArrayLike, "L ..."],
    deadline_s: Float[ArrayLike, "..."],
    start_s: Float[ArrayLike, "..."],
    speed_flop_s: Float[ArrayLike, "..."],
    signal: Float[ArrayLike, "..."],
    rate_model: str = "linear",
) -> Float[Array, "..."]:
    """Returns the least bandwidth [Hz] that meets the deadline; its value by the closed form.

    Args:
      layer_bits, layer_flop: of the layers, as in `latency`.
      deadline_s, start_s: from time 0 [s].
      speed_flop_s: clock times FLOP per cycle.
      signal: spectral efficiency [bit/s/Hz] under `linear`, snr_hz [Hz] under `shannon`.
      rate_model: `linear` or `shannon`.

    Returns:
      Bandwidths, infinite where none suffices. Reverse-mode derivatives by all arrays; 0 where the
      bandwidth is 0 or infinite.

    Raises:
      InputError: an unknown rate model.

    >>> bits, flop = jnp.array([2.0, 4.0]), jnp.array([1.0, 1.0])
    >>> b, slope = jax.value_and_grad(least_bandwidth, 2)(bits, flop, 4.0, 0.0, 1.0, 1.0)
    >>> float(b), float(slope)  # 6 bits in the 3 s before the last layer has to run
    (2.0, -0.6666666865348816)
    """
    if rate_model not in RATE_MODELS:
        raise unknown_name("rate_model", rate_model, RATE_MODELS)
    scalars = jnp.broadcast_arrays(deadline_s, start_s, speed_flop_s, signal)
    dtype = jnp.result_type(float, layer_bits, layer_flop, *scalars)
    batch = jnp.broadcast_shapes(scalars[0].shape, jnp.shape(layer_bits)[1:], jnp.shape(layer_flop)[1:])
    layers = [_with_axes(jnp.asarray(array, dtype), 1 + len(batch)) for array in (layer_bits, layer_flop)]
    return _least_bandwidth(rate_model, *layers, *(jnp.broadcast_to(x, batch).astype(dtype) for x in scalars))


def sensitivities(problem: Problem, allocation: Allocation) -> Sensitivities:
    """Returns what would change the served users' least bandwidths, whatever share they have got.

    Args:
      problem: of any kind.
      allocation: an answer to it, whose models and clocks count.

    Returns:
      NumPy arrays, float64.
    """
    refuse_traced("sensitivities", problem, allocation)
    with jax.enable_x64(True):
        chosen = (np.asarray(allocation.model, np.int32), np.asarray(allocation.frequency_hz, np.float64))
        return jax.tree.map(np.asarray, _sensitivities(to_float64(problem), *chosen))


def margins(problem: Problem) -> Margins:
    """Returns what more spectrum, time, energy and smaller layers are worth in users, relaxed.

    The number of users is a staircase in all of these; its relaxation (`relaxed`) is not, and counts whoever
    is on the margin in part.

    Returns:
      NumPy arrays, float64.
    """
    return compute_in_float64(_margins, problem)


def shadow_price(problem: Problem) -> float:
    """Returns the shadow price of spectrum: users, relaxed, that one more hertz would serve."""
    return float(margins(problem).spectrum_users_per_hz)


def relax_problem(problem: Problem, model: Int[ArrayLike, " K"]) -> Relaxation:
    """Returns the relaxed problem's optimum as a differentiable function of everything in the problem.

    Args:
      problem: float64 arrays.
      model: index of each user's model, which stays; -1: none. Of the admissible model of least
        bandwidth, derivatives are those with a free choice of it, but where two need the same.
    """
    return relax(_bandwidth_of_models(problem, model), problem.bandwidth_hz)


def _bandwidth_of_models(problem, model):
    catalogue, users = problem.catalogue, problem.users
    chosen = jnp.maximum(model, 0)
    layer_bits, layer_flop = catalogue.layer_bits.T[:, chosen], catalogue.layer_flop.T[:, chosen]
    clock = clock_of(jnp.sum(layer_flop, axis=0), users)
    needed = _bandwidth_at(problem, layer_bits, layer_flop, users.deadline_s, clock)
    return jnp.where((model >= 0) & (clock > 0), needed, jnp.inf)


def _bandwidth_at(problem, layer_bits, layer_flop, deadline_s, clock_hz):
    users = problem.users
    speed = jnp.where(clock_hz > 0, clock_hz, 1.0) * users.flop_per_cycle
    return least_bandwidth(
        layer_bits,
        layer_flop,
        deadline_s,
        users.start_s,
        speed,
        signal_of(users, problem.rate_model),
        problem.rate_model,
    )


@jax.jit
def _sensitivities(problem, model, frequency_hz):
    catalogue, users = problem.catalogue, problem.users
    chosen = jnp.maximum(model, 0)
    layers = catalogue.layer_bits.T[:, chosen], catalogue.layer_flop.T[:, chosen]

    def total(deadline_s, clock_hz, layer_bits, layer_flop):
        bandwidth = _bandwidth_at(problem, layer_bits, layer_flop, deadline_s, clock_hz)
        return jnp.sum(jnp.where((model >= 0) & (bandwidth < jnp.inf), bandwidth, 0.0))

    by_deadline, by_clock, by_bits, by_flop = jax.grad(total, (0, 1, 2, 3))(
        users.deadline_s, frequency_hz, *layers
    )
    return Sensitivities(by_deadline, by_clock, by_bits.T, by_flop.T)


def _margins(hull: Hull, problem: Problem) -> Margins:
    model = provision(hull, problem).model

    def served(spectrum_hz, deadline_s, energy_j, layer_bits, layer_flop):
        catalogue = dataclasses.replace(problem.catalogue, layer_bits=layer_bits, layer_flop=layer_flop)
        users = dataclasses.replace(problem.users, deadline_s=deadline_s, energy_j=energy_j)
        changed = dataclasses.replace(problem, catalogue=catalogue, users=users, bandwidth_hz=spectrum_hz)
        return relax_problem(changed, model).served

    at = (
        problem.bandwidth_hz,
        problem.users.deadline_s,
        problem.users.energy_j,
        problem.catalogue.layer_bits,
        problem.catalogue.layer_flop,
    )
    value, slopes = jax.value_and_grad(served, range(5))(*at)
    return Margins(value, *slopes)


def _with_axes(array, axes):
    """Returns an array over layers with as many axes, new ones after the first."""
    return array.reshape(array.shape[:1] + (1,) * (axes - array.ndim) + array.shape[1:])


def _spare_time(rate_model, bandwidth_hz, layer_bits, layer_flop, deadline_s, start_s, speed_flop_s, signal):
    """Returns the time [s] between completion and deadline, which grows with the bandwidth."""
    # Where the least bandwidth is 0 or infinite there is no root; harmless numbers avoid nan.
    rooted = (bandwidth_hz > 0) & (bandwidth_hz < jnp.inf)
    rate = RATES[rate_model](jnp.where(rooted, bandwidth_hz, 1.0), jnp.where(rooted, signal, 1.0))
    speed = jnp.where(speed_flop_s > 0, speed_flop_s, 1.0)
    spare_s = deadline_s - latency(layer_bits, layer_flop, rate, speed, start_s)
    return jnp.where(rooted, spare_s, 0.0)


def _closed_form(rate_model, layer_bits, layer_flop, deadline_s, start_s, speed_flop_s, signal):
    rate = least_rate(layer_bits, layer_flop, deadline_s - start_s, speed_flop_s)
    return BANDWIDTHS[rate_model](rate, signal)


def _least_bandwidth(rate_model, *arrays):
    """Returns the closed form, with the derivatives of the root of `_spare_time`."""
    implicit = differentiable_root(functools.partial(_spare_time, rate_model))
    return implicit(lambda _, *arrays: _closed_form(rate_model, *arrays))(None, *arrays)
