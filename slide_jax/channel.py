"""The radio channel of one cell: where users are, what reaches them and what rates that allows.

Powers and gains are added in dB and converted to linear numbers once, at the end: linear products, such as a
noise density of 2e-20 W/Hz squared, would underflow float32. Axis: K users.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from slide_jax.rates import spectral_efficiency

THERMAL_NOISE_DBM_PER_HZ = -174.0
"""Boltzmann's constant times 290 K."""


class Cell(NamedTuple):
    """A cell and its transmitter; every field is a number that may be traced.

    Attributes:
      radius_m: of the disk that users stand in [m].
      minimum_distance_m: from the antenna, above 0 [m]; closer to it the path-loss model does not hold.
        Our choice (3GPP keeps 35 m, in larger cells).
      power_dbm: transmit power over the reference bandwidth [dBm].
      reference_bandwidth_hz: the band that this power fills [Hz].
      noise_figure_db: of the receivers [dB].
      path_loss_constant_db: path loss at 1 km [dB].
      path_loss_per_decade_db: path loss added by ten times the distance [dB].
      shadowing_db: standard deviation of the log-normal shadowing [dB]; 0: none.
      rician_k: power of the direct path over that of all others, linear; 0: Rayleigh fading.
      efficiency_cap_bps_hz: of the highest modulation and coding [bit/s/Hz]; 7.4 is 256-QAM at rate 0.93
        (3GPP TS 38.214, Table 5.1.3.1-2).
    """

    radius_m: float = 250.0
    minimum_distance_m: float = 10.0
    power_dbm: float = 33.0
    reference_bandwidth_hz: float = 1e8
    noise_figure_db: float = 7.0
    path_loss_constant_db: float = 128.1
    path_loss_per_decade_db: float = 37.6
    shadowing_db: float = 0.0
    rician_k: float = 0.0
    efficiency_cap_bps_hz: float = 7.4


class Channel(NamedTuple):
    """The channels of the users of one drop; a fading block lasts longer than a task.

    Attributes:
      distance_m: from the antenna [m].
      spectral_efficiency_bps_hz: at the reference power density, for the rate model `linear` [bit/s/Hz].
      snr_hz: P g / N0 with the whole power P of the cell, for the rate model `shannon` [Hz].
    """

    distance_m: Float[Array, " K"]
    spectral_efficiency_bps_hz: Float[Array, " K"]
    snr_hz: Float[Array, " K"]


def db_to_linear(value_db: Float[ArrayLike, "..."]) -> Float[ArrayLike, "..."]:
    """Returns the ratio that a value in dB stands for."""
    return 10.0 ** (value_db / 10)


def path_loss_db(
    distance_m: Float[ArrayLike, "..."],
    constant_db: Float[ArrayLike, ""] = 128.1,
    per_decade_db: Float[ArrayLike, ""] = 37.6,
    minimum_distance_m: Float[ArrayLike, ""] = 10.0,
) -> Float[Array, "..."]:
    """Returns constant + slope * log10(distance in km), for an urban macro cell at 2 GHz by default.

    Args:
      distance_m: taken as `minimum_distance_m` where below it [m].
      constant_db: loss at 1 km [dB].
      per_decade_db: slope [dB].
      minimum_distance_m: above 0 [m].

    Source: 3GPP TR 36.942, section 4.5.2, and TR 36.814, annex A.2.1.1.
    """
    return constant_db + per_decade_db * jnp.log10(jnp.maximum(distance_m, minimum_distance_m) / 1000)


def uniform_disk(
    key: jax.Array, count: int, radius_m: Float[ArrayLike, ""], minimum_distance_m: Float[ArrayLike, ""] = 0.0
) -> Float[Array, " K"]:
    """Draws distances from the centre [m] of users spread evenly over a disk less its innermost part.

    Args:
      key: a PRNG key.
      count: K.
      radius_m: of the disk, at least `minimum_distance_m`.
      minimum_distance_m: radius of what is left out.
    """
    share = jax.random.uniform(key, (count,))  # of the area that lies further in
    inner, outer = minimum_distance_m**2, radius_m**2
    return jnp.sqrt(inner + (outer - inner) * share)


def shadowing_db(
    key: jax.Array, shape: tuple[int, ...], sigma_db: Float[ArrayLike, ""]
) -> Float[Array, "..."]:
    """Draws log-normal shadowing: normal in dB with mean 0 and the given standard deviation."""
    return sigma_db * jax.random.normal(key, shape)


def fading_gain(
    key: jax.Array, shape: tuple[int, ...], rician_k: Float[ArrayLike, ""]
) -> Float[Array, "..."]:
    """Draws power gains of a fading block, |h|^2 with mean 1.

    h is a constant (the direct path) plus a circular complex normal (all others).

    Args:
      key: a PRNG key.
      shape: of the result.
      rician_k: power of the first over that of the second, linear; 0 is Rayleigh fading, whose gain is
        exponential.
    """
    scattered = jax.random.normal(key, (2, *shape)) * jnp.sqrt(0.5 / (1 + rician_k))
    return (scattered[0] + jnp.sqrt(rician_k / (1 + rician_k))) ** 2 + scattered[1] ** 2


def mean_snr(
    loss_db: Float[ArrayLike, "..."],
    power_dbm: Float[ArrayLike, ""],
    reference_bandwidth_hz: Float[ArrayLike, ""],
    noise_figure_db: Float[ArrayLike, ""],
) -> Float[Array, "..."]:
    """Returns the signal-to-noise ratio, linear and before fading, at any part of the reference bandwidth.

    Args:
      loss_db: path loss and shadowing [dB].
      power_dbm: transmit power over the whole reference bandwidth [dBm].
      reference_bandwidth_hz: filled evenly [Hz].
      noise_figure_db: of the receiver [dB].
    """
    noise_dbm = THERMAL_NOISE_DBM_PER_HZ + noise_figure_db + 10 * jnp.log10(reference_bandwidth_hz)
    return db_to_linear(power_dbm - loss_db - noise_dbm)


def sample_channel(key: jax.Array, count: int, cell: Cell) -> Channel:
    """Draws one drop of users with their shadowing and one fading block.

    `jax.vmap(lambda key: sample_channel(key, count, cell))(keys)` draws many.

    Args:
      key: a PRNG key.
      count: K; the only argument that a jitted caller must keep static.
      cell: the cell.

    Returns:
      The channel; all of the power over a band of the reference bandwidth meets the same ratio as the
      reference density does, so that both rate models agree there as long as the cap does not bind.
    """
    place_key, shadowing_key, fading_key = jax.random.split(key, 3)
    distance = uniform_disk(place_key, count, cell.radius_m, cell.minimum_distance_m)
    loss = path_loss_db(
        distance, cell.path_loss_constant_db, cell.path_loss_per_decade_db, cell.minimum_distance_m
    ) + shadowing_db(shadowing_key, (count,), cell.shadowing_db)
    snr = mean_snr(loss, cell.power_dbm, cell.reference_bandwidth_hz, cell.noise_figure_db)
    snr = snr * fading_gain(fading_key, (count,), cell.rician_k)
    return Channel(
        distance_m=distance,
        spectral_efficiency_bps_hz=spectral_efficiency(snr, cell.efficiency_cap_bps_hz),
        snr_hz=snr * cell.reference_bandwidth_hz,
    )
