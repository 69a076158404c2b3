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
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import Budget, Expert, open_budget
from hfedmoe_jax.models.encoder_blocks import (
    Attend,
    DenseBlock,
    Mixtures,
    Trunk,
    cut_first,
    gelu_expert,
    init_experts,
    stack_first,
)
from hfedmoe_jax.models.encoder_sizes import UNUSED, EncoderSizes, encoder_names, read_encoder_sizes
from hfedmoe_jax.models.family import ATTENDED, FEATURES, ModelOutput, ModelSizes, families
from hfedmoe_jax.models.lora import lora_rule
from hfedmoe_jax.models.losses import contrastive_loss
from hfedmoe_jax.models.names import import_params
from hfedmoe_jax.models.precision import PRECISIONS
from hfedmoe_jax.models.routing import RouterRule
from hfedmoe_jax.models.switch import Head
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.pretrained import find_source
from hfedmoe_jax.upcycling import Mixture, Network, expert_size

PAD_ID = 0


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
