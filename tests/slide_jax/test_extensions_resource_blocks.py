"""Whole resource blocks against every subset of the users."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from slide_oracles import least_bandwidth
from slide_strategies import CORNERS, random_problem

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.extensions import resource_blocks
from slide_jax.problem import RATE_MODELS
from slide_jax.verification import verify


def drawn(corner="none", rate_model="linear", seed=0, users=6):
    rng = np.random.default_rng([seed, CORNERS.index(corner)])
    problem = random_problem(rng, users, 2, 2, rate_model, corner)
    # Of one shape, for the sake of one compilation.
    catalogue = problem.catalogue
    bits, flop = (
        np.pad(table, ((0, 0), (0, 2 - table.shape[1])))
        for table in (catalogue.layer_bits, catalogue.layer_flop)
    )
    return dataclasses.replace(
        problem, catalogue=dataclasses.replace(catalogue, layer_bits=bits, layer_flop=flop)
    )


def best_throughput(problem, block_hz):
    needs = least_bandwidth(problem).min(axis=1)
    blocks = [math.ceil(b / block_hz * (1 - 1e-12)) for b in needs[np.isfinite(needs)]]
    available = math.floor(problem.bandwidth_hz / block_hz * (1 + 1e-12))
    subsets = itertools.chain.from_iterable(
        itertools.combinations(blocks, size) for size in range(len(blocks) + 1)
    )
    return max(len(subset) for subset in subsets if sum(subset) <= available)


@pytest.mark.parametrize("rate_model", RATE_MODELS)
@pytest.mark.parametrize("corner", CORNERS)
def test_it_is_the_best_of_all_subsets_in_whole_blocks(corner, rate_model):
    problem = drawn(corner, rate_model)
    block_hz = max(float(problem.bandwidth_hz), 1.0) / 8.5
    allocation = resource_blocks(problem, block_hz)
    whole = dataclasses.replace(problem, bandwidth_hz=np.float64(8 * block_hz))
    assert verify(whole, allocation) == []
    assert allocation.throughput == allocation.upper_bound == best_throughput(problem, block_hz)
    assert allocation.throughput <= exact(problem).throughput
    blocks = allocation.bandwidth_hz / block_hz
    np.testing.assert_allclose(blocks, np.round(blocks), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_fine_blocks_cost_nothing_and_one_block_serves_one_user(seed):
    problem = drawn(seed=seed)
    best = exact(problem).throughput
    assert best > 1
    assert resource_blocks(problem, float(problem.bandwidth_hz) / 1e7).throughput == best
    assert resource_blocks(problem, float(problem.bandwidth_hz)).throughput == 1
    assert resource_blocks(problem, 2.0 * float(problem.bandwidth_hz)).throughput == 0


def test_users_and_spectrum_that_just_fit_their_blocks_fit():
    problem = drawn("equal users", "linear", 1)
    need = float(exact(problem).bandwidth_hz.max())
    assert need > 0
    for parts in (1, 3, 7):  # a third of a number is rounded
        block_hz = need / parts
        exactly = dataclasses.replace(problem, bandwidth_hz=np.float64(4 * need))
        allocation = resource_blocks(exactly, block_hz)
        assert allocation.throughput == 4 and verify(exactly, allocation) == []
        assert resource_blocks(exactly, block_hz * (1 - 1e-6)).throughput < 4


def test_users_who_need_no_spectrum_need_no_block():
    problem = drawn("no spectrum", "linear", 0)
    assert resource_blocks(problem, 1e5).throughput == exact(problem).throughput


@pytest.mark.parametrize("block_hz", [0.0, -1.0, float("inf"), float("nan")])
def test_a_block_is_above_zero(block_hz):
    with pytest.raises(InputError, match="block_hz"):
        resource_blocks(drawn(), block_hz)
