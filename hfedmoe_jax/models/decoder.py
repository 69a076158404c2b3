"""Decoders with mixtures of experts (Mixtral, OLMoE, Qwen2/3-MoE, DeepSeek-V2, DeepSeekMoE), and Llama.

Pre-norm blocks: causal attention, then a network of gated units; in layers with experts a mixture of them,
with experts that serve every token where the family has such. The layers without experts come first. Which
family it is, `DecoderSizes` says.

Axes: B batch, T tokens, N = B * T, L layers with experts, E experts, D model, F hidden, S slots of an expert.
"""

import functools
import pathlib
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import Budget, Expert, open_budget
from hfedmoe_jax.models.decoder_blocks import INIT, DenseBlock, MixtureBlock, gated_expert, init_experts
from hfedmoe_jax.models.decoder_names import UNUSED, decoder_names
from hfedmoe_jax.models.decoder_sizes import DecoderSizes, read_sizes
from hfedmoe_jax.models.family import FEATURES, ModelOutput, ModelSizes, families
from hfedmoe_jax.models.lora import lora_rule
from hfedmoe_jax.models.losses import next_token_loss
from hfedmoe_jax.models.names import Name, is_stored, open_params, source_config
from hfedmoe_jax.models.precision import PRECISIONS
from hfedmoe_jax.models.routing import RouterRule, Routing, model_balance
from hfedmoe_jax.upcycling import Mixture, Network, expert_size

PAD_ID = 0
NEVER = -1e9  # logit of what is no token


def no_routing(num_tokens: int) -> Routing:
    """Returns the routing of a model without experts."""
    none, nobody = jnp.zeros((0, num_tokens, 0)), jnp.zeros((0, 0), jnp.int32)
    return Routing(none, none > 0, nobody, nobody, jnp.zeros(0, jnp.int32), jnp.zeros(0))


