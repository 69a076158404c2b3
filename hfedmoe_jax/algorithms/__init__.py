"""Federated algorithms: pairs of pure functions, by name."""

from hfedmoe_jax.algorithms import adapters, composition, compression, dp_fedavg, fedmoe, local, scaffold
from hfedmoe_jax.algorithms.algorithm import (
    FederatedAlgorithm,
    Portion,
    RoundMetrics,
    ServerState,
    Setting,
    algorithms,
)
from hfedmoe_jax.algorithms.composition import COMPOSITIONS, Composition, compose, parts_of
from hfedmoe_jax.algorithms.method import Method
from hfedmoe_jax.algorithms.parts import Change, Totals, Transformed, Weights

__all__ = [
    "COMPOSITIONS",
    "Change",
    "Composition",
    "FederatedAlgorithm",
    "Method",
    "Portion",
    "RoundMetrics",
    "ServerState",
    "Setting",
    "Totals",
    "Transformed",
    "Weights",
    "adapters",
    "algorithms",
    "compose",
    "composition",
    "compression",
    "dp_fedavg",
    "fedmoe",
    "local",
    "parts_of",
    "scaffold",
]
