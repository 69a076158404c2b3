"""A cell without users: everything that solves problems serves nobody, and says so."""

import numpy as np
import pytest
import slide_strategies

from slide_jax.extensions import (
    layer_clocks,
    released_spectrum,
    resource_blocks,
    streaming_memory,
    weighted,
    weighted_greedy,
)
from slide_jax.problem import RATE_MODELS
from slide_jax.scenario import read_scenario
from slide_jax.solvers import SOLVERS, solve
from slide_jax.verification import verify

EXTENSIONS = {
    "layer_clocks": lambda problem: layer_clocks(problem).allocation,
    "released_spectrum": lambda problem: released_spectrum(problem).allocation,
    "resource_blocks": lambda problem: resource_blocks(problem, 1e5),
    "streaming_memory": streaming_memory,
    "weighted": lambda problem: weighted(problem, np.zeros(0)).allocation,
    "weighted_greedy": lambda problem: weighted_greedy(problem, np.zeros(0)).allocation,
}


def empty_cell(rate_model):
    return read_scenario({**slide_strategies.scenario(rate_model=rate_model), "users": []})


def check_nobody_is_served(problem, allocation):
    columns = ("model", "bandwidth_hz", "frequency_hz", "latency_s", "energy_j", "reason")
    assert all(np.shape(getattr(allocation, name)) == (0,) for name in columns)
    assert allocation.throughput == 0 and allocation.bandwidth_used_hz == 0
    assert np.isnan(allocation.upper_bound) or allocation.upper_bound == 0
    assert verify(problem, allocation) == []


@pytest.mark.parametrize("rate_model", RATE_MODELS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_serve_nobody(solver, rate_model):
    problem = empty_cell(rate_model)
    check_nobody_is_served(problem, solve(problem, solver))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_extensions_serve_nobody(extension):
    problem = empty_cell("linear")
    check_nobody_is_served(problem, EXTENSIONS[extension](problem))


@pytest.mark.parametrize("extension", [weighted, weighted_greedy])
def test_nobody_weighs_nothing(extension):
    result = extension(empty_cell("shannon"), np.zeros(0))
    assert result.value == result.bound == 0


def test_no_download_is_scheduled():
    download = released_spectrum(empty_cell("linear")).download
    assert all(column.shape == (0,) for column in download)
