"""A new algorithm: FedExP (arXiv 2301.09604), longer server steps the more the clients' updates disagree.

python -m launch.main --config=examples/algorithm.py
"""

import jax.numpy as jnp
from optax import tree

from configs import hfedmoe
from hfedmoe_jax import algorithms, compose
from hfedmoe_jax.algorithms import Transformed


@algorithms.register("fedexp")
def fedexp(config):
    def transform(update):  # of each client: its change as it is, and a number that is summed
        return Transformed(update.change, summed=tree.norm(update.change, squared=True))

    def step(totals, extra):  # of the server: from the mean change to the one it makes
        ratio = totals.summed / totals.count / (tree.norm(totals.change, squared=True) + 1e-3)
        return tree.scale(jnp.maximum(1.0, ratio / 2), totals.change), extra

    return compose(config)._replace(transform=transform, step=step)  # compose: what fl.base names


def get_config(preset: str = "default"):
    config = hfedmoe.get_config(preset)
    config.fl.algorithm = "fedexp"
    return config
