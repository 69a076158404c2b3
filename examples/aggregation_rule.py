"""A new aggregation rule: a client's experts weigh as much as it used them.

python -m launch.main --config=examples/aggregation_rule.py
"""

import jax.numpy as jnp

from configs import hfedmoe
from hfedmoe_jax import expert_rules


@expert_rules.register("usage_weighted")
def usage_weighted(upload, aggregation):
    """Data size times usage for the experts that the client trained, [layers, experts]."""
    return jnp.where(upload.trained, upload.size * upload.usage, 0.0)


def get_config(preset: str = "bbc"):
    config = hfedmoe.get_config(preset)
    config.fl.expert_rule = "usage_weighted"
    return config
