"""Checks a config (the range of every field) and builds the objects of this package from it.

A config is any tree of attributes and items such as `configs/slide.py` returns.
"""

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import numpy as np

from slide_jax.channel import Cell
from slide_jax.checks import make_problem, read_models
from slide_jax.errors import InputError, unknown_name
from slide_jax.leftover import LEFT_OVER
from slide_jax.problem import RATE_MODELS, Catalogue, Labels, Problem
from slide_jax.profiles import PROFILES, profile, to_model
from slide_jax.sampling import Setting, sample_problem
from slide_jax.solvers import SOLVERS

ALL = "all"
"""Every solver, and the allocation of `exact`."""

DROPPED_USERS = 10**7
"""The most users over all drops of a point: a few gigabytes."""


class Range(NamedTuple):
    """What a number may be; the ends themselves are left out where `open`."""

    low: float
    high: float
    example: float
    open: bool = False

    def holds(self, value: float) -> bool:
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        return (
            f"above {self.low:g} and below {self.high:g}"
            if self.open
            else f"from {self.low:g} to {self.high:g}"
        )


def _above_zero(high: float, example: float) -> Range:
    return Range(0.0, high, example, open=True)


NUMBERS = {
    "seed": Range(0, 2**32 - 1, 0),
    "setting.bits_per_parameter": _above_zero(1e3, 8.0),
    "setting.batch_size": Range(1, 1e6, 1),
    "setting.users": Range(1, 1e7, 50),
    "setting.bandwidth_hz": Range(0, 1e15, 1e8),
    "setting.accuracy_min": Range(0, 1, 0.7),
    "setting.accuracy_max": Range(0, 1, 0.8),
    "setting.deadline_min_s": _above_zero(1e9, 2.0),
    "setting.deadline_max_s": _above_zero(1e9, 8.0),
    "setting.compute_min": _above_zero(1.0, 0.25),
    "setting.compute_max": _above_zero(1.0, 0.55),
    "setting.patience": _above_zero(1e6, 1.0),
    "setting.f_min_hz": Range(0, 1e15, 3e8),
    "setting.f_max_hz": _above_zero(1e15, 1.3e9),
    "setting.kappa_j_per_hz2_cycle": Range(0, 1, 1e-28),
    "setting.static_power_w": Range(0, 1e9, 0.5),
    "setting.energy_min": Range(0, 1e9, 1.0),
    "setting.energy_max": Range(0, 1e9, 4.0),
    "cell.radius_m": _above_zero(1e6, 250.0),
    "cell.minimum_distance_m": _above_zero(1e6, 10.0),
    "cell.power_dbm": Range(-300, 300, 33.0),
    "cell.reference_bandwidth_hz": _above_zero(1e15, 1e8),
    "cell.noise_figure_db": Range(0, 100, 7.0),
    "cell.path_loss_constant_db": Range(0, 500, 128.1),
    "cell.path_loss_per_decade_db": Range(0, 200, 37.6),
    "cell.shadowing_db": Range(0, 50, 8.0),
    "cell.rician_k": Range(0, 1e6, 1.0),
    "cell.efficiency_cap_bps_hz": _above_zero(1e3, 7.4),
    "monte_carlo.drops": Range(2, 1e6, 1000),
    "monte_carlo.users": Range(1, 1e5, 50),
    "milp.time_limit_s": _above_zero(1e6, 20.0),
}
GRIDS = {
    "monte_carlo.bandwidth_factors": _above_zero(1e6, 0.5),
    "monte_carlo.patience": _above_zero(1e6, 0.8),
    "monte_carlo.user_counts": Range(1, 1e5, 50),
    "monte_carlo.rhos": _above_zero(1e6, 0.5),
}
PAIRS = (
    ("setting.accuracy_min", "setting.accuracy_max"),
    ("setting.deadline_min_s", "setting.deadline_max_s"),
    ("setting.compute_min", "setting.compute_max"),
    ("setting.f_min_hz", "setting.f_max_hz"),
    ("setting.energy_min", "setting.energy_max"),
    ("cell.minimum_distance_m", "cell.radius_m"),
)
POINTS = 100


def lookup(config: Any, field: str) -> Any:
    """Returns the value at a dotted path.

    Raises:
      InputError: the config has no such field: it is one of another experiment, or incomplete.
    """
    part = config
    for name in field.split("."):
        if name not in part:
            problem = "the config has no such field, which the experiment `slide` needs"
            raise InputError(field, None, problem, "give a config of that experiment, e.g. configs/slide.py")
        part = part[name]
    return part


