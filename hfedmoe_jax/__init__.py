"""Federated fine-tuning of mixture-of-experts language models over unequal clients.

The method is HFedMoE (arXiv 2601.00583); every equation is a function of `scores`, `selection`,
`aggregation` or `running_mean`. `Experiment` runs a config; `score_rules`, `expert_rules`, `gating_rules`,
`estimates` and `algorithms.algorithms` are the tables that new parts are added to.
"""

from hfedmoe_jax.aggregation import Upload, expert_rules, gating_rules
from hfedmoe_jax.algorithms import FederatedAlgorithm, Method, Setting, algorithms, compose
from hfedmoe_jax.data import FederatedData, load_federated
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experiment import Experiment, Outcome, RunState
from hfedmoe_jax.mesh import make_mesh
from hfedmoe_jax.models import families
from hfedmoe_jax.scores import Evidence, estimates, score_rules
from hfedmoe_jax.tasks import Task, tasks

__all__ = [
    "Evidence",
    "Experiment",
    "FederatedAlgorithm",
    "FederatedData",
    "InputError",
    "Method",
    "Outcome",
    "RunState",
    "Setting",
    "Task",
    "Upload",
    "algorithms",
    "compose",
    "estimates",
    "expert_rules",
    "families",
    "gating_rules",
    "load_federated",
    "make_mesh",
    "score_rules",
    "tasks",
]
