"""The sizes of a Switch Transformer of the Hugging Face hub, read off its config.json."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hfedmoe_jax.models.config_fields import ConfigFields
from hfedmoe_jax.models.lora import LoraRule

FAMILY = "switch_transformers"


class StackSizes(NamedTuple):
    """A stack of layers, the encoder's or the decoder's.

    Attributes:
      layers: of it.
      step: of so many layers the second has experts; 1: all layers have.
      causal: whether tokens see those up to them only, and the encoder's output.
    """

    layers: int
    step: int
    causal: bool

    @property
    def mixtures(self) -> int:
        """Layers with experts."""
        return self.layers // self.step

    @property
    def place(self) -> int:
        """Which layer of each `step` has experts."""
        return 0 if self.step == 1 else 1

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts."""
        return tuple(range(self.place, self.layers, self.step))


class SwitchSizes(NamedTuple):
    """Sizes of an encoder-decoder.

    Attributes:
      vocab_size, width, heads, head_size: of both stacks.
      hidden: units of a dense layer's network, and of each expert.
      num_experts: of a layer that has some.
      text_slots: tokens of a text that an expert serves at most.
      encoder, decoder: see there.
      buckets, distance: of the relative positions (see `switch_t5_attention.position_buckets`).
      epsilon: of the norms.
      router_bias: whether routers have a bias.
      start: the token that the decoder begins with.
      lora: adapters of attention's projections; None: without.
    """

    vocab_size: int
    width: int
    heads: int
    head_size: int
    hidden: int
    num_experts: int
    text_slots: int
    encoder: StackSizes
    decoder: StackSizes
    buckets: int
    distance: int
    epsilon: float
    router_bias: bool
    start: int
    lora: LoraRule | None = None

    @property
    def mixtures(self) -> int:
        """Layers with experts, of both stacks."""
        return self.encoder.mixtures + self.decoder.mixtures


def read_switch_sizes(config: Mapping[str, Any], source: str = "config.json") -> SwitchSizes:
    """Returns the sizes of a Switch Transformer.

    Args:
      config: the content of a config.json of transformers 4 or 5.
      source: directory of the checkpoint, for errors.

    Raises:
      InputError: another family, a field that is missing or out of range, or a variant that is not computed.
    """
    fields, kind = ConfigFields(config, source), config.get("model_type")
    if kind != FAMILY:
        fields.refuse(f"model_type={kind!r}", f"model.family=switch_t5 reads {FAMILY!r}")
    fields.refuse_quantised()
    fields.only("dense_act_fn", "relu")
    fields.only("tie_word_embeddings", True)  # text, answer and head share a table
    layers = fields.whole("num_layers")
    of_encoder, of_decoder = (
        fields.whole(f"num_sparse_{stack}_layers", default=3, low=0) for stack in ("encoder", "decoder")
    )
    return SwitchSizes(
        vocab_size=fields.whole("vocab_size"),
        width=fields.whole("d_model"),
        heads=fields.whole("num_heads"),
        head_size=fields.whole("d_kv"),
        hidden=fields.whole("d_ff"),
        num_experts=fields.whole("num_experts"),
        text_slots=fields.whole("expert_capacity"),
        encoder=_stack(fields, layers, of_encoder, False),
        decoder=_stack(fields, fields.whole("num_decoder_layers", default=layers), of_decoder, True),
        buckets=fields.whole("relative_attention_num_buckets", default=32, low=4),
        distance=fields.whole("relative_attention_max_distance", default=128, low=4),
        epsilon=fields.number("layer_norm_epsilon", 1e-6),
        router_bias=fields.flag("router_bias"),
        start=fields.whole("decoder_start_token_id", default=0, low=0),
    )


def _stack(fields: ConfigFields, layers: int, mixtures: int, causal: bool) -> StackSizes:
    """Returns a stack with as many layers of experts; as transformers has it, one without is none."""
    step = layers // mixtures if mixtures else layers
    if not step or layers % step:
        problem = f"{mixtures} layers of experts among {layers} layers"
        fields.refuse(problem, "use a model with one in every so many")
    return StackSizes(layers, step, causal)
