"""The problem and its answer: frozen pytrees of arrays.

A base station with a downlink spectrum serves users; each has a task with a deadline and a device with an
energy budget; a catalogue of models solves the tasks. Decide which model each user gets (at most one), its
share of the spectrum and its clock, so that the most users finish in time (arXiv 2512.20946).

Axes: K users, I models, L layers (of the longest model). The types of the fields are those of one problem.
They are not checked (`no_type_check`), because JAX builds these classes from batches, shapes and axis numbers
too.
"""

import dataclasses
import functools
import typing

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from slide_jax.errors import InputError

RATE_MODELS = ("linear", "shannon")

REASONS = (
    "served",
    "no admissible model",
    "memory smaller than the model",
    "energy budget too small for the lowest clock",
    "deadline shorter than compute",
    "no signal",
    "rate above what the channel can carry",
    "needs more than the whole spectrum",
    "spectrum used by others",
)
"""What became of a user, by code; of several models the one that came furthest names the reason."""


def is_traced(*arrays: typing.Any) -> bool:
    """Returns whether a pytree holds arrays inside `jit`, `vmap` or `grad`, which have no values yet."""
    return any(isinstance(array, Tracer) for array in jax.tree.leaves(arrays))


def refuse_traced(name: str, *arrays: typing.Any) -> None:
    """Refuses arrays inside `jit`, `vmap` or `grad` where values are needed.

    Raises:
      InputError: what works there.
    """
    if is_traced(*arrays):
        problem = f"{name} needs values, which there are none of inside jit, vmap and grad"
        raise InputError("problem", "a traced array", problem, "call slide_jax.solve_batch there")


@dataclasses.dataclass(frozen=True)
class Labels:
    """Names of models, tasks and users for input and output; not part of the pytree.

    Attributes:
      models: I names.
      tasks: names of the tasks, by index.
      users: K identifiers; None numbers them `u0`, `u1`, ...
    """

    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    users: tuple[str, ...] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layer_bits", "layer_flop", "num_layers", "accuracy", "task"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
@typing.no_type_check
class Catalogue:
    """The models that the base station holds.

    Attributes:
      layer_bits: download size of each layer [bits]; layers beyond a model's own are 0 in size and work,
        which changes no latency.
      layer_flop: workload of each layer [FLOP].
      num_layers: layers of each model.
      accuracy: of each model, on its task.
      task: index of the task that each model solves.
    """

    layer_bits: Float[Array, "I L"]
    layer_flop: Float[Array, "I L"]
    num_layers: Int[Array, " I"]
    accuracy: Float[Array, " I"]
    task: Int[Array, " I"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "task",
        "min_accuracy",
        "deadline_s",
        "start_s",
        "energy_j",
        "spectral_efficiency_bps_hz",
        "snr_hz",
        "f_min_hz",
        "f_max_hz",
        "flop_per_cycle",
        "kappa_j_per_hz2_cycle",
        "static_power_w",
        "memory_bits",
        "allowed",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
@typing.no_type_check
class Users:
    """The users, their tasks, channels and devices.

    Attributes:
      task: index of the task; -1 where `allowed` alone says which models are admissible.
      min_accuracy: the least accuracy that the task needs.
      deadline_s: when the task must be finished, from time 0 [s].
      start_s: when download and device may begin [s].
      energy_j: what the inference may consume [J]; infinite: no limit.
      spectral_efficiency_bps_hz: rate model `linear`, rate = bandwidth * this [bit/s/Hz].
      snr_hz: rate model `shannon`, rate = bandwidth * log2(1 + snr_hz / bandwidth) [Hz].
      f_min_hz, f_max_hz: range of the clock [Hz].
      flop_per_cycle: of the device.
      kappa_j_per_hz2_cycle: dynamic energy = kappa * clock^2 * cycles.
      static_power_w: drawn while the device computes [W].
      memory_bits: room for the model [bits]; infinite: no limit.
      allowed: exactly the admissible models; None: all that solve the task accurately enough.
    """

    task: Int[Array, " K"]
    min_accuracy: Float[Array, " K"]
    deadline_s: Float[Array, " K"]
    start_s: Float[Array, " K"]
    energy_j: Float[Array, " K"]
    spectral_efficiency_bps_hz: Float[Array, " K"]
    snr_hz: Float[Array, " K"]
    f_min_hz: Float[Array, " K"]
    f_max_hz: Float[Array, " K"]
    flop_per_cycle: Float[Array, " K"]
    kappa_j_per_hz2_cycle: Float[Array, " K"]
    static_power_w: Float[Array, " K"]
    memory_bits: Float[Array, " K"]
    allowed: Bool[Array, "K I"] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["catalogue", "users", "bandwidth_hz"],
    meta_fields=["rate_model"],
    drop_fields=["labels"],
)
@dataclasses.dataclass(frozen=True)
@typing.no_type_check
class Problem:
    """A provisioning problem: models to serve, users who request them, and the spectrum.

    `read_scenario` and `make_problem` build it and refuse invalid values; a pytree of drops
    (a leading axis on every array but the catalogue's) is what the batched programs take.

    Attributes:
      catalogue, users: see there.
      bandwidth_hz: the downlink spectrum [Hz].
      rate_model: `linear` or `shannon`.
      labels: names of models, tasks and users; a problem that comes out of `jit`, `vmap` or `jax.tree.map`
        has the default ones.
    """

    catalogue: Catalogue
    users: Users
    bandwidth_hz: Float[Array, ""]
    rate_model: str = "linear"
    labels: Labels = Labels()

    @property
    def num_users(self) -> int:
        return np.shape(self.users.deadline_s)[-1]

    @property
    def num_models(self) -> int:
        return np.shape(self.catalogue.accuracy)[-1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "model",
        "bandwidth_hz",
        "frequency_hz",
        "latency_s",
        "energy_j",
        "reason",
        "upper_bound",
        "solve_s",
    ],
    meta_fields=["solver"],
)
@dataclasses.dataclass(frozen=True)
@typing.no_type_check
class Allocation:
    """What a solver decides.

    Attributes:
      model: index of each user's model; -1: not served.
      bandwidth_hz: each user's share [Hz]; 0 where not served.
      frequency_hz: each user's clock [Hz]; 0 where not served.
      latency_s: when the task is finished, from time 0 [s]; nan where not served.
      energy_j: of the inference [J]; nan where not served.
      reason: index into `REASONS`.
      upper_bound: users that no allocation can exceed, proven by the solver; nan: it proves nothing.
      solve_s: seconds that the solver took; nan: not measured.
      solver: its name.
    """

    model: Int[Array, " K"]
    bandwidth_hz: Float[Array, " K"]
    frequency_hz: Float[Array, " K"]
    latency_s: Float[Array, " K"]
    energy_j: Float[Array, " K"]
    reason: Int[Array, " K"]
    upper_bound: Float[Array, ""] | float = float("nan")
    solve_s: float = float("nan")
    solver: str = ""

    @property
    def served(self) -> Bool[Array, " K"]:
        return self.model >= 0

    @property
    def throughput(self) -> int:
        """Users served: the objective."""
        return int(np.sum(np.asarray(self.served)))

    @property
    def bandwidth_used_hz(self) -> float:
        return float(np.sum(np.asarray(self.bandwidth_hz), dtype=np.float64))
