"""--dry_run of SLIDE: the cell, and what the solvers take of a device."""

import jax
import slide_run
import tiny_run

from launch.compiling import program_table
from launch.run.command import read_command
from launch.slide import dry_run
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


def test_every_solver_that_is_a_program_is_compiled(tmp_path):
    """For the device that is here, with another one's figures."""
    problem = sample_drop(read_command(slide_run.arguments(tmp_path)).config)
    _, _, rows = program_table(dry_run.lowered_solvers(problem, jax.devices()[0]), CHIPS["v5e"])
    assert [row[0] for row in rows] == list(sweep_solvers())
    assert all(row[5].endswith("free") and float(row[1]) > 0 for row in rows)
