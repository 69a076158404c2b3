"""BERT-like encoders (arXiv 1810.04805) that classify texts, with mixtures of experts in their last layers.

Post-norm blocks: attention, then a network with a GELU between its matrices. A checkpoint's layers are
dense; `hfedmoe_jax.upcycling` makes experts of the networks of the last ones. Mean pooling over real tokens
and a linear head follow.

Axes: B batch, T tokens, N = B * T, L layers with experts, E experts, D model, F hidden, S slots of an expert.
"""

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import Budget, Expert, LayerBudget, open_budget
from hfedmoe_jax.models.attention import masked_attention
from hfedmoe_jax.models.encoder_sizes import UNUSED, EncoderSizes, encoder_names, read_encoder_sizes
from hfedmoe_jax.models.family import ATTENDED, FEATURES, ModelOutput, ModelSizes, families
from hfedmoe_jax.models.lora import Dense, lora_rule
from hfedmoe_jax.models.losses import contrastive_loss
from hfedmoe_jax.models.names import import_params
from hfedmoe_jax.models.precision import PRECISIONS, matmul
from hfedmoe_jax.models.routing import RouterRule, route
from hfedmoe_jax.models.switch import Head
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.pretrained import find_source
from hfedmoe_jax.upcycling import Mixture, Network, expert_size

PAD_ID = 0
INIT = nn.initializers.normal(0.02)


@functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("hidden"), prevent_cse=False
)
def gelu_expert(weights: dict[str, Any], x_sd: Float[Array, "slots model"]) -> Float[Array, "slots model"]:
    """Two matrices with a GELU between them; of the forward pass the hidden units are kept."""
    hidden = checkpoint_name(matmul(x_sd, weights["in_df"]) + weights["bias_f"].astype(x_sd.dtype), "hidden")
    return matmul(jax.nn.gelu(hidden, approximate=False), weights["out_fd"])


def init_experts(key: Array, num_layers: int, num_experts: int, width: int, hidden: int) -> dict[str, Array]:
    """Returns the experts of all layers."""
    first, second = jax.random.split(key)
    lead = (num_layers, num_experts)
    return dict(
        in_df=INIT(first, (*lead, width, hidden)), bias_f=jnp.zeros((*lead, hidden)),
        out_fd=INIT(second, (*lead, hidden, width)),
    )  # fmt: skip


