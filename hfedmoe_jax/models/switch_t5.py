"""Switch Transformers of the Hugging Face hub: a T5 (arXiv 1910.10683) with experts (arXiv 2101.03961).

The encoder reads a text; the decoder is given an answer, and returns logits of each of its tokens. Both are
stacks of pre-norm layers, in which every so many have a mixture of experts in place of a network. Attention
has no scale, and a bias by the distance of two tokens that the layers of a stack share. A token's expert is
weighed by its gate, and serves no more than `SwitchSizes.text_slots` tokens of a text.

The layers with experts of the encoder come before those of the decoder wherever there is an axis L. As
their tokens are unlike, `mask` says of each layer which are real; the shorter of text and answer is padded.

Axes: B batch, T tokens of a stack, S tokens that are attended to, A tokens of an answer, C answers to choose
from, N = B * T, L layers with experts, E experts, D model, H heads, K width of a head.
"""

import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import Budget, Expert, LayerBudget, open_budget
from hfedmoe_jax.models.answers import Answers, token_log_probs
from hfedmoe_jax.models.family import ModelOutput, ModelSizes, families
from hfedmoe_jax.models.lora import lora_rule
from hfedmoe_jax.models.names import Name, open_params, source_config
from hfedmoe_jax.models.precision import PRECISIONS
from hfedmoe_jax.models.routing import RouterRule, Routing, route
from hfedmoe_jax.models.switch import init_experts, relu_expert
from hfedmoe_jax.models.switch_t5_attention import Around, Attend, position_buckets
from hfedmoe_jax.models.switch_t5_names import UNUSED, switch_t5_names
from hfedmoe_jax.models.switch_t5_sizes import StackSizes, SwitchSizes, read_switch_sizes

PAD_ID = 0
INIT = nn.initializers.normal(0.02)


class Router(NamedTuple):
    """The routers of all layers with experts.

    Attributes:
      kernel, bias: [L, D, E] and [L, E].
    """

    kernel: Float[Array, "*layers model experts"]
    bias: Float[Array, "*layers experts"]


class Routers(nn.Module):
    """Parameters of the routers of both stacks, in one array as those of the experts."""

    shape: SwitchSizes

    @nn.compact
    def __call__(self) -> Router:
        """Returns them."""
        s = self.shape
        kernel = self.param("kernel", INIT, (s.mixtures, s.width, s.num_experts))
        if not s.router_bias:
            return Router(kernel, jnp.zeros((s.mixtures, s.num_experts)))
        return Router(kernel, self.param("bias", nn.initializers.zeros, (s.mixtures, s.num_experts)))


class DenseLayer(nn.Module):
    """A layer without experts."""

    shape: SwitchSizes
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: Float[Array, "batch tokens model"], around: Around):
        """Returns the residual stream."""
        attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
        x_btd, h_btd = attend(self.shape, self.dtype, name="attend")(x_btd, around)
        hidden = nn.Dense(self.shape.hidden, use_bias=False, dtype=self.dtype, name="network_in")(h_btd)
        output = nn.Dense(self.shape.width, use_bias=False, dtype=self.dtype, name="network_out")
        return x_btd + output(jax.nn.relu(hidden))


class MixtureLayer(nn.Module):
    """A layer with experts."""

    shape: SwitchSizes
    capacity_factor: float
    remat: bool
    dtype: Any
    expert: Expert

    @nn.compact
    def __call__(self, x_btd, tape, around: Around, mask_bt, experts, layer: LayerBudget, router: Router):
        """Returns the residual stream, the tape, the permit and the routing."""
        s = self.shape
        attend = nn.remat(Attend, prevent_cse=False) if self.remat else Attend
        x_btd, h_btd = attend(s, self.dtype, name="attend")(x_btd, around)
        h_nd = h_btd.reshape(-1, s.width)
        logits = h_nd.astype(jnp.float32) @ router.kernel.astype(jnp.float32) + router.bias
        rule = RouterRule(1, text_slots=s.text_slots)
        y_nd, tape, permit, routing = route(
            logits, h_nd, mask_bt.reshape(-1), rule, self.capacity_factor, self.expert, experts, layer, tape,
            x_btd.shape[1],
        )  # fmt: skip
        return x_btd + y_nd.reshape(x_btd.shape), tape, permit, routing


