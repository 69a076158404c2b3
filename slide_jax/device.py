"""What an inference costs a user's device, and the fastest clock that its energy budget allows.

A device at clock f [Hz] finishes c cycles in c / f seconds, all of them busy, and consumes
kappa f^2 c for switching and its static power for as long as it is busy. Pure functions of arrays that
broadcast against each other (cycles [I, K] with users [K]) and follow the dtype of their inputs.

Source of the energy model: Burd and Brodersen, "Processor design for portable systems", Journal of VLSI
Signal Processing 13 (1996), the usual one of mobile edge computing; static power is our addition.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from slide_jax.roots import root_tangent


def inference_energy(
    frequency_hz: Float[ArrayLike, "..."],
    cycles: Float[ArrayLike, "..."],
    kappa_j_per_hz2_cycle: Float[ArrayLike, "..."],
    static_power_w: Float[ArrayLike, "..."],
) -> Float[Array, "..."]:
    """Returns kappa f^2 cycles + static power * cycles / f.

    Args:
      frequency_hz: clock f, at least 0 [Hz].
      cycles: of the whole inference, at least 0.
      kappa_j_per_hz2_cycle: at least 0.
      static_power_w: drawn while busy, at least 0 [W].

    Returns:
      Energy [J], 0 for no cycles; at clock 0 it is infinite if there are cycles and static power.

    >>> print(inference_energy(1e9, 2e9, 1e-27, 0.5))
    3.0
    """
    running = frequency_hz > 0
    dynamic = kappa_j_per_hz2_cycle * frequency_hz**2 * cycles
    drawn = static_power_w * cycles
    never_ending = jnp.where(drawn > 0, jnp.inf, 0.0)
    return dynamic + jnp.where(running, drawn / jnp.where(running, frequency_hz, 1.0), never_ending)


def best_clock(
    cycles: Float[ArrayLike, "..."],
    energy_j: Float[ArrayLike, "..."],
    f_min_hz: Float[ArrayLike, "..."],
    f_max_hz: Float[ArrayLike, "..."],
    kappa_j_per_hz2_cycle: Float[ArrayLike, "..."],
    static_power_w: Float[ArrayLike, "..."],
) -> Float[Array, "..."]:
    """Returns the fastest clock in range whose inference fits the energy budget E.

    Without static power P that is sqrt(E / (kappa c)), clipped. With it a slow clock wastes energy as well:
    the clocks that fit are an interval around the most economical one, between the two positive roots of
    kappa c f^3 - E f + P c = 0, of which the larger counts. As long as nobody has static power the
    cubic is not computed.

    Args:
      cycles: c, at least 0; for none, every clock fits.
      energy_j: E, at least 0; infinite: no limit [J].
      f_min_hz, f_max_hz: range of the clock, 0 < f_min <= f_max [Hz].
      kappa_j_per_hz2_cycle: at least 0.
      static_power_w: P, at least 0 [W].

    Returns:
      Clock [Hz]; 0 where no clock in range fits. An energy above the budget by a part of 1e-12 (16 units in
      the last place in float32) fits. Derivatives are those of the energy equation between the ends of
      the range, those of the end at an end, and 0 where nothing fits.

    >>> print(best_clock(2e9, 0.5, 3e8, 1.3e9, 1e-27, 0.0))
    5e+08
    """
    values = (cycles, energy_j, f_min_hz, f_max_hz, kappa_j_per_hz2_cycle, static_power_w)
    dtype = jnp.result_type(float, *values)
    return _best_clock(*(jnp.asarray(value, dtype) for value in values))


@jax.custom_jvp
@jax.jit  # else every call outside a jit would compile the two branches anew
def _best_clock(cycles, energy_j, f_min_hz, f_max_hz, kappa, static_power_w):
    shape = jnp.broadcast_shapes(
        *(v.shape for v in (cycles, energy_j, f_min_hz, f_max_hz, kappa, static_power_w))
    )
    tolerance = max(1e-12, 16 * float(jnp.finfo(cycles.dtype).eps))

    def largest_fitting(clock, energy_at):
        """The energy is checked where the clock ends up: the range may lie beside the interval."""
        clock = jnp.clip(clock, f_min_hz, f_max_hz)
        fits = energy_at(clock) <= energy_j * (1 + tolerance)
        return jnp.broadcast_to(jnp.where(fits, clock, 0.0), shape)

    # Neither branch is differentiated: what is nan or infinite on the way and masked does no harm.
    def without_static_power():
        price = kappa * cycles
        clock = jnp.where(price > 0, jnp.sqrt(energy_j / price), jnp.inf)
        return largest_fitting(clock, lambda f: price * f**2)

    def with_static_power():
        # f = 2 s cos(t) turns the cubic into cos(3 t) = -P / (2 kappa s^3); below the least energy of
        # all clocks that is under -1, and whatever comes out fails the check.
        price = kappa * cycles
        scale = jnp.sqrt(energy_j / (3 * price))
        cosine = jnp.minimum(static_power_w / (2 * kappa * scale**3), 1.0)
        clock = jnp.where(price > 0, 2 * scale * jnp.cos(jnp.arccos(-cosine) / 3), jnp.inf)
        return largest_fitting(clock, lambda f: inference_energy(f, cycles, kappa, static_power_w))

    return jax.lax.cond(jnp.any(static_power_w > 0), with_static_power, without_static_power)


@_best_clock.defjvp
def _best_clock_jvp(primals, tangents):
    cycles, energy_j, f_min_hz, f_max_hz, kappa, static_power_w = primals
    cycles_dot, energy_dot, f_min_dot, f_max_dot, kappa_dot, static_power_dot = tangents
    clock = _best_clock(*primals)
    root = jnp.where(clock > 0, clock, 1.0)  # no root where nothing fits; any clock avoids nan
    clock_dot = root_tangent(
        lambda clock, *device: inference_energy(clock, *device[:3]) - device[3],
        root,
        (cycles, kappa, static_power_w, energy_j),
        (cycles_dot, kappa_dot, static_power_dot, energy_dot),
    )
    at_end = jnp.where(clock == f_max_hz, f_max_dot, jnp.where(clock == f_min_hz, f_min_dot, 0.0))
    inside = (clock > f_min_hz) & (clock < f_max_hz)
    return clock, jnp.where(inside, clock_dot, at_end)