def check_config(config: Any) -> None:
    """Refuses a config that cannot be run; a scenario file is checked when it is read.

    Raises:
      InputError: the first field at fault, its value and what would do.
    """
    for field in ("scenario.path", "setting.models"):
        lookup(config, field)
    names = {"solver": (ALL, *SOLVERS), "left_over": LEFT_OVER, "setting.rate_model": RATE_MODELS}
    for field, known in names.items():
        if lookup(config, field) not in known:
            raise unknown_name(field, lookup(config, field), known)
    for field, allowed in NUMBERS.items():
        _require(field, lookup(config, field), lookup(config, field), allowed)
    for field, allowed in GRIDS.items():
        grid = lookup(config, field)
        if not 1 <= len(grid) <= POINTS:
            remedy = f"give e.g. ({allowed.example:g}, {2 * allowed.example:g})"
            raise InputError(field, grid, f"must have 1 to {POINTS} points", remedy)
        for value in grid:
            _require(field, grid, value, allowed, whole=field == "monte_carlo.user_counts")
    for low, high in PAIRS:
        if lookup(config, low) > lookup(config, high):
            problem = f"above {high}={lookup(config, high)!r}"
            raise InputError(low, lookup(config, low), problem, f"give at most {high}")
    most = max(config.monte_carlo.users, *config.monte_carlo.user_counts)
    if config.monte_carlo.drops * most > DROPPED_USERS:
        problem = f"with {most} users a drop more than {DROPPED_USERS:g} users at a point"
        remedy = f"give at most {DROPPED_USERS // most}, or fewer users"
        raise InputError("monte_carlo.drops", config.monte_carlo.drops, problem, remedy)
    model_names(config)


def model_names(config: Any) -> tuple[str, ...]:
    """Returns the names in `setting.models`, which a command line may join by commas.

    Raises:
      InputError: no name, an unknown one, or one that comes twice.
    """
    field, known = "setting.models", [name for name in PROFILES if _has_published_sizes(name)]
    names = tuple(part.strip() for name in config.setting.models for part in str(name).split(","))
    if not names:
        raise InputError(field, names, "the catalogue is empty", f"name some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown_name(field, name, known)
        if names.count(name) > 1:
            raise InputError(field, config.setting.models, f"{name} comes twice", "name each model once")
    return names


def read_models_of(config: Any) -> tuple[Catalogue, Labels]:
    """Returns the catalogue of a config and its names."""
    return read_models(_models(config), None)


def read_setting(config: Any) -> Setting:
    """Returns what the users of a config are drawn from."""
    cell = Cell(**config.cell)
    return Setting(cell, **{name: config.setting[name] for name in Setting._fields if name != "cell"})


def sample_drop(config: Any) -> Problem:
    """Returns one drop of a config's users as a checked problem of NumPy arrays.

    Raises:
      InputError: a number drawn is out of range, e.g. a signal beyond what a float holds.
    """
    setting, models = config.setting, _models(config)
    catalogue, labels = read_models(models, None)
    with jax.enable_x64(True):
        drawn = sample_problem(
            jax.random.key(config.seed), read_setting(config), catalogue, setting.users, setting.rate_model
        )
        users = jax.tree.map(np.asarray, drawn.users)
    # Which models a user accepts then follows from task and accuracy alone.
    users = dataclasses.replace(users, allowed=None)
    return make_problem(models, users, setting.bandwidth_hz, setting.rate_model, tasks=labels.tasks)


def _models(config: Any) -> list[dict[str, Any]]:
    sizes = (config.setting.bits_per_parameter, config.setting.batch_size)
    return [to_model(profile(name), *sizes) for name in model_names(config)]


def _require(field: str, given: Any, value: Any, allowed: Range, whole: bool = False) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not allowed.holds(value):
        kind = "a whole number" if whole else "a number"
        raise InputError(field, given, f"must be {kind} {allowed}", f"use e.g. {allowed.example:g}")


def _has_published_sizes(name: str) -> bool:
    parameters = inspect.signature(PROFILES[name]).parameters.values()
    return all(parameter.default is not inspect.Parameter.empty for parameter in parameters)