class Period(nn.Module):
    """The layers from one with experts to the next."""

    shape: SwitchSizes
    stack: StackSizes
    capacity_factor: float
    remat: bool
    dtype: Any
    expert: Expert

    @nn.compact
    def __call__(self, carry, around, mask_bt, experts, layer: LayerBudget, router: Router):
        """Returns ((x, tape), (permit, routing)), the carry and the result of `nn.scan`."""
        (x_btd, tape), found = carry, None
        for place in range(self.stack.step):
            if place != self.stack.place:
                dense = DenseLayer(self.shape, self.remat, self.dtype, name=f"dense_{place}")
                x_btd = dense(x_btd, around)
                continue
            mixture = MixtureLayer(
                self.shape, self.capacity_factor, self.remat, self.dtype, self.expert, name="mixture"
            )
            x_btd, tape, *found = mixture(x_btd, tape, around, mask_bt, experts, layer, router)
        return (x_btd, tape), tuple(found or ())


class Stack(nn.Module):
    """The encoder or the decoder."""

    shape: SwitchSizes
    stack: StackSizes
    capacity_factor: float
    remat: bool
    dtype: Any
    expert: Expert

    @nn.compact
    def __call__(self, x_btd, mask_bt, memory, tape, experts, layers: LayerBudget, routers: Router):
        """Returns the output [B, T, D], the tape, and permit and routing of the layers with experts.

        Args:
          memory: the encoder's output and its real tokens [B, S]; None in the encoder.
          layers, routers: those of this stack.
        """
        s, length = self.shape, x_btd.shape[1]
        table = self.param("position", INIT, (s.buckets, s.heads))
        bucket = position_buckets(length, length, s.buckets, s.distance, self.stack.causal)
        seen = mask_bt[:, None]
        if self.stack.causal:
            seen = seen & jnp.tril(jnp.ones((length, length), bool))
        position = jnp.moveaxis(table[bucket].astype(jnp.float32), -1, 0)
        around = Around(position, seen, memory and (memory[0], memory[1][:, None]))
        periods = nn.scan(
            Period, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
            length=self.stack.mixtures,
        )(
            s, self.stack, self.capacity_factor, self.remat, self.dtype, self.expert, name="layers"
        )  # fmt: skip
        (x_btd, tape), (permit, routing) = periods((x_btd, tape), around, mask_bt, experts, layers, routers)
        return nn.RMSNorm(s.epsilon, dtype=self.dtype, name="norm")(x_btd), tape, permit, routing