class Attend(nn.Module):
    """Self-attention with a residual connection, then a norm."""

    sizes: EncoderSizes
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns [B, T, D], which the network reads and which is added to its output."""
        s = self.sizes

        def dense(name):
            return Dense(s.width, dtype=self.dtype, lora=s.lora, name=name)

        heads = (*x_btd.shape[:2], s.heads, s.width // s.heads)
        q, k, v = (dense(name)(x_btd).reshape(heads) for name in ("query", "key", "value"))
        y_btd = masked_attention(q, k, v, mask_bt).reshape(x_btd.shape)
        return norm(self, "norm_attention")(x_btd + dense("out")(y_btd))


def norm(block: Any, name: str) -> nn.LayerNorm:
    """Returns a norm of a block."""
    return nn.LayerNorm(block.sizes.epsilon, dtype=block.dtype, use_fast_variance=False, name=name)


class DenseBlock(nn.Module):
    """A layer as the checkpoint has it."""

    sizes: EncoderSizes
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], mask_bt: Bool[Array, "batch tokens"]):
        """Returns (x, what the network reads), the carry and the result of `nn.scan`."""
        attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
        h_btd = attend(self.sizes, self.dtype, name="attend")(x_btd, mask_bt)
        hidden = nn.Dense(self.sizes.hidden, dtype=self.dtype, name="network_in")(h_btd)
        y_btd = nn.Dense(self.sizes.width, dtype=self.dtype, name="network_out")(
            jax.nn.gelu(hidden, approximate=False)
        )
        return norm(self, "norm_network")(h_btd + y_btd), h_btd


class MixtureBlock(nn.Module):
    """A layer with experts."""

    sizes: EncoderSizes
    num_experts: int
    rule: RouterRule
    capacity_factor: float
    remat: bool
    dtype: Any
    expert: Expert
    attended: bool = False

    @nn.compact
    def __call__(self, carry, mask_bt, experts, layer: LayerBudget):
        """Returns ((x, tape), (permit, routing)), the carry and the result of `nn.scan`.

        With `attended` the x that it is given has passed its attention.
        """
        h_btd, tape = carry
        if not self.attended:
            attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
            h_btd = attend(self.sizes, self.dtype, name="attend")(h_btd, mask_bt)
        h_btd = jax.lax.optimization_barrier(h_btd)  # cached or not, what follows is compiled alike
        h_nd, mask = h_btd.reshape(-1, self.sizes.width), mask_bt.reshape(-1)
        router = nn.Dense(self.num_experts, name="router", dtype=jnp.float32)
        y_nd, tape, permit, routing = route(
            router(h_nd), h_nd, mask, self.rule, self.capacity_factor, self.expert, experts, layer, tape
        )
        bias = self.param("network_bias", nn.initializers.zeros, (self.sizes.width,))
        x_btd = norm(self, "norm_network")(h_btd + (y_nd + bias.astype(y_nd.dtype)).reshape(h_btd.shape))
        return (x_btd, tape), (permit, routing)


class Mixtures(nn.Module):
    """The layers with experts, the first one apart: behind its attention features may be cached.

    Attributes:
      block: arguments of every `MixtureBlock`.
      attended: of the first one.
    """

    block: tuple
    attended: bool

    @nn.compact
    def __call__(self, carry, mask_bt, experts, layers: LayerBudget):
        """Returns ((x, tape), (permit, routing)) of all layers."""

        def part(rows: Any) -> LayerBudget:
            return jax.tree.map(lambda x: x[rows], layers)

        first = MixtureBlock(*self.block, attended=self.attended, name="first")
        carry, reports = first(carry, mask_bt, experts, part(0))
        reports, length = jax.tree.map(lambda x: x[None], reports), len(layers.layer) - 1
        if length:
            rest = nn.scan(
                MixtureBlock, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=length,
            )  # fmt: skip
            carry, others = rest(*self.block, name="rest")(carry, mask_bt, experts, part(slice(1, None)))
            reports = jax.tree.map(lambda *x: jnp.concatenate(x), reports, others)
        return carry, reports


def cut_first(variables: dict) -> dict:
    """Returns the parameters of `Mixtures` of stacked ones [L, ...]."""
    stack = variables["params"]
    first, rest = (jax.tree.map(part, stack) for part in (lambda x: x[0], lambda x: x[1:]))
    return {"params": {"first": first, "rest": rest}}


def stack_first(variables: dict) -> dict:
    """Returns stacked parameters [L, ...] of those of `Mixtures`."""
    first = jax.tree.map(lambda x: x[None], variables["params"]["first"])
    rest = variables["params"].get("rest")
    return {"params": first if rest is None else jax.tree.map(lambda *x: jnp.concatenate(x), first, rest)}


class Trunk(nn.Module):
    """Embeddings and the layers without experts: of a checkpoint as it is, all of them."""

    shape: EncoderSizes
    layers: int
    rows: int
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, tokens_bt, mask_bt):
        """Returns the output [B, T, D], and what each layer's network reads [layers, B, T, D]."""
        s = self.shape
        table = self.param("embed", INIT, (self.rows, s.width))
        position = self.param("position", INIT, (s.positions, s.width))
        kind = self.param("kind", INIT, (s.kinds, s.width))
        parts = table[tokens_bt], position[: tokens_bt.shape[1]], kind[0]
        x_btd = sum(part.astype(jnp.float32) for part in parts)
        x_btd = nn.LayerNorm(s.epsilon, use_fast_variance=False, name="norm_embed")(x_btd).astype(self.dtype)
        if not self.layers:
            return x_btd, None
        stack = nn.scan(
            DenseBlock, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=nn.broadcast, length=self.layers,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return stack(s, self.remat, self.dtype, name="dense")(x_btd, mask_bt)


class Encoder(nn.Module):
    """Text to class logits.

    Attributes:
      sizes: of the task.
      shape: of the checkpoint.
      num_layers: L, the last ones, whose networks are mixtures.
      num_experts, hidden, rule: of each mixture; `hidden` units an expert.
      capacity_factor, eval_capacity_factor: slots of an expert over an even share of the tokens.
      dtype: that products are computed in.
      remat: compute attention again in the backward pass.
      expert: of all layers.
    """

    sizes: ModelSizes
    shape: EncoderSizes
    num_layers: int
    num_experts: int
    hidden: int
    rule: RouterRule
    capacity_factor: float
    eval_capacity_factor: float
    dtype: Any = jnp.float32
    remat: bool = False
    expert: Expert = gelu_expert

    table, output = None, "text"
    trunk_cuts = ((ATTENDED, ("trunk", "blocks/attend")), (FEATURES, ("trunk",)))
    text_parts, step_texts = 2, 16  # of the loss by which experts are made of a dense model

    @nn.nowrap
    def read(self, directory: pathlib.Path) -> dict:
        """Returns the parameters of a dense checkpoint, those of a whole `Trunk`."""
        if self.sizes.offset:
            problem = "has another token 0 than [PAD]"
            raise InputError("model.source", str(directory), problem, "use a BERT whose token 0 is [PAD]")
        if self.sizes.vocab_size != self.shape.vocab_size:
            problem = f"is of {self.shape.vocab_size:,} tokens, its tokenizer of {self.sizes.vocab_size:,}"
            raise InputError(
                "model.source", str(directory), problem, "use a directory with both of one model"
            )
        trunk = self.whole
        no_text = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        shapes = jax.eval_shape(lambda key: trunk.init(key, *no_text)["params"], jax.random.key(0))
        return import_params(directory, encoder_names(find_tensors(directory)), shapes, unused=UNUSED)

    @nn.nowrap
    def features(self, frozen: dict, tokens_bt: AnyArray, cut: str) -> Array:
        """Returns what reaches one of `trunk_cuts` [B, T, D]."""
        layers, mask_bt = self.shape.layers - self.num_layers, tokens_bt != PAD_ID
        trunk = Trunk(self.shape, layers, self.sizes.vocab_size, self.remat, self.dtype)
        x_btd = trunk.apply({"params": frozen["trunk"]}, tokens_bt, mask_bt)[0]  # pyright: ignore
        if cut == FEATURES:
            return x_btd
        attend = jax.tree.map(lambda x: x[0], frozen["blocks"]["attend"])
        x_btd = jax.lax.optimization_barrier(x_btd)
        return Attend(self.shape, self.dtype).apply({"params": attend}, x_btd, mask_bt)  # pyright: ignore

    @property
    def whole(self) -> Trunk:
        """The checkpoint's encoder, without experts."""
        plain = self.shape._replace(lora=None)
        return Trunk(plain, plain.layers, plain.vocab_size, False, jnp.float32)

    @nn.nowrap
    def cut(self, params: dict) -> tuple[dict, dict]:
        """Returns the parameters of the trunk below the mixtures, and of the layers that become mixtures."""
        first = self.shape.layers - self.num_layers
        below, above = (
            jax.tree.map(part, params["dense"]) for part in (lambda x: x[:first], lambda x: x[first:])
        )
        trunk = {name: value for name, value in params.items() if name != "dense"}
        return trunk | ({"dense": below} if first else {}), above

    @nn.nowrap
    def inputs(self, params: dict, tokens_bt: AnyArray) -> tuple[Array, Array]:
        """Returns what enters the first layer with experts [B, T, D], and their networks [L, B, T, D].

        Of the dense model.
        """
        return run_dense(self, params, tokens_bt)

    @nn.nowrap
    def run_above(self, params: dict, networks: Network, x_btd: Array, mask_bt: Array) -> tuple[Array, Array]:
        """Returns the states, and what the networks read [L, B, T, D], of dense networks [L, ...]."""
        _, stack = self.cut(params)
        bias = stack["network_out"]["bias"]
        stack = stack | {"network_in": {"kernel": networks.in_df, "bias": networks.bias_f}}
        stack |= {"network_out": {"kernel": networks.out_fd, "bias": bias}}
        blocks = nn.scan(
            DenseBlock, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=nn.broadcast, length=self.num_layers,  # pyright: ignore[reportArgumentType]
        )(self.shape._replace(lora=None), False, jnp.float32)  # fmt: skip
        return blocks.apply({"params": stack}, x_btd, mask_bt)  # pyright: ignore[reportReturnType]

    @nn.nowrap
    def network_loss(self, params: dict, networks: Network, x_btd: Array, tokens_bt: Array) -> Array:
        """Returns `contrastive_loss` of dense networks [L, ...], from what enters their first layer."""
        mask_bt = tokens_bt != PAD_ID
        return contrastive_loss(self.run_above(params, networks, x_btd, mask_bt)[0], mask_bt)

    @nn.nowrap
    def mixture_loss(
        self, params: dict, mixtures: Mixture, x_btd: Array, tokens_bt: Array, capacity_factor: float
    ) -> tuple[Array, Array]:
        """Returns `contrastive_loss` of mixtures [L, ...] by this module's forward pass, and balance."""
        plain = self.clone(
            sizes=self.sizes._replace(num_outputs=0), shape=self.shape._replace(lora=None),
            dtype=jnp.float32, eval_capacity_factor=capacity_factor,
        )  # fmt: skip
        batch = {"tokens": tokens_bt, FEATURES: x_btd}
        out = plain.apply({"params": self.assemble(params, mixtures)}, batch, None, False)
        assert isinstance(out, ModelOutput)
        return contrastive_loss(out.output, tokens_bt != PAD_ID), jnp.mean(out.routing.balance)

    @nn.nowrap
    def networks(self, params: dict) -> list[Network]:
        """Returns the dense networks of the layers with experts."""
        stack = params["dense"]
        return [
            Network(
                stack["network_in"]["kernel"][i],
                stack["network_out"]["kernel"][i],
                stack["network_in"]["bias"][i],
            )
            for i in range(self.shape.layers - self.num_layers, self.shape.layers)
        ]

    @nn.nowrap
    def assemble(self, params: dict, mixtures: Mixture) -> dict:
        """Returns this module's parameters, without the head: a dense model's, with mixtures [L, ...]."""
        trunk, above = self.cut(params)
        blocks = {name: above[name] for name in ("attend", "norm_network")}
        blocks |= {"network_bias": above["network_out"]["bias"]}
        blocks |= {"router": {"kernel": mixtures.router_de, "bias": mixtures.router_e}}
        return {
            "trunk": trunk, "blocks": blocks, "experts": mixtures.experts.arrays(),
        }  # fmt: skip

    @property
    def top_k(self) -> int:
        return self.rule.top_k

    @property
    def width(self) -> int:
        return self.shape.width

    def mask(self, batch: dict[str, Array]) -> Bool[Array, "batch tokens"]:
        """Says which tokens of a batch are real."""
        return batch["tokens"] != PAD_ID

    @nn.compact
    def __call__(
        self, batch: dict[str, Array], budget: Budget | None = None, training: bool = True
    ) -> ModelOutput:
        """Returns logits [B, classes], the tape, the permits and the routing.

        Without classes (`sizes.num_outputs` 0) the output is the states [B, T, D].
        """
        s, mask_bt = self.shape, self.mask(batch)
        if ATTENDED in batch:
            x_btd = batch[ATTENDED]
        elif FEATURES in batch:
            x_btd = batch[FEATURES]
        else:
            dense = s.layers - self.num_layers
            trunk = Trunk(s, dense, self.sizes.vocab_size, self.remat, self.dtype, name="trunk")
            x_btd, _ = trunk(batch["tokens"], mask_bt)
        x_btd = jax.lax.optimization_barrier(x_btd)  # cached or not, what follows is compiled alike
        if budget is None:
            sizes = (self.num_layers, self.num_experts, s.width, self.hidden)
            budget = open_budget(self.param("experts", init_experts, *sizes), self.num_experts)
        factor = self.capacity_factor if training else self.eval_capacity_factor
        new = self.is_initializing()
        mixtures = nn.map_variables(Mixtures, "params", cut_first, stack_first, init=new, mutable=new)
        block = (s, self.num_experts, self.rule, factor, self.remat, self.dtype, self.expert)
        blocks = mixtures(block, ATTENDED in batch, name="blocks")
        carry, (permit, routing) = blocks((x_btd, budget.tape), mask_bt, budget.experts, budget.layers)
        output = carry[0]
        if self.sizes.num_outputs:
            output = Head(self.sizes.num_outputs, name="head")(output, mask_bt)
        return ModelOutput(output, carry[1], permit, routing)


@functools.partial(jax.jit, static_argnums=0)
def run_dense(module: Encoder, params: dict, tokens_bt: AnyArray) -> tuple[Array, Array]:
    """Returns what enters the first layer with experts, and the networks of all of them, see `inputs`."""
    s, mask_bt, networks = module.shape, tokens_bt != PAD_ID, module.networks(params)
    trunk = Trunk(s._replace(lora=None), s.layers - module.num_layers, s.vocab_size, False, jnp.float32)
    x_btd: Any = trunk.apply({"params": module.cut(params)[0]}, tokens_bt, mask_bt)[0]  # pyright: ignore
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *networks)
    return x_btd, module.run_above(params, stacked, x_btd, mask_bt)[1]


@families.register("bert")
def bert(config: ConfigDict, sizes: ModelSizes) -> Encoder:
    """Returns the encoder of a config's section `model`; width, heads and hidden units are the checkpoint's.

    Raises:
      InputError: no checkpoint, more mixtures than it has layers, experts that its hidden units cannot be
        cut into, or texts longer than its positions.
    """
    shape = read_encoder_sizes(str(find_source(config.source)))._replace(lora=lora_rule(config))
    if sizes.seq_len > shape.positions:
        raise InputError("data.seq_len", sizes.seq_len, f"above the checkpoint's {shape.positions} positions",
                         "use shorter passages")  # fmt: skip
    hidden, scale = expert_size(config, shape.layers, shape.hidden)
    return Encoder(
        sizes, shape, config.num_layers, config.num_experts, hidden,
        RouterRule(config.top_k, renormalise=True, scale=scale),
        config.capacity_factor, config.eval_capacity_factor, PRECISIONS[config.precision], config.remat,
    )  # fmt: skip
