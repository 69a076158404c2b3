"""Mixture-of-experts models: Flax modules by family, and what the rest of the package sees of them."""

from hfedmoe_jax.models import decoder, encoder, switch, switch_t5
from hfedmoe_jax.models.family import ModelOutput, ModelSizes, MoeModel, build_model, check_sizes, families
from hfedmoe_jax.models.params import (
    NO_PARAMS,
    Params,
    frozen_specs,
    merge_params,
    params_specs,
    split_params,
    tree_bytes,
)
from hfedmoe_jax.models.routing import RouterRule, Routing, load_balancing_loss, own_choice

__all__ = [
    "NO_PARAMS",
    "ModelOutput",
    "ModelSizes",
    "MoeModel",
    "Params",
    "RouterRule",
    "Routing",
    "build_model",
    "check_sizes",
    "decoder",
    "encoder",
    "families",
    "frozen_specs",
    "load_balancing_loss",
    "merge_params",
    "own_choice",
    "params_specs",
    "split_params",
    "switch",
    "switch_t5",
    "tree_bytes",
]
