"""The bench model in PyTorch, optimised for speed: local training on one flat vector of parameters.

The same function as `hfedmoe_jax.models.switch.SwitchClassifier`, top-1.
PyTorch is optional, so it is imported where it is used.

Axes: C clients, B batch, T tokens, N = B * T, E experts, S slots of an expert, D model, F hidden.
"""

# pyright: reportMissingImports=false

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

BALANCE = 0.01  # weight of the load-balancing loss
NORM_EPSILON = 1e-6  # Flax's


@dataclass(frozen=True)
class Task:
    """The work of every peer: FedAvg with plain SGD and all clients in every round.

    Attributes:
      params: the Flax parameters of `SwitchClassifier`, arrays.
      tokens: ids, 0 is padding; every round trains on the same batches, in order.
      labels: classes.
      num_examples: the clients' weights in the mean of their parameters, whole numbers.
      num_heads: of attention.
      capacity: slots of an expert, see `hfedmoe_jax.slots.expert_capacity`.
      learning_rate: of all parameters.
    """

    params: Mapping[str, Any]
    tokens: Int[np.ndarray, "clients steps batch tokens"]
    labels: Int[np.ndarray, "clients steps batch"]
    num_examples: Float[np.ndarray, " clients"]
    num_heads: int
    capacity: int
    learning_rate: float

    @property
    def client_steps(self) -> int:
        """Local steps of a round, over all clients."""
        return self.labels.shape[0] * self.labels.shape[1]


class Settings(NamedTuple):
    """How PyTorch runs the step.

    Attributes:
      compiled: through torch.compile.
      library: whose matrix products, `mkl` or `onednn`.
    """

    compiled: bool
    library: str


