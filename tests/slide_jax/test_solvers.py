"""The table of solvers: what an entry states is what tables, sweeps and figures make of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import slide_run
import tiny_run
from slide_strategies import random_problem

from launch.slide import experiment
from launch.slide import figures as slide_figures
from slide_jax.baselines import dai, decide_random_order, download_then_infer, serve_in_order
from slide_jax.errors import InputError
from slide_jax.exact import decide_exact, exact
from slide_jax.solvers import SOLVERS, pure_solver, solve, sweep_solvers
from slide_jax.verification import verify

USER_FILE = """
import jax.numpy as jnp

from configs.slide import get_config
from slide_jax import SOLVERS, pure_solver
from slide_jax.baselines import serve_in_order


def decide(hull, problem):
    return serve_in_order(hull, problem, jnp.argsort(problem.users.min_accuracy))


SOLVERS["undemanding_first"] = pure_solver(decide, label="undemanding users first")
"""


def drawn(seed=0):
    return random_problem(np.random.default_rng(seed), 5, 2, 2)


def test_a_solver_in_a_file_of_the_user_is_in_table_sweeps_and_gap_figure(tmp_path, monkeypatch):
    for name in set(SOLVERS) - {"exact", "dai"}:  # which every run compares with; fewer compile faster
        monkeypatch.delitem(SOLVERS, name)
    monkeypatch.setitem(SOLVERS, "undemanding_first", None)  # taken away again after the test
    figures = []
    draw_gap = slide_figures.gap
    monkeypatch.setattr(slide_figures, "gap", lambda served: figures.append(draw_gap(served)) or figures[0])
    monkeypatch.setattr(
        experiment, "figure_texts", lambda *_: {"gap": ("Gap", "the one figure of this test")}
    )
    path, workdir = tmp_path / "undemanding.py", tmp_path / "run"
    path.write_text(USER_FILE)
    _, *arguments = slide_run.arguments(workdir)
    screen = tiny_run.run_main([f"--config={path}:smoke", *arguments])
    assert (screen.code, screen.err) == (0, "")
    table = screen.out.partition("Solvers\n")[2].partition("\n\n")[0].splitlines()
    assert table[-1].split()[0] == "undemanding_first"
    head, *rows = (workdir / "metrics.csv").read_text().splitlines()
    served = head.split(",").index("served_undemanding_first")
    assert all(float(row.split(",")[served]) >= 0 for row in rows)
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert "undemanding users first" in names
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["gap"]["undemanding_first"] >= 0


def test_a_pure_function_is_solved_as_its_batched_form_says(monkeypatch):
    def decide(hull, problem):
        return serve_in_order(hull, problem, jnp.argsort(problem.users.min_accuracy))

    monkeypatch.setitem(SOLVERS, "undemanding_first", pure_solver(decide))
    assert "undemanding_first" in sweep_solvers()
    problem = drawn()
    allocation = solve(problem, "undemanding_first")
    assert verify(problem, allocation) == []
    assert allocation.solver == "undemanding_first" and allocation.solve_s > 0
    assert allocation.bandwidth_hz.dtype == np.float64


def test_a_pure_solver_under_download_first_gets_models_of_one_layer():
    problem = drawn(3)
    allocation = pure_solver(decide_exact, download_first=True).solve(problem)
    np.testing.assert_array_equal(allocation.model, dai(problem).model)
    assert verify(download_then_infer(problem), allocation) == []


def test_a_pure_solver_that_needs_a_key_follows_its_seed():
    solver = pure_solver(decide_random_order, needs_key=True)
    assert solver.options == ("seed",)
    problem = random_problem(np.random.default_rng(1), 7, 2, 2)
    served = {tuple(solver.solve(problem, seed=seed).served.tolist()) for seed in (*range(8), *range(8))}
    assert 1 < len(served) <= 8
    assert tuple(solver.solve(problem).served.tolist()) == tuple(
        solver.solve(problem, seed=0).served.tolist()
    )


def test_options_reach_the_solver_and_an_unknown_one_is_refused():
    problem = drawn()
    allocation = pure_solver(decide_exact).solve(problem, left_over="proportional")
    np.testing.assert_array_equal(allocation.bandwidth_hz, exact(problem, "proportional").bandwidth_hz)
    with pytest.raises(TypeError, match="colour"):
        solve(problem, "equal_share", colour="red")


def test_an_unknown_solver_is_named():
    with pytest.raises(InputError, match="solver='exakt': unknown name; did you mean 'exact'"):
        solve(drawn(), "exakt")
