"""A tiny model, config and data that the tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import hfedmoe
from hfedmoe_jax.models import MoeModel, Params, build_model

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
    return build_model(config.model, CLASSES, VOCABULARY, TOKENS)


@functools.cache
def _tiny_params(**fields) -> Params:
    return jax.jit(tiny_model(tiny_config(**fields)).init)(jax.random.key(0))


def tiny_params(**fields) -> Params:
    """Returns the parameters of the tiny model with these config fields, a copy that may be donated."""
    return jax.tree.map(jnp.copy, _tiny_params(**fields))


def tiny_batches(seed: int, *leading: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [*leading, T] with some padding at the end, and labels [*leading]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (*leading, TOKENS)).astype(np.int32)
    length = rng.integers(1, TOKENS + 1, (*leading, 1))
    return np.where(np.arange(TOKENS) < length, tokens, 0), rng.integers(0, CLASSES, leading).astype(np.int32)
