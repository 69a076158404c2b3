"""Random users of one cell: one drop is one draw of everything.

Axes: K users, I models.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slide_jax.channel import Cell, sample_channel
from slide_jax.device import inference_energy
from slide_jax.problem import Catalogue, Problem, Users


class Setting(NamedTuple):
    """What users are drawn from; every field is a number that may be traced.

    A user's reference model is the admissible one of fewest bits: its device is as fast as makes that
    model's compute the drawn share of the deadline, and its energy budget is drawn relative to that model.

    Attributes:
      cell: channel.
      bandwidth_hz: spectrum [Hz].
      users: how many ask, at most the K that are drawn.
      deadline_min_s, deadline_max_s: uniform between them [s].
      compute_min, compute_max: compute at the top clock, as a share of the deadline, uniform. Where the
        whole time up to the deadline is used, compute / download of DAI is rho = share / (1 - share).
      patience: factor on every deadline once the devices are drawn.
      accuracy_min, accuracy_max: the least accuracy that a user accepts, uniform.
      f_min_hz, f_max_hz: range of the clocks [Hz].
      kappa_j_per_hz2_cycle: of the devices.
      static_power_w: drawn while computing [W].
      energy_min, energy_max: budget over what the reference model consumes at the top clock, uniform.
    """

    cell: Cell = Cell()
    bandwidth_hz: float = 1e8
    users: int = 50
    deadline_min_s: float = 2.0
    deadline_max_s: float = 8.0
    compute_min: float = 0.25
    compute_max: float = 0.55
    accuracy_min: float = 0.0
    accuracy_max: float = 0.0
    patience: float = 1.0
    f_min_hz: float = 3e8
    f_max_hz: float = 1.3e9
    kappa_j_per_hz2_cycle: float = 1e-28
    static_power_w: float = 0.0
    energy_min: float = 1.0
    energy_max: float = 4.0


def sample_problem(
    key: jax.Array, setting: Setting, catalogue: Catalogue, count: int, rate_model: str = "linear"
) -> Problem:
    """Returns one drop.

    Args:
      key: a PRNG key; `vmap` over keys draws many.
      setting: what is drawn from.
      catalogue: the models, the same in every drop; every user asks for one of their tasks.
      count: K, users drawn; those beyond `setting.users` ask for nothing.
      rate_model: `linear` or `shannon`.
    """
    keys = iter(jax.random.split(key, 6))
    channel = sample_channel(next(keys), count, setting.cell)

    def uniform(low, high) -> Float[Array, " K"]:
        return jax.random.uniform(next(keys), (count,), minval=low, maxval=high)

    deadline_s = uniform(setting.deadline_min_s, setting.deadline_max_s)
    share = uniform(setting.compute_min, setting.compute_max)
    min_accuracy = uniform(setting.accuracy_min, setting.accuracy_max)
    energy = uniform(setting.energy_min, setting.energy_max)
    models = jax.tree.map(jnp.asarray, catalogue)  # NumPy arrays take no traced index
    # A model drawn at random names the task, so that tasks with more models are asked for more often.
    task = models.task[jax.random.randint(next(keys), (count,), 0, len(models.task))]
    admissible = (task[:, None] == models.task) & (models.accuracy >= min_accuracy[:, None])
    asking = jnp.arange(count) < setting.users
    total_bits, total_flop = jnp.sum(models.layer_bits, axis=1), jnp.sum(models.layer_flop, axis=1)
    reference = jnp.argmin(jnp.where(admissible, total_bits, jnp.inf), axis=1)
    speed = total_flop[reference] / (share * deadline_s)
    flop_per_cycle = speed / setting.f_max_hz
    everyone = jnp.ones(count)
    users = Users(
        task=task,
        min_accuracy=min_accuracy,
        deadline_s=setting.patience * deadline_s,
        start_s=0 * everyone,
        energy_j=energy
        * inference_energy(
            setting.f_max_hz,
            total_flop[reference] / flop_per_cycle,
            setting.kappa_j_per_hz2_cycle,
            setting.static_power_w,
        ),
        spectral_efficiency_bps_hz=channel.spectral_efficiency_bps_hz,
        snr_hz=channel.snr_hz,
        f_min_hz=setting.f_min_hz * everyone,
        f_max_hz=setting.f_max_hz * everyone,
        flop_per_cycle=flop_per_cycle,
        kappa_j_per_hz2_cycle=setting.kappa_j_per_hz2_cycle * everyone,
        static_power_w=setting.static_power_w * everyone,
        memory_bits=jnp.inf * everyone,
        allowed=admissible & asking[:, None],
    )
    return Problem(catalogue, users, jnp.asarray(setting.bandwidth_hz, deadline_s.dtype), rate_model)
