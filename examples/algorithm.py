"""A new algorithm: clients' updates are clipped to a norm before they are averaged.

python -m launch.main --config=examples/algorithm.py
"""

import jax.numpy as jnp
import optax

from configs import hfedmoe
from hfedmoe_jax import algorithms, compose
from hfedmoe_jax.algorithms import Transformed

CLIP_NORM = 1.0


@algorithms.register("clipped")
def clipped(config):
    """`fl.base` with updates of an L2 norm of at most `CLIP_NORM`, over all parameters."""

    def transform(update):
        factor = jnp.minimum(1.0, CLIP_NORM / optax.tree.norm(update.change))
        return Transformed(optax.tree.scale(factor, update.change))

    return compose(config)._replace(transform=transform)


def get_config(preset: str = "bbc"):
    config = hfedmoe.get_config(preset)
    config.fl.update(algorithm="clipped", base="hfedmoe")
    return config
