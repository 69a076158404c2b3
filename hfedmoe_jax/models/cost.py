"""What a model costs a device: bytes from the real arrays, FLOP from the real shapes.

Axes: B batch, T tokens, N = B * T, L layers, E experts, D model, F hidden, S slots of an expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hfedmoe_jax.models.dispatch import expert_capacity
from hfedmoe_jax.models.params import Params, tree_bytes


class ModelCost(NamedTuple):
    """What a model costs at one batch shape, with the optimizer that trains it.

    Attributes:
      num_experts: L * E.
      shared_parameter_bytes: everything but the experts (routers included).
      shared_training_bytes: their parameters, gradients, optimizer state and activations.
      expert_parameter_bytes: one expert.
      expert_training_bytes: one expert's gradients, optimizer state and activations, without
        its parameters.
      shared_flop: forward FLOP of everything but the experts, one batch.
      assignment_flop: forward FLOP of one expert on one token.
    """

    num_experts: int
    shared_parameter_bytes: int
    shared_training_bytes: int
    expert_parameter_bytes: int
    expert_training_bytes: int
    shared_flop: float
    assignment_flop: float


def model_cost(
    config: ConfigDict, params: Params, optimizer_state: Any, batch_size: int, seq_len: int
) -> ModelCost:
    """Returns the cost of training `params` on batches of one shape.

    Parameters, gradients and optimizer state are counted from the arrays themselves. Activations are
    those that the backward pass reads again, in the model's precision: per layer nine [N, D] tensors
    (norm inputs and outputs, queries, keys, values, attention and expert outputs) and two [B, heads, T, T],
    per expert its S slots of input and hidden units before and after the ReLU. With `remat` a layer keeps
    three [N, D] (its input, its experts' inputs and outputs) and computes the rest again when its turn
    comes, one layer at a time; an expert keeps its output alone.

    Args:
      config: the section `model`.
      params: arrays or shapes.
      optimizer_state: `PerExpertState` of arrays or shapes.
      batch_size, seq_len: B, T.
    """
    tokens = batch_size * seq_len
    num_experts = config.num_layers * config.num_experts
    shared_bytes = tree_bytes((params.router, params.shared))
    expert_bytes = tree_bytes(params.experts) // num_experts
    bytes_each = jnp.dtype(config.precision).itemsize
    layer = 9 * tokens * config.width + 2 * batch_size * config.num_heads * seq_len**2
    slots = expert_capacity(tokens, config.num_experts, config.top_k, config.capacity_factor)
    if config.remat:
        shared_activations = bytes_each * (config.num_layers * 3 * tokens * config.width + layer)
        expert_activations = bytes_each * slots * config.width
    else:
        shared_activations = bytes_each * config.num_layers * layer
        expert_activations = bytes_each * slots * (config.width + 2 * config.hidden)
    classes = jax.tree.leaves(params.shared["head"]["classes"]["bias"])[0].size
    layer_flop = 8 * tokens * config.width**2 + 4 * tokens * seq_len * config.width
    router_flop = 2 * tokens * config.width * config.num_experts
    return ModelCost(
        num_experts=num_experts,
        shared_parameter_bytes=shared_bytes,
        shared_training_bytes=2 * shared_bytes + tree_bytes(optimizer_state.rest) + shared_activations,
        expert_parameter_bytes=expert_bytes,
        expert_training_bytes=expert_bytes
        + tree_bytes(optimizer_state.experts) // num_experts
        + expert_activations,
        shared_flop=config.num_layers * (layer_flop + router_flop) + 2 * batch_size * config.width * classes,
        assignment_flop=4 * config.width * config.hidden,
    )
