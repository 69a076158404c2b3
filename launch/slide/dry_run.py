"""The cell of a SLIDE run, and with a target whether its solvers fit; nothing is solved or written."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from launch.compiling import Compiled, Table, compile_programs, megabytes, program_table
from launch.run.progress import print_table
from launch.slide.sweeps import sweep_points
from launch.targets import Chip, read_target, target_devices
from slide_jax.float64 import to_float64
from slide_jax.hull import convex_hull
from slide_jax.problem import Problem
from slide_jax.scenario import read_scenario
from slide_jax.settings import check_config, sample_drop
from slide_jax.solvers import SOLVERS, sweep_solvers


def dry_run(config: ConfigDict, target: str | None) -> None:
    """Prints the size of the cell and of the sweeps, and what the programs of the solvers take of a device.

    Args:
      target: see `launch.targets.read_target`; None: what follows from shapes alone.

    Raises:
      InputError: the config, the scenario or the target cannot be used.
    """
    check_config(config)
    chip = None if target is None else read_target(target)
    problem = read_scenario(config.scenario.path) if config.scenario.path else sample_drop(config)
    print_table(*cell(problem))
    print_table(*sweeps(config, problem))
    if target is not None and chip is not None:
        device = target_devices(target)[0]
        print(f"\ncompiling for one chip of {target} ...", flush=True)
        programs = compile_programs(lowered_solvers(problem, device))
        print_table(*program_table(programs, chip))
        print_table(*roofline(programs, chip))


def cell(problem: Problem) -> Table:
    """Returns the sizes of a cell."""
    bytes_held = sum(np.asarray(array).nbytes for array in jax.tree.leaves(to_float64(problem)))
    models, layers = problem.catalogue.layer_bits.shape
    vertices = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop).bits.shape[1]
    rows = [
        ["users", f"{problem.num_users:,}"],
        ["models", f"{models:,}"],
        ["layers", f"{layers:,}"],
        ["vertices of a model's hull, padded", f"{vertices:,}"],
        ["pairs of a user and a model", f"{problem.num_users * models:,}"],
        ["spectrum", f"{float(problem.bandwidth_hz) / 1e6:,.4g} MHz"],
        ["arrays, float64", f"{megabytes(bytes_held)} MB"],
    ]
    return "Cell", ["part", "size"], rows


def sweeps(config: ConfigDict, problem: Problem) -> Table:
    """Returns the sweeps of a run: points, and how many cells are solved; sweeps share points."""
    header = ["sweep", "points", "cells of a point", "users of a cell", "cells to solve"]
    if config.scenario.path:
        factors = set(config.monte_carlo.bandwidth_factors) | {1.0}
        row = ["bandwidth", f"{len(factors)}", "1", f"{problem.num_users:,}", f"{len(factors)}"]
        return "Sweep of the scenario, solved by exact and dai", header, [row]
    drops, points = config.monte_carlo.drops, sweep_points(config)
    points["all, each point once"] = list(dict.fromkeys(point for each in points.values() for point in each))
    rows = [
        [name, f"{len(each)}", f"{drops:,}", _span([point.users for point in each]), f"{len(each) * drops:,}"]
        for name, each in points.items()
    ]
    solvers = ", ".join(sweep_solvers())
    return f"Sweeps over random drops, every cell solved by {solvers}", header, rows


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def roofline(programs: dict[str, Compiled | str], chip: Chip) -> Table:
    """Returns each solver's least time by FLOP and by bytes of memory.

    XLA counts the body of a loop once, and how often a solver's loops turn depends on the cell; solvers have
    few matrix products, which alone reach the peak of a chip. So the times are lower bounds, not forecasts.
    """
    peak = max(chip.flop_per_s.values())
    rows = [
        [
            name,
            f"{found.flop / 1e6:,.4g}",
            f"{found.flop / peak * 1e6:,.3g} us",
            megabytes(found.moved),
            f"{found.moved / chip.bytes_per_s * 1e6:,.3g} us",
        ]
        for name, found in programs.items()
        if not isinstance(found, str)
    ]
    peaks = f"at {peak / 1e12:,.4g} TFLOP/s", f"at {chip.bytes_per_s / 1e9:,.4g} GB/s"
    header = ["solver", "MFLOP", peaks[0], "MB moved", peaks[1]]
    return "Roofline of a solver, each loop counted once: a lower bound", header, rows


def lowered_solvers(problem: Problem, device: Any) -> Iterator[tuple[str, Callable[[], jax.stages.Lowered]]]:
    """Yields each solver that is one program: its name, and a function that lowers it for a device."""
    with jax.enable_x64(True):
        hull = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
        arguments = (hull, to_float64(problem), jax.random.key(0))
        shapes = jax.tree.map(lambda array: on_device(array, device), arguments)
    for name, solver in SOLVERS.items():
        if solver.decide is not None:
            yield name, functools.partial(lower, solver.decide, shapes[: 2 + solver.needs_key])


def on_device(array: Any, device: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array, on a device."""
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=SingleDeviceSharding(device))


def lower(decide: Callable[..., Any], shapes: tuple) -> jax.stages.Lowered:
    """Lowers a solver in float64."""
    with jax.enable_x64(True):
        return jax.jit(decide).lower(*shapes)
