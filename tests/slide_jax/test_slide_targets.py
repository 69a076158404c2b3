"""Every solver compiles for accelerators that are not here."""

import jax
import numpy as np
import pytest
import targets
from slide_strategies import hull_of, random_problem

from launch.hosts.devices import no_compilation_cache
from slide_jax import milp, solve_batch
from slide_jax.leftover import LEFT_OVER
from slide_jax.solvers import SOLVERS

PROGRAMS = {
    **{name: (solver, {}) for name, solver in SOLVERS.items() if solver.decide},
    **{f"exact, {rest}": (SOLVERS["exact"], {"left_over": rest}) for rest in LEFT_OVER if rest != "none"},
    "milp": (SOLVERS["milp"]._replace(decide=milp.pair_needs), {}),
}


def compile_for(target, program, *arguments):
    device = targets.devices(target)[0]
    with no_compilation_cache(), jax.enable_x64(True):
        compiled = jax.jit(program).lower(*targets.on_one_device(arguments, device)).compile()
    assert compiled.memory_analysis().argument_size_in_bytes > 0


@pytest.mark.parametrize("target", targets.PLUGINS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_solvers_compile(name, target):
    solver, options = PROGRAMS[name]
    problem = random_problem(np.random.default_rng(0), 5, 2, 3, "shannon" if name == "exact" else "linear")
    key = (jax.random.key(0),) if solver.needs_key else ()
    arguments = (hull_of(problem), problem, *key)
    compile_for(target, lambda *arrays: solver.decide(*arrays, **options), *arguments)


@pytest.mark.parametrize("target", targets.PLUGINS)
@pytest.mark.parametrize("solver", ["exact", "relaxed", "random_order"])
def test_batches_compile(solver, target):
    drops = [random_problem(np.random.default_rng(seed), 5, 2, 1) for seed in range(3)]
    batch = jax.tree.map(lambda *arrays: np.stack(arrays), *drops)
    compile_for(target, lambda problem: solve_batch(problem, solver), batch)
