"""A new rule for choosing experts: prefer those that win their samples by a clear margin.

python -m launch.main --config=examples/selector.py
"""

import jax

from configs import hfedmoe
from hfedmoe_jax import score_rules
from hfedmoe_jax.scores import masked_mean


@score_rules.register("margin")
def margin(evidence, importance):
    """Mean lead of the first expert over the second where the expert is chosen, [layers, experts]."""
    best_two, _ = jax.lax.top_k(evidence.gates, 2)  # gates: [layers, samples, experts]
    lead = best_two[..., :1] - best_two[..., 1:]
    return masked_mean(evidence.chosen * lead, evidence.mask)


def get_config(preset: str = "bbc"):
    config = hfedmoe.get_config(preset)
    config.fl.score = "margin"
    return config
