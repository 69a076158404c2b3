"""FedMoE's aggregation (arXiv 2408.11304): experts and router rows over the clients that trained the expert.

A router's row scores one expert, so only clients that trained the expert have a gradient for it that means
something. Everything else is as in FedAvg. FedMoE's choice of each client's submodel is not part of it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload, expert_rules, gating_rules
from hfedmoe_jax.algorithms.algorithm import algorithms
from hfedmoe_jax.algorithms.composition import COMPOSITIONS, Composition, compose


@expert_rules.register("trained")
@gating_rules.register("trained_rows")
def of_trained(upload: Upload, aggregation: ConfigDict) -> Float[Array, "*layers experts"]:
    """|D_c| for each expert that the client trained, or for its row of the routers; zero for the rest."""
    return jnp.where(upload.trained, upload.size, 0.0)


COMPOSITIONS["fedmoe"] = Composition(expert_rule="trained", gating_rule="trained_rows")
algorithms.register("fedmoe")(compose)
