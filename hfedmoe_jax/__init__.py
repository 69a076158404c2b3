"""Federated fine-tuning of mixture-of-experts language models over unequal clients.

The method is HFedMoE (arXiv 2601.00583); every equation is a function of `scores`, `selection`,
`aggregation` or `running_mean`. `Experiment` runs a config; `score_rules`, `expert_rules`, `gating_rules`,
`estimates` and `algorithms.algorithms` are the tables that new parts are added to.
"""

from hfedmoe_jax.aggregation import Upload, expert_rules, gating_rules
from hfedmoe_jax.algorithms import Composition, FederatedAlgorithm
from hfedmoe_jax.data import FederatedData, load_federated
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experiment import COLUMNS, Experiment, Outcome, RunState
from hfedmoe_jax.population import make_mesh
from hfedmoe_jax.scores import Evidence, estimates, score_rules

__all__ = [
    "COLUMNS",
    "Composition",
    "Evidence",
    "Experiment",
    "FederatedAlgorithm",
    "FederatedData",
    "InputError",
    "Outcome",
    "RunState",
    "Upload",
    "estimates",
    "expert_rules",
    "gating_rules",
    "load_federated",
    "make_mesh",
    "score_rules",
]
