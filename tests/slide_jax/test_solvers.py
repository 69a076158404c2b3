"""The table of solvers: what an entry states is what tables, sweeps and figures make of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slide_run
import tiny_run
from slide_strategies import hull_of, random_problem

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
    with pytest.raises(InputError, match="option of equal_share='colour': unknown name; Known: none"):
        solve(problem, "equal_share", colour="red")
    with pytest.raises(InputError, match="did you mean 'left_over'\\? Known: left_over"):
        solve(problem, "exact", leftover="min_max")
    with pytest.raises(InputError, match="option of milp='time_limit': unknown name"):
        solve(problem, "milp", time_limit=3.0)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("solver", "option", "value"),
    [
        *(("exact", "left_over", value) for value in (1, None, ["none"], b"none")),
        ("relaxed", "left_over", 0.5),
        ("dai", "left_over", ["min_max"]),
        *(("milp", "time_limit_s", value) for value in ("20", None, True, 0.0, float("nan"), [1.0])),
        *(("random_order", "seed", value) for value in ("1", 0.5, None, True, -1, 2**32, [1])),
    ],
)
def test_options_of_the_wrong_type_are_refused(solver, option, value):
    with pytest.raises(InputError) as raised:
        solve(drawn(), solver, **{option: value})
    assert raised.value.field == option and "\n" not in str(raised.value)


def test_the_options_of_a_pure_solver_are_what_its_function_takes(monkeypatch):
    def decide(hull, problem, key, first=0, *, unit="user"):
        return decide_random_order(hull, problem, key)

    monkeypatch.setitem(SOLVERS, "mine", pure_solver(decide, needs_key=True))
    assert SOLVERS["mine"].options == ("first", "unit", "seed")
    assert solve(drawn(), "mine", first=1, unit="cell").throughput >= 0
    with pytest.raises(InputError, match="first='list': is of the wrong type"):
        solve(drawn(), "mine", first=[1])


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "milp"])
def test_decisions_in_float32_are_refused(solver):
    entry, problem = SOLVERS[solver], drawn()
    keys = (jax.random.key(0),) if entry.needs_key else ()
    narrow = jax.tree.map(lambda x: np.float32(x) if x.dtype.kind == "f" else x, problem)
    for x64, posed in ((False, problem), (False, narrow), (True, narrow)):
        with jax.enable_x64(x64):
            for decide in (entry.decide, jax.jit(entry.decide)):
                with pytest.raises(
                    InputError, match="problem='float32': decisions are computed in float64; call"
                ):
                    decide(hull_of(posed), posed, *keys)


def test_an_unknown_solver_is_named():
    with pytest.raises(InputError, match="solver='exakt': unknown name; did you mean 'exact'"):
        solve(drawn(), "exakt")