class SwitchT5(nn.Module):
    """Text and answer to logits of the answer's tokens.

    In training the decoder is given the right answer. In evaluation it is given the others as well, for
    their likelihoods; the routing is that of the right one.

    Attributes:
      sizes: of the task.
      shape: of the checkpoint.
      capacity_factor, eval_capacity_factor: slots of an expert of the encoder over an even share of the
        tokens. Answers are short, and begin alike: no token of theirs is dropped but for `text_slots`.
      dtype: that products are computed in.
      remat: compute attention again in the backward pass.
      expert: of all layers.
    """

    sizes: ModelSizes
    shape: SwitchSizes
    capacity_factor: float
    eval_capacity_factor: float
    dtype: Any = jnp.float32
    remat: bool = False
    expert: Expert = relu_expert

    table, output, top_k = None, "answer", 1  # the head reads the table too

    @property
    def num_layers(self) -> int:
        """L, those of both stacks."""
        return self.shape.mixtures

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    @property
    def width(self) -> int:
        return self.shape.width

    def mask(self, batch: dict[str, Array]) -> Bool[Array, "layers batch tokens"]:
        """Says of each layer with experts which tokens are real: the text's, or the answer's."""
        text, answer = (batch[name] != PAD_ID for name in ("tokens", "answers"))
        length = max(text.shape[1], answer.shape[1])
        parts = [
            jnp.broadcast_to(pad_tokens(mask, length), (stack.mixtures, len(mask), length))
            for mask, stack in ((text, self.shape.encoder), (answer, self.shape.decoder))
        ]
        return jnp.concatenate(parts)

    @nn.compact
    def __call__(
        self, batch: dict[str, Array], budget: Budget | None = None, training: bool = True
    ) -> ModelOutput:
        """Returns `Answers`, the tape, the permits and the routing."""
        s = self.shape
        embed = self.param("embed", INIT, (s.vocab_size, s.width))
        if budget is None:
            sizes = (self.num_layers, s.num_experts, s.width, s.hidden)
            budget = open_budget(self.param("experts", init_experts, *sizes), s.num_experts)
        factor = self.capacity_factor if training else self.eval_capacity_factor
        common = (self.remat, self.dtype, self.expert)
        encoder = Stack(s, s.encoder, factor, *common, name="encoder")
        decoder = Stack(s, s.decoder, float(s.num_experts), *common, name="decoder")
        routers = Routers(s, name="router")()
        first, second = (
            jax.tree.map(lambda x, part=part: x[part], (budget.layers, routers))
            for part in (slice(s.encoder.mixtures), slice(s.encoder.mixtures, None))
        )
        text = batch["tokens"] != PAD_ID
        x_btd, tape, *of_encoder = encoder(
            embed[batch["tokens"]].astype(self.dtype), text, None, budget.tape, budget.experts, *first
        )

        def decode(decoder: Stack, answer_ba: Array, tape: Any):
            """Returns the logits of an answer's tokens, the tape, the permit and the routing."""
            before = jnp.pad(answer_ba[:, :-1], [(0, 0), (1, 0)], constant_values=s.start)
            y_bad, tape, *routed = decoder(
                embed[before].astype(self.dtype), answer_ba != PAD_ID, (x_btd, text), tape, budget.experts,
                *second,
            )  # fmt: skip
            logits = (y_bad * s.width**-0.5) @ embed.T.astype(self.dtype)
            return logits.astype(jnp.float32), tape, *routed

        logits, tape, *of_decoder = decode(decoder, batch["answers"], tape)
        choices = None
        if not training:

            def judge(decoder: Stack, carry: tuple, answer_ba: Array):
                logits, *_ = decode(decoder, answer_ba, budget.tape)
                return carry, jnp.sum(token_log_probs(logits, answer_ba), axis=-1)

            each = nn.scan(judge, variable_broadcast="params", split_rngs={"params": False}, out_axes=1)
            _, choices = each(decoder, (), batch["choices"].swapaxes(0, 1))
        permit, routing = (
            join(of_encoder[0], of_decoder[0]), join_routing(of_encoder[1], of_decoder[1], len(text))
        )  # fmt: skip
        return ModelOutput(Answers(logits, choices), tape, permit, routing)

    @nn.nowrap
    def names(self) -> list[Name]:
        """Returns how a checkpoint stores the parameters."""
        return switch_t5_names(self.shape)

    @nn.nowrap
    def read(self, directory: pathlib.Path) -> dict:
        """Returns the parameters of a checkpoint, read when they are placed."""
        if self.sizes.offset:
            problem = "has another token 0 than <pad>"
            raise InputError("model.source", str(directory), problem, "use a T5 whose token 0 is <pad>")
        if self.sizes.vocab_size > self.shape.vocab_size:  # checkpoints have rows that no token uses
            problem = f"is of {self.shape.vocab_size:,} tokens, its tokenizer of {self.sizes.vocab_size:,}"
            raise InputError(
                "model.source", str(directory), problem, "use a directory with both of one model"
            )
        tokens = jnp.zeros((1, 2), jnp.int32)
        example = {"tokens": tokens, "answers": tokens}
        plain = self.clone(shape=self.shape._replace(lora=None))
        shapes = jax.eval_shape(lambda key: plain.init(key, example)["params"], jax.random.key(0))
        return open_params(directory, self.names(), shapes, unused=UNUSED)


def pad_tokens(values: Array, length: int, axis: int = 1) -> Array:
    """Returns an array whose axis of tokens is filled up with zeros."""
    width = [(0, length - values.shape[axis]) if i == axis else (0, 0) for i in range(values.ndim)]
    return jnp.pad(values, width)


def join(encoder: Any, decoder: Any) -> Any:
    """Returns trees of arrays one after the other, by their first axis."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), encoder, decoder)


def join_routing(encoder: Routing, decoder: Routing, batch: int) -> Routing:
    """Returns the routing of both stacks, the shorter of text and answer padded."""
    lengths = [part.gates.shape[1] // batch for part in (encoder, decoder)]

    def padded(values: Array) -> Array:
        """Returns [L, B * T, E] with as many tokens as the longer one."""
        by_text = values.reshape(len(values), batch, -1, values.shape[-1])
        return pad_tokens(by_text, max(lengths), axis=2).reshape(len(values), -1, values.shape[-1])

    return join(*(
        part._replace(gates=padded(part.gates), own=padded(part.own)) for part in (encoder, decoder)
    ))  # fmt: skip


@families.register("switch_t5")
def switch_t5(config: ConfigDict, sizes: ModelSizes) -> SwitchT5:
    """Returns the Switch Transformer of `model.source`; sizes are the checkpoint's, capacities the config's.

    Raises:
      InputError: no checkpoint, or one of a family or variant that is not supported.
    """
    shape = read_switch_sizes(source_config(config.source), config.source)._replace(lora=lora_rule(config))
    return SwitchT5(
        sizes, shape, config.capacity_factor, config.eval_capacity_factor, PRECISIONS[config.precision],
        config.remat,
    )  # fmt: skip
