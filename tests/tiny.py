"""A tiny model, config and data that the tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import hfedmoe
from hfedmoe_jax.algorithms import FederatedAlgorithm, Portion, Setting, algorithms
from hfedmoe_jax.client import ClientData
from hfedmoe_jax.mesh import make_mesh
from hfedmoe_jax.models import ModelSizes, MoeModel, Params, build_model
from hfedmoe_jax.population import put_members, stack_members
from hfedmoe_jax.schedule import NOBODY
from hfedmoe_jax.tasks import tasks

VOCABULARY, CLASSES, TOKENS = 50, 3, 8


def tiny_config(**fields) -> ConfigDict:
    """Returns the smoke config at a still smaller size, with `section__field=value` replaced."""
    config = hfedmoe.get_config("smoke")
    config.model.update(width=8, num_heads=2, hidden=6, num_experts=3, capacity_factor=3.0)
    config.data.seq_len = TOKENS
    config.fl.update(batch_size=4, local_steps=3)
    config.client.learning_rate = 0.01
    config.aggregation.tau = 0.02
    for name, value in fields.items():
        section, _, field = name.partition("__")
        with config.ignore_type():
            config[section][field] = value
    return config


def tiny_model(config: ConfigDict) -> MoeModel:
    shapes = {"tokens": (config.fl.batch_size, TOKENS), "labels": (config.fl.batch_size,)}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    outputs = tasks[config.task.name].num_outputs(tuple("abc"), VOCABULARY)
    return build_model(config.model, ModelSizes(outputs, VOCABULARY, TOKENS), batch)


@functools.cache
def _tiny_params(**fields) -> tuple[Params, dict]:
    return jax.jit(tiny_model(tiny_config(**fields)).init)(jax.random.key(0))


def tiny_params(**fields) -> Params:
    """Returns the parameters of the tiny model with these config fields, a copy that may be donated."""
    return jax.tree.map(jnp.copy, _tiny_params(**fields)[0])


def tiny_frozen(**fields) -> dict:
    """Returns its frozen parameters."""
    return _tiny_params(**fields)[1]


def tiny_batches(seed: int, *leading: int) -> dict[str, np.ndarray]:
    """Returns tokens [*leading, T] with some padding at the end, and labels [*leading]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (*leading, TOKENS)).astype(np.int32)
    length = rng.integers(1, TOKENS + 1, (*leading, 1))
    tokens = np.where(np.arange(TOKENS) < length, tokens, 0)
    return {"tokens": tokens, "labels": rng.integers(0, CLASSES, leading).astype(np.int32)}


def tiny_cohort(config: ConfigDict, members, budgets, available=None) -> ClientData:
    """Returns the data of clients for a round, [M, ...]; a client's are the same in any company."""
    batches = [tiny_batches(c, config.fl.local_steps, config.fl.batch_size) for c in members]
    return ClientData(
        client=np.array(members, np.int32),
        batch=jax.tree.map(lambda *x: np.stack(x), *batches),
        size=np.float32([10 + 7 * c for c in members]) / 64,
        budget=np.asarray(budgets, np.int32)[list(members)],
        available=np.array([True] * len(members) if available is None else available),
        rate=np.ones(len(members), np.float32),
    )


def tiny_algorithm(config: ConfigDict, budgets, mesh=None, chunk: int = 1, table_rows: int = VOCABULARY):
    """Returns the algorithm of a config for clients with these budgets."""
    mesh = make_mesh(jax.devices()[:1]) if mesh is None else mesh
    model = tiny_model(config)
    frozen = jax.jit(model.init)(jax.random.key(0))[1]
    task, budgets = tasks[config.task.name], np.int32(budgets)
    setting = Setting(config, model, task, frozen, budgets, table_rows, mesh, chunk)
    return algorithms[config.fl.algorithm](config)(setting)


def run_round(algorithm: FederatedAlgorithm, state, data: ClientData, key, mesh=None):
    """Runs a round of a cohort; the state is donated."""
    mesh = make_mesh(jax.devices()[:1]) if mesh is None else mesh

    def portions():
        for block in algorithm.plan(data.client):
            members = block.members.reshape(-1)
            numbers = np.where(members == NOBODY, NOBODY, data.client[np.maximum(members, 0)])
            own = stack_members(data, block.members)
            yield Portion(
                block, numbers, put_members(mesh, own._replace(available=own.available & (members != NOBODY)))
            )

    return algorithm.round(state, portions(), key)
