"""Simultaneous model downloading and inference: who is served, with which model, spectrum and clock.

The method is SLIDE (arXiv 2512.20946). `read_scenario` and `make_problem` give a `Problem`, `solve` and the
`SOLVERS` an `Allocation` (`solve_batch` under `jit`, `vmap` and `grad`), `verify` checks it independently;
`latency`, `sensitivity` and `relaxed` are the differentiable side, `extensions` what goes beyond the paper.

>>> import slide_jax
>>> problem = slide_jax.read_scenario({
...     "bandwidth_hz": 2e6,
...     "models": [{"name": "m", "task": "vision", "accuracy": 0.8,
...                 "layers": [{"bits": 2e6, "flop": 1e9}, {"bits": 4e6, "flop": 1e9}]}],
...     "users": [{"task": "vision", "deadline_s": deadline, "spectral_efficiency_bps_hz": 1.0,
...                "device": {"f_min_hz": 1e9, "f_max_hz": 1e9, "flop_per_cycle": 1}}
...               for deadline in (4.0, 3.0)]})
>>> allocation = slide_jax.solve(problem)
>>> allocation.model.tolist(), allocation.bandwidth_hz.tolist(), slide_jax.verify(problem, allocation)
([0, -1], [2000000.0, 0.0], [])
>>> slide_jax.REASONS[allocation.reason[1]]
'needs more than the whole spectrum'
"""

from slide_jax import extensions, profiles, quantise
from slide_jax.batch import solve_batch
from slide_jax.checks import make_problem
from slide_jax.errors import InputError
from slide_jax.experiment import Latencies, Sweep, compare_latencies, run_sweep, sample_latencies
from slide_jax.problem import REASONS, Allocation, Catalogue, Labels, Problem, Users
from slide_jax.sampling import Setting, sample_problem
from slide_jax.scenario import read_allocation, read_scenario, write_allocation, write_scenario
from slide_jax.sensitivity import least_bandwidth, margins, sensitivities, shadow_price
from slide_jax.solvers import SOLVERS, Solver, pure_solver, solve
from slide_jax.verification import Violation, verify

__all__ = [
    "REASONS",
    "SOLVERS",
    "Allocation",
    "Catalogue",
    "InputError",
    "Labels",
    "Latencies",
    "Problem",
    "Setting",
    "Solver",
    "Sweep",
    "Users",
    "Violation",
    "compare_latencies",
    "extensions",
    "least_bandwidth",
    "make_problem",
    "margins",
    "profiles",
    "pure_solver",
    "quantise",
    "read_allocation",
    "read_scenario",
    "run_sweep",
    "sample_latencies",
    "sample_problem",
    "sensitivities",
    "shadow_price",
    "solve",
    "solve_batch",
    "verify",
    "write_allocation",
    "write_scenario",
]
