"""--dry_run of SLIDE: the cell, and what the solvers take of a device."""

import jax
import pytest
import slide_run
import tiny_run

from launch.compiling import compile_programs, program_table
from launch.run.command import read_command
from launch.slide import dry_run
from launch.slide.sweeps import sweep_points
from launch.targets import CHIPS
from slide_jax.settings import sample_drop
from slide_jax.solvers import sweep_solvers


def test_the_cell_is_told_and_nothing_is_written(tmp_path):
    command = slide_run.arguments(tmp_path / "run")
    screen = tiny_run.run_main([*command, "--dry_run"])
    problem = sample_drop(read_command(command).config)
    assert (screen.code, screen.err) == (0, "") and not (tmp_path / "run").exists()
    cells = dict(line.split() for line in screen.out.splitlines() if len(line.split()) == 2)
    models, layers = problem.catalogue.layer_bits.shape
    assert (cells["users"], cells["models"], cells["layers"]) == tuple(
        map(str, (problem.num_users, models, layers))
    )


def test_the_sweeps_are_told_with_the_cells_that_they_solve(tmp_path):
    config = read_command(slide_run.arguments(tmp_path)).config
    _, header, rows = dry_run.sweeps(config, sample_drop(config))
    grids = config.monte_carlo
    told = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    for name, values in (("bandwidth", grids.bandwidth_factors), ("rho", grids.rhos)):
        assert told[name]["points"] == str(len(values))
        assert told[name]["cells to solve"] == f"{len(values) * grids.drops:,}"
    study_points = {point for each in sweep_points(config).values() for point in each}
    assert told["all, each point once"]["cells to solve"] == f"{len(study_points) * grids.drops:,}"
    assert len(study_points) < sum(int(row[1]) for row in rows[:-1])  # the plain setting is in several
    config.scenario.path = "cell.json"
    title, _, rows = dry_run.sweeps(config, sample_drop(config))
    assert rows == [["bandwidth", str(len({*grids.bandwidth_factors, 1.0})), "1", *rows[0][3:]]]
    assert "exact and dai" in title


def test_every_solver_that_is_a_program_is_compiled(tmp_path):
    """For the device that is here, with another one's figures."""
    problem = sample_drop(read_command(slide_run.arguments(tmp_path)).config)
    programs = compile_programs(dry_run.lowered_solvers(problem, jax.devices()[0]))
    _, _, rows = program_table(programs, CHIPS["v5e"])
    assert [row[0] for row in rows] == list(sweep_solvers())
    assert all(row[5].endswith("free") and float(row[1]) > 0 for row in rows)
    _, header, bounds = dry_run.roofline(programs, CHIPS["v5e"])
    assert header[2:] == ["at 197 TFLOP/s", "MB moved", "at 819 GB/s"]
    assert [row[0] for row in bounds] == list(sweep_solvers())
    for (_, flop, by_flop, moved, by_bytes), found in zip(bounds, programs.values(), strict=True):
        held = found.arguments + found.outputs
        assert float(moved) * 1e6 > 0.5 * held  # what is read and written, at least about once
        assert float(by_flop.split()[0]) == pytest.approx(float(flop) * 1e6 / 197e12 * 1e6, rel=1e-2)
        assert float(by_bytes.split()[0]) == pytest.approx(float(moved) * 1e6 / 819e9 * 1e6, rel=1e-2)