def torch_layout(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `SwitchClassifier` by name as the step takes them.

    A layer's query, key and value projections become one matrix [D, 3 D]; a layer's number ends its names.

    Args:
      params: the Flax parameters (without the collection's name), arrays.
    """
    params = _map(np.asarray, params)
    blocks, width = params["blocks"], params["position"].shape[-1]
    layers = {**blocks["attend"], "router": blocks["router"], "experts": params["experts"]}
    arrays = {"embed": params["embed"], "position": params["position"]}
    for layer in range(blocks["router"]["kernel"].shape[0]):
        block = _map(lambda array, layer=layer: array[layer], layers)
        attention, experts = block["attention"], block["experts"]
        projections = [attention[name] for name in ("query", "key", "value")]
        arrays |= {
            f"norm_attention_scale{layer}": block["norm_attention"]["scale"],
            f"norm_attention_bias{layer}": block["norm_attention"]["bias"],
            f"qkv_kernel{layer}": np.hstack([each["kernel"].reshape(width, width) for each in projections]),
            f"qkv_bias{layer}": np.hstack([each["bias"].reshape(width) for each in projections]),
            f"out_kernel{layer}": attention["out"]["kernel"].reshape(width, width),
            f"out_bias{layer}": attention["out"]["bias"],
            f"norm_moe_scale{layer}": block["norm_moe"]["scale"],
            f"norm_moe_bias{layer}": block["norm_moe"]["bias"],
            f"router{layer}": block["router"]["kernel"],
            f"w_in{layer}": experts["w_in_df"],
            f"w_out{layer}": experts["w_out_fd"],
        }
    arrays |= {
        "norm_head_scale": params["head"]["norm"]["scale"],
        "norm_head_bias": params["head"]["norm"]["bias"],
        "head_kernel": params["head"]["classes"]["kernel"],
        "head_bias": params["head"]["classes"]["bias"],
    }
    return arrays


def _map(function, tree):
    """Returns a tree of dicts with `function` applied to every array."""
    return {
        key: _map(function, value) if isinstance(value, Mapping) else function(value)
        for key, value in tree.items()
    }


def flatten(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns all arrays concatenated as one float32 vector."""
    return np.concatenate([array.ravel() for array in arrays.values()]).astype(np.float32)


def views(vector, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns views of a flattened `vector` (NumPy or PyTorch) with the original shapes."""
    arrays, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + int(np.prod(shape))
        arrays[name] = vector[begin:end].reshape(shape)
        begin = end
    return arrays


@functools.cache
def onednn_product() -> Callable:
    """Returns `product(a, b)`, `a @ b` of matrices or of stacks of them by oneDNN, differentiable.

    PyTorch's own float32 products go to MKL, which on an AMD EPYC with AVX-512 ran at half of oneDNN's
    speed (95 against 210 GFLOP/s on a core). To torch.compile the product is opaque, because its own
    lowering of oneDNN's operator wants constant weights; oneDNN's operators have no stacked product.
    """
    import torch

    def multiply(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")

    @torch.library.custom_op("population::product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dim() == 2:
            return multiply(a, b)
        return torch.stack([multiply(*pair) for pair in zip(a, b, strict=True)])

    product.register_fake(lambda a, b: a.new_empty(*a.shape[:-1], b.shape[-1]))
    product.register_autograd(
        lambda context, gradient: (
            product(gradient, context.saved_tensors[1].mT),
            product(context.saved_tensors[0].mT, gradient),
        ),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return product


def make_objective(num_heads: int, capacity: int, library: str) -> Callable:
    """Returns `(params, x_btd, tokens_bt, labels_b) -> (objective, cross_entropy)` in PyTorch.

    `x_btd` are the token embeddings, an input of their own so that their gradient stays [B, T, D].

    Args:
      num_heads: of attention.
      capacity: slots of an expert.
      library: whose matrix products, `mkl` (PyTorch's choice) or `onednn`.
    """
    import torch
    import torch.nn.functional as F

    product = {"mkl": lambda: torch.matmul, "onednn": onednn_product}[library]()

    class Move(torch.autograd.Function):
        """Gathers rows. Each is read at most once, so the backward pass is a gather by the inverse index."""

        @staticmethod
        def forward(ctx, rows, index, inverse):
            ctx.save_for_backward(inverse)
            return take(rows, index)

        @staticmethod
        def backward(ctx, gradient):
            return take(gradient, ctx.saved_tensors[0]), None, None

    def take(rows, index):
        """Returns rows by index; the index after the last row gives zeros."""
        return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, index)

    def norm(x, scale, bias):
        return F.layer_norm(x, x.shape[-1:], scale, bias, NORM_EPSILON)

    def attention(params, layer, x_btd, key_mask):
        batch, tokens, width = x_btd.shape
        qkv = product(x_btd.reshape(-1, width), params[f"qkv_kernel{layer}"]) + params[f"qkv_bias{layer}"]
        q, k, v = qkv.view(batch, tokens, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        mixed = mixed.transpose(1, 2).reshape(-1, width)
        return (product(mixed, params[f"out_kernel{layer}"]) + params[f"out_bias{layer}"]).view_as(x_btd)

    def experts(params, layer, x_nd, real):
        w_in, w_out = params[f"w_in{layer}"], params[f"w_out{layer}"]
        num_tokens, num_experts = len(x_nd), len(w_in)
        gates = torch.softmax(x_nd @ params[f"router{layer}"], dim=-1)
        weight, expert = gates.max(dim=-1)
        with torch.no_grad():
            queue = (expert[:, None] == torch.arange(num_experts, device=x_nd.device)) & real[:, None]
            count = queue.int()
            position = ((count.cumsum(0) - 1) * count).sum(1)
            nowhere = num_experts * capacity
            slot = torch.where(real & (position < capacity), expert * capacity + position, nowhere)
            nobody = torch.full((nowhere + 1,), num_tokens, device=x_nd.device)
            token = nobody.scatter(0, slot, torch.arange(num_tokens, device=x_nd.device))[:-1]
            sent = count.sum(0).float()
            fraction = sent / sent.sum().clamp(min=1.0)
        x_esd = Move.apply(x_nd, token, slot).view(num_experts, capacity, -1)
        y_esd = product(torch.relu(product(x_esd, w_in)), w_out)
        y_nd = Move.apply(y_esd.view(nowhere, -1), slot, token) * weight[:, None]
        mean_gate = (gates * real[:, None]).sum(0) / real.sum().clamp(min=1)
        return y_nd, num_experts * (fraction * mean_gate).sum()

    def objective(params, x_btd, tokens_bt, labels_b):
        real_bt = tokens_bt != 0
        # Masking keys is enough: what a padding token reads reaches nobody.
        key_mask = torch.zeros_like(real_bt, dtype=x_btd.dtype).masked_fill(~real_bt, -1e30)[:, None, None]
        num_layers = sum(name.startswith("router") for name in params)
        balance = 0.0
        x_btd = x_btd + params["position"][: tokens_bt.shape[1]]
        for layer in range(num_layers):
            h = norm(x_btd, params[f"norm_attention_scale{layer}"], params[f"norm_attention_bias{layer}"])
            x_btd = x_btd + attention(params, layer, h, key_mask)
            h = norm(x_btd, params[f"norm_moe_scale{layer}"], params[f"norm_moe_bias{layer}"])
            y_nd, layer_balance = experts(params, layer, h.view(-1, h.shape[-1]), real_bt.view(-1))
            x_btd = x_btd + y_nd.view_as(x_btd)
            balance = balance + layer_balance / num_layers
        x_btd = norm(x_btd, params["norm_head_scale"], params["norm_head_bias"])
        real = real_bt[..., None]
        pooled = (x_btd * real).sum(1) / real.sum(1).clamp(min=1)
        logits = torch.addmm(params["head_bias"], pooled, params["head_kernel"])
        cross_entropy = F.cross_entropy(logits, labels_b)
        return cross_entropy + BALANCE * balance, cross_entropy

    return objective


def make_step(
    shapes: Mapping[str, tuple[int, ...]],
    num_heads: int,
    capacity: int,
    learning_rate: float,
    settings: Settings,
) -> Callable:
    """Returns `step(vector, tokens_bt, labels_b) -> cross_entropy`, one SGD step on `vector` in place.

    Only the embeddings of the batch's tokens are touched: their gradient is never made dense.

    Args:
      shapes: of the parameters, in the order of the vector.
      num_heads, capacity: see `make_objective`.
      learning_rate: of plain SGD.
      settings: compiled, forward, backward and update are one graph.
    """
    import torch

    objective = make_objective(num_heads, capacity, settings.library)

    def descend(params, tokens_bt, labels_b):
        embed = params["embed"].detach()
        trained = {name: value.detach().requires_grad_() for name, value in params.items() if name != "embed"}
        flat_tokens = tokens_bt.reshape(-1)
        with torch.enable_grad():
            x_btd = embed.index_select(0, flat_tokens).view(*tokens_bt.shape, -1).requires_grad_()
            total, cross_entropy = objective(trained, x_btd, tokens_bt, labels_b)
            x_gradient, *gradients = torch.autograd.grad(total, [x_btd, *trained.values()])
        with torch.no_grad():
            embed.index_add_(0, flat_tokens, x_gradient.view(len(flat_tokens), -1), alpha=-learning_rate)
            weights = [value.detach() for value in trained.values()]
            torch._foreach_add_(weights, gradients, alpha=-learning_rate)
        return cross_entropy.detach()

    if not settings.compiled:
        return lambda vector, tokens_bt, labels_b: descend(views(vector, shapes), tokens_bt, labels_b)
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = None

    def step(vector, tokens_bt, labels_b):
        nonlocal graph
        params = views(vector, shapes)
        if graph is None:
            example = {name: value.clone() for name, value in params.items()}
            graph = torch.compile(make_fx(descend)(example, tokens_bt, labels_b), fullgraph=True)
        return graph(params, tokens_bt, labels_b)

    return step


def make_train(task: Task, settings: Settings, device: str = "cpu") -> Callable:
    """Returns `train(vector, client) -> loss`, a client's local steps on a vector of parameters in place."""
    import torch

    torch.set_num_threads(1)
    shapes = {name: array.shape for name, array in torch_layout(task.params).items()}
    step = make_step(shapes, task.num_heads, task.capacity, task.learning_rate, settings)
    tokens, labels = (torch.from_numpy(part).long().to(device) for part in (task.tokens, task.labels))

    def train(vector, client: int) -> float:
        losses = [step(vector, *batch) for batch in zip(tokens[client], labels[client], strict=True)]
        return float(torch.stack(losses).mean())

    train(torch.from_numpy(initial(task)).to(device), 0)  # compiles
    return train


def initial(task: Task) -> Float[np.ndarray, " parameters"]:
    """Returns the parameters that training starts from, as one vector."""
    return flatten(torch_layout(task.params))


class Loop(contextlib.AbstractContextManager):
    """Plain PyTorch in this process on one device, one client after the other.

    It is meant for a GPU.

    Args:
      task, settings: the work, and how PyTorch runs it; a GPU has no oneDNN.
      device: PyTorch's name of the device.
    """

    def __init__(self, task: Task, settings: Settings, device: str):
        import torch

        self._vector = torch.from_numpy(initial(task)).to(device)
        self._weight = (task.num_examples / task.num_examples.sum()).tolist()
        self._train = make_train(task, settings, device)

    def round(self) -> Float[np.ndarray, " clients"]:
        """Runs one round and returns each client's mean cross-entropy over its steps, in nats."""
        mean, losses = self._vector.new_zeros(self._vector.shape), []
        for client, weight in enumerate(self._weight):
            vector = self._vector.clone()
            losses.append(self._train(vector, client))
            mean.add_(vector, alpha=weight)
        self._vector = mean
        return np.array(losses)

    def __exit__(self, *exception) -> None:
        """Has nothing to end."""
