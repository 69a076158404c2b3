"""From a config to a model: the pair of pure functions that the rest of the package uses."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.params import Params, merge_params, split_params
from hfedmoe_jax.models.pieces import Pieces
from hfedmoe_jax.models.routing import ExpertControls, open_controls
from hfedmoe_jax.models.switch import PAD_ID, SwitchClassifier, switch_pieces
from hfedmoe_jax.registry import unknown_name

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""What pieces compute in. Parameters, gradients of experts, routers, losses, optimizers and the sums over
clients are float32 always; gradients of attention leave its products in the chosen precision."""


class MoeModel(NamedTuple):
    """A model as pure functions, with the sizes that selection and budgets need.

    Attributes:
      init: key -> Params.
      apply: (params, tokens [B, T], controls, training) -> (logits [B, classes], Routing); the reference
        that `pieces` are tested against, used in training no more.
        `training` (static) chooses between the two capacity factors.
      pieces: the same model cut for `hfedmoe_jax.budgeted`.
      real: tokens [B, T] -> bool [B, T], False for padding.
      num_layers: L, MoE layers.
      num_experts: E, experts a layer.
      top_k: experts of a token.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable
    pieces: Pieces
    real: Callable[[jax.Array], jax.Array]
    num_layers: int
    num_experts: int
    top_k: int


def build_model(
    config: ConfigDict, num_classes: int, vocab_size: int, seq_len: int, dispatch: str = "capacity"
) -> MoeModel:
    """Returns the model of `config` (the section `model` of a run's config).

    Args:
      dispatch: how the reference `apply` runs its experts, a name in `DISPATCHERS`.

    Raises:
      InputError: a size below one, heads that do not divide the width, top_k above the experts.
    """
    if config.precision not in PRECISIONS:
        raise unknown_name("model.precision", config.precision, list(PRECISIONS))
    for name in ("num_layers", "width", "num_heads", "hidden", "num_experts", "top_k"):
        if config[name] < 1:
            raise InputError(f"model.{name}", config[name], "must be at least 1", "give a positive number")
    if config.width % config.num_heads:
        raise InputError("model.num_heads", config.num_heads, f"does not divide model.width={config.width}",
                         "choose a divisor of the width")  # fmt: skip
    if config.top_k > config.num_experts:
        raise InputError("model.top_k", config.top_k, f"above model.num_experts={config.num_experts}",
                         "route a token to at most all experts")  # fmt: skip
    for name in ("capacity_factor", "eval_capacity_factor"):
        if not config[name] > 0:
            raise InputError(f"model.{name}", config[name], "must be above 0", "use e.g. 1.5")
    module = SwitchClassifier(
        num_classes=num_classes, vocab_size=vocab_size, seq_len=seq_len, num_layers=config.num_layers,
        width=config.width, num_heads=config.num_heads, hidden=config.hidden,
        num_experts=config.num_experts, top_k=config.top_k, dispatch=dispatch,
    )  # fmt: skip

    def init(key: jax.Array) -> Params:
        tokens = jnp.zeros((1, seq_len), jnp.int32)
        controls = open_controls(config.num_layers, config.num_experts)
        return split_params(module.init(key, tokens, controls, 1.0)["params"])

    def apply(params: Params, tokens: jax.Array, controls: ExpertControls, training: bool):
        factor = config.capacity_factor if training else config.eval_capacity_factor
        return module.apply({"params": merge_params(params)}, tokens, controls, factor)

    def real(tokens: jax.Array) -> jax.Array:
        return tokens != PAD_ID

    pieces = switch_pieces(config, num_classes, PRECISIONS[config.precision])
    return MoeModel(init, apply, pieces, real, config.num_layers, config.num_experts, config.top_k)