class Decoder(nn.Module):
    """Tokens to logits over the vocabulary, each from those up to it.

    Attributes:
      sizes: of the task. With an offset of 1, token t of batches and outputs is the checkpoint's t - 1.
      shape: sizes and variants.
      capacity_factor, eval_capacity_factor: slots of an expert over an even share of the tokens; the number
        of experts over top_k drops no token.
      dtype: that products are computed in.
      remat: compute attention again in the backward pass.
      expert: of all layers.
    """

    sizes: ModelSizes
    shape: DecoderSizes
    capacity_factor: float
    eval_capacity_factor: float
    dtype: Any = jnp.float32
    remat: bool = False
    expert: Expert = gated_expert

    table, output = None, "token"  # a tied head reads the table too

    @property
    def num_layers(self) -> int:
        """L, those with experts."""
        return self.shape.num_layers - self.shape.dense_layers

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    @property
    def top_k(self) -> int:
        return self.shape.router.top_k

    @property
    def width(self) -> int:
        return self.shape.width

    def mask(self, batch: dict[str, Array]) -> Bool[Array, "batch tokens"]:
        """Says which tokens of a batch are real; those of a text come first."""
        return batch["tokens"] != PAD_ID

    @nn.compact
    def __call__(
        self, batch: dict[str, Array], budget: Budget | None = None, training: bool = True
    ) -> ModelOutput:
        """Returns logits [B, T, vocabulary] in float32, the tape, the permits and the routing."""
        s, mask_bt = self.shape, self.mask(batch)
        table = self.param("embed", INIT, (s.vocab_size, s.width))
        if FEATURES in batch:
            x_btd = batch[FEATURES]
        else:
            x_btd = table[jnp.maximum(batch["tokens"] - self.sizes.offset, 0)].astype(self.dtype)
            if s.dense_layers:
                x_btd, _ = self.dense_stack("dense")(x_btd, mask_bt)
        x_btd = jax.lax.optimization_barrier(x_btd)  # cached or not, what follows is compiled alike
        tape, permit, routing = (), jnp.zeros((0, 0)), no_routing(mask_bt.size)
        if self.num_layers:
            if budget is None:
                sizes = (self.num_layers, s.num_experts, s.width, s.expert_hidden)
                budget = open_budget(self.param("experts", init_experts, *sizes), s.num_experts)
            factor = self.capacity_factor if training else self.eval_capacity_factor
            blocks = self.stack(MixtureBlock, self.num_layers, nn.broadcast, nn.broadcast, 0)(
                s, factor, self.remat, self.dtype, self.expert, name="blocks"
            )
            carry = (x_btd, budget.tape)
            (x_btd, tape), (permit, routing) = blocks(carry, mask_bt, budget.experts, budget.layers)
            if s.router.balance == "model":
                balance = model_balance(routing.gates, routing.own, mask_bt.reshape(-1))
                routing = routing._replace(balance=balance)
        x_btd = nn.RMSNorm(s.epsilon, dtype=self.dtype, name="norm")(x_btd)
        if s.tied:
            logits = x_btd @ table.T.astype(self.dtype)
        else:
            logits = nn.Dense(s.vocab_size, use_bias=False, dtype=self.dtype, name="lm_head")(x_btd)
        logits = logits.astype(jnp.float32)
        if self.sizes.offset:
            logits = jnp.pad(logits, [(0, 0), (0, 0), (self.sizes.offset, 0)], constant_values=NEVER)
        return ModelOutput(logits, tape, permit, routing)

    @nn.nowrap
    def dense_stack(self, name: str | None = None) -> Any:
        """Returns the layers without experts."""
        blocks = self.stack(DenseBlock, self.shape.dense_layers, nn.broadcast)
        return blocks(self.shape, self.remat, self.dtype, name=name)

    @nn.nowrap
    def features(self, frozen: dict, tokens_bt: AnyArray, cut: str) -> Array:
        """Returns what enters the first layer with experts [B, T, D], the only one of `trunk_cuts`."""
        x_btd = frozen["embed"][jnp.maximum(tokens_bt - self.sizes.offset, 0)].astype(self.dtype)
        x_btd, _ = self.dense_stack().apply({"params": frozen["dense"]}, x_btd, tokens_bt != PAD_ID)
        return x_btd

    @property
    def trunk_cuts(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Says behind which frozen parameters features can be cached, see `hfedmoe_jax.trunk`."""
        return ((FEATURES, ("embed", "dense")),) if self.shape.dense_layers else ()

    @nn.nowrap
    def names(self) -> list[Name]:
        """Returns how a checkpoint stores the parameters."""
        return decoder_names(self.shape)

    @nn.nowrap
    def read(self, directory: pathlib.Path) -> dict:
        """Returns the parameters of a checkpoint, read when they are placed."""
        known = self.sizes.vocab_size - self.sizes.offset
        if known > self.shape.vocab_size:  # many checkpoints have rows that no token uses
            problem = f"is of {self.shape.vocab_size:,} tokens, its tokenizer of {known:,}"
            raise InputError(
                "model.source", str(directory), problem, "use a directory with both of one model"
            )
        text = {"tokens": jnp.zeros((1, 2), jnp.int32)}
        plain = self.clone(shape=self.shape._replace(lora=None))
        shapes = jax.eval_shape(lambda key: plain.init(key, text)["params"], jax.random.key(0))
        unused = rf"{UNUSED}|^lm_head\.weight$" if self.shape.tied else UNUSED
        return open_params(directory, self.names(), shapes, unused=unused)

    @nn.nowrap
    def stack(self, block: Any, length: int, *in_axes: Any) -> Any:
        """Returns so many blocks, one after the other."""
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=in_axes,  # pyright: ignore[reportArgumentType]
            length=length,
        )


class UpcycledDecoder(Decoder):
    """A dense Llama whose last networks became mixtures (see `hfedmoe_jax.upcycling`).

    Attributes:
      dense: sizes of the checkpoint; `shape` has the mixtures.
    """

    dense: DecoderSizes = field(kw_only=True)

    text_parts, step_texts = 1, 8  # of the loss by which experts are made of a dense model
    names = None  # pyright: ignore[reportAssignmentType]  # the hub has no such architecture

    @property
    def rule(self) -> RouterRule:
        return self.shape.router

    @nn.nowrap
    def read(self, directory: pathlib.Path) -> dict:
        """Returns the parameters of the dense checkpoint, read when they are placed."""
        whole = Decoder(self.sizes, self.dense, 1.0, 1.0)
        return whole.read(directory)

    @nn.nowrap
    def networks(self, params: dict) -> list[Network]:
        """Returns the dense networks of the layers with experts."""
        _, above = self.cut(params["dense"])
        gate, up, down = (np.asarray(above["network"][part]["kernel"]) for part in ("gate", "up", "down"))
        return [Network(up[i], down[i], gate_df=gate[i]) for i in range(self.num_layers)]

    @nn.nowrap
    def inputs(self, params: dict, tokens_bt: AnyArray) -> tuple[Array, Array]:
        """Returns what enters the first layer with experts [B, T, D], and their networks [L, B, T, D].

        Of the dense model.
        """
        return run_dense(self, jax.tree.map(np.asarray, params, is_leaf=is_stored), tokens_bt)

    @nn.nowrap
    def network_loss(self, params: dict, networks: Network, x_btd: Array, tokens_bt: Array) -> Array:
        """Returns `next_token_loss` of dense networks [L, ...], from what enters their first layer."""
        stack = self.cut(params["dense"])[1]
        parts = dict(gate=networks.gate_df, up=networks.in_df, down=networks.out_fd)
        stack = stack | {"network": {name: {"kernel": part} for name, part in parts.items()}}
        plain = self.dense._replace(lora=None)
        blocks = self.stack(DenseBlock, self.num_layers, nn.broadcast)(plain, False, jnp.float32)
        x_btd, _ = blocks.apply({"params": stack}, x_btd, tokens_bt != PAD_ID)
        head = Decoder(self.sizes, plain._replace(num_layers=0, dense_layers=0), 1.0, 1.0)
        out = head.apply({"params": params}, {"tokens": tokens_bt, FEATURES: x_btd})
        return next_token_loss(out.output, tokens_bt)  # pyright: ignore[reportAttributeAccessIssue]

    @nn.nowrap
    def mixture_loss(
        self, params: dict, mixtures: Mixture, x_btd: Array, tokens_bt: Array, capacity_factor: float
    ) -> tuple[Array, Array]:
        """Returns `next_token_loss` of mixtures [L, ...] by this module's forward pass, and balance."""
        plain = self.clone(
            shape=self.shape._replace(lora=None), dtype=jnp.float32, eval_capacity_factor=capacity_factor
        )
        batch = {"tokens": tokens_bt, FEATURES: x_btd}
        out = plain.apply({"params": self.assemble(params, mixtures)}, batch, None, False)
        assert isinstance(out, ModelOutput)
        return next_token_loss(out.output, tokens_bt), jnp.mean(out.routing.balance)

    @nn.nowrap
    def cut(self, stack: dict) -> tuple[dict, dict]:
        """Returns the layers below the mixtures and those that become mixtures, of a stack of parameters."""
        first, end = self.shape.dense_layers, self.dense.num_layers

        def part(begin: int, end: int) -> dict:
            def of(x: Any) -> Any:
                return x.rows(begin, end) if is_stored(x) else x[begin:end]

            return jax.tree.map(of, stack, is_leaf=is_stored)

        return part(0, first), part(first, end)

    @nn.nowrap
    def assemble(self, params: dict, mixtures: Mixture) -> dict:
        """Returns this module's parameters: a dense model's, with mixtures [L, ...]."""
        below, above = self.cut(params["dense"])
        experts = mixtures.experts
        blocks = {"attend": above["attend"]}
        blocks |= {"router": {"kernel": mixtures.router_de, "bias": mixtures.router_e}}
        made = {"blocks": blocks}
        made |= {"experts": dict(gate_df=experts.gate_df, up_df=experts.in_df, down_fd=experts.out_fd)}
        rest = {name: tree for name, tree in params.items() if name != "dense"}
        return rest | ({"dense": below} if self.shape.dense_layers else {}) | made


@functools.partial(jax.jit, static_argnums=0)
def run_dense(module: UpcycledDecoder, params: dict, tokens_bt: AnyArray) -> tuple[Array, Array]:
    """Returns what enters the last L layers of a dense model [B, T, D], and their networks [L, B, T, D]."""
    mask_bt, plain = tokens_bt != PAD_ID, module.dense._replace(lora=None)
    x_btd = params["embed"][jnp.maximum(tokens_bt - module.sizes.offset, 0)]
    features_btd = inputs_lbtd = x_btd
    for stack in module.cut(params["dense"]):
        features_btd, length = x_btd, len(stack["network"]["up"]["kernel"])
        if length:
            blocks = module.stack(DenseBlock, length, nn.broadcast)(plain, False, jnp.float32)
            x_btd, inputs_lbtd = blocks.apply({"params": stack}, x_btd, mask_bt)
    return features_btd, inputs_lbtd


@families.register("decoder")
def decoder(config: ConfigDict, sizes: ModelSizes) -> Decoder:
    """Returns the decoder of `model.source`; all sizes are the checkpoint's, capacities the config's.

    Of a dense checkpoint the config says how many of the last layers become mixtures, of what and how.

    Raises:
      InputError: no checkpoint, one of a family or variant that is not supported, or mixtures that cannot be
        made of it.
    """
    shape = read_sizes(source_config(config.source), config.source)._replace(lora=lora_rule(config))
    if sizes.seq_len > shape.positions:
        problem = f"above the checkpoint's {shape.positions} positions"
        raise InputError("data.seq_len", sizes.seq_len, problem, "use at most that")
    settings = (
        config.capacity_factor,
        config.eval_capacity_factor,
        PRECISIONS[config.precision],
        config.remat,
    )
    if shape.dense_layers < shape.num_layers:
        return Decoder(sizes, shape, *settings)
    hidden, scale = expert_size(config, shape.num_layers, shape.hidden)
    upcycled = shape._replace(
        dense_layers=shape.num_layers - config.num_layers,
        num_experts=config.num_experts,
        expert_hidden=hidden,
        router=RouterRule(config.top_k, renormalise=True, scale=scale),
        router_bias=True,
    )
    return UpcycledDecoder(sizes, upcycled, *settings, dense=shape)
