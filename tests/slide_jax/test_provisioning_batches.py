"""Needs of many users and drops: in blocks, under `vmap`, from one program, and their gradients."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slide_strategies import RATE_MODELS, hull_of, random_problem, with_layers

from slide_jax import provisioning

USERS, MODELS, LAYERS = 5, 3, 4


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


provision = jax.jit(provisioning.provision)


def need_of(problem):
    need = provision(hull_of(problem), problem)
    return jax.tree.map(np.asarray, need)


def problems_of(corner, rate_model, count, users=USERS):
    for seed in range(count):
        problem = random_problem(np.random.default_rng(seed), users, MODELS, LAYERS, rate_model, corner)
        yield with_layers(problem, LAYERS)


@pytest.mark.parametrize(
    ("users", "corner"), [(4, "none"), (7, "none"), (8, "none"), (5, "named models"), (11, "static power")]
)
def test_overlapping_blocks_change_nothing(users, corner, monkeypatch):
    problem = next(problems_of(corner, "shannon", 1, users))
    hull, rate_model = hull_of(problem), problem.rate_model

    def everything(users):
        need = provisioning.provision(hull, dataclasses.replace(problem, users=users))
        chosen = (need.model, need.frequency_hz)
        least = provisioning.bandwidth_by(users.deadline_s * 0.9, hull, users, *chosen, rate_model)
        return need, least, provisioning.outcome(hull, users, *chosen, 1e6 + least, rate_model)

    whole = jax.jit(lambda users: everything(users))(problem.users)
    monkeypatch.setattr(provisioning, "BLOCK", 4)
    in_blocks = jax.jit(lambda users: everything(users))(problem.users)
    chex.assert_trees_all_equal_shapes_and_dtypes(in_blocks, whole)
    chex.assert_trees_all_close(in_blocks, whole, rtol=1e-15)


@pytest.mark.parametrize("count", range(10))
def test_a_function_is_computed_for_every_user_once(count, monkeypatch):
    monkeypatch.setattr(provisioning, "BLOCK", 4)
    sizes = []

    def function(arrays):
        sizes.append(arrays[0].shape[0])
        return {"twice": 2 * arrays[0], "sum": arrays[0] + arrays[1].sum(axis=1)}

    values, table = np.arange(1.0, count + 1), np.arange(3.0 * count).reshape(count, 3)
    result = provisioning.by_blocks(function, (values, table))
    np.testing.assert_array_equal(result["twice"], 2 * values)
    np.testing.assert_array_equal(result["sum"], values + table.sum(axis=1))
    assert set(sizes) == {min(count, 4)}


def test_models_of_equal_shape_share_a_program():
    problems = list(problems_of("none", "linear", 8))
    need_of(problems[0])
    compiled = provision._cache_size()
    for problem in problems:
        need_of(problem)
    assert provision._cache_size() == compiled


def test_drops_are_mapped():
    problems = list(problems_of("clock limits", "linear", 6))
    users = jax.tree.map(lambda *columns: np.stack(columns), *(problem.users for problem in problems))
    # The drops share a catalogue.
    hull, shared = hull_of(problems[0]), problems[0]
    mapped = jax.vmap(lambda users: provision(hull, dataclasses.replace(shared, users=users)))(users)
    for drop, problem in enumerate(problems):
        one = provision(hull, dataclasses.replace(shared, users=problem.users))
        chex.assert_trees_all_equal(jax.tree.map(lambda column, drop=drop: column[drop], mapped), one)


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_gradients_agree_with_finite_differences(rate_model):
    """Needs of different users are separate, so one step in a column moves all of them at once."""
    names = (
        "deadline_s",
        "start_s",
        "energy_j",
        "f_max_hz",
        "spectral_efficiency_bps_hz",
        "snr_hz",
        "kappa_j_per_hz2_cycle",
    )
    problem = next(
        p for p in problems_of("none", rate_model, 50) if np.isfinite(need_of(p).bandwidth_hz).sum() > 3
    )
    users, hull = problem.users, hull_of(problem)
    columns = {name: getattr(users, name) for name in names}
    columns["energy_j"] = np.where(np.isinf(columns["energy_j"]), 1e6, columns["energy_j"])

    def needs(scales):
        scaled = {name: columns[name] * scales[name] for name in names}
        changed = dataclasses.replace(problem, users=dataclasses.replace(users, **scaled))
        bandwidth = provision(hull, changed).bandwidth_hz
        return jnp.where(jnp.isfinite(bandwidth), bandwidth, 0.0)

    ones = {name: np.ones(USERS) for name in names}
    gradients = jax.grad(lambda scales: jnp.sum(needs(scales)))(ones)
    sizes = np.asarray(needs(ones))
    for name in names:
        above, below = (needs(ones | {name: np.full(USERS, 1 + step)}) for step in (1e-6, -1e-6))
        slope = np.asarray(above - below) / 2e-6
        np.testing.assert_allclose(gradients[name] / sizes.max(), slope / sizes.max(), rtol=1e-5, atol=1e-7)
    assert np.any(gradients["deadline_s"] < 0) and np.any(gradients["f_max_hz"] < 0)
