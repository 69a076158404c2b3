"""Mixture-of-experts models as pairs of pure functions (init, apply)."""

from hfedmoe_jax.models.build import MoeModel, build_model
from hfedmoe_jax.models.cost import ModelCost, model_cost
from hfedmoe_jax.models.dispatch import DISPATCHERS
from hfedmoe_jax.models.params import Params, merge_params, split_params, tree_bytes
from hfedmoe_jax.models.pieces import Pieces
from hfedmoe_jax.models.routing import ExpertControls, Routing, load_balancing_loss, open_controls, own_choice
from hfedmoe_jax.models.slots import Slots, all_slots, slots_of

__all__ = [
    "DISPATCHERS",
    "ExpertControls",
    "ModelCost",
    "MoeModel",
    "Params",
    "Pieces",
    "Routing",
    "Slots",
    "all_slots",
    "build_model",
    "load_balancing_loss",
    "merge_params",
    "model_cost",
    "open_controls",
    "own_choice",
    "slots_of",
    "split_params",
    "tree_bytes",
]
