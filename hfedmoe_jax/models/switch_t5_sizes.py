"""The sizes of a Switch Transformer of the Hugging Face hub, read off its config.json."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.lora import LoraRule

FAMILY = "switch_transformers"
FIELDS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "num_experts", "expert_capacity",
)  # fmt: skip


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
      buckets, distance: of the relative positions (see `switch_t5.position_buckets`).
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


def read_switch_sizes(config: Mapping[str, Any]) -> SwitchSizes:
    """Returns the sizes of a Switch Transformer.

    Args:
      config: the content of a config.json of transformers 4 or 5.

    Raises:
      InputError: another family, a field that is missing, or a variant that is not supported.
    """
    kind, act = config.get("model_type"), config.get("dense_act_fn", "relu")
    if kind != FAMILY:
        problem = f"is no Switch Transformer: model.family=switch_t5 reads {FAMILY!r}"
        raise InputError("config.json", kind, problem, "use the family that the checkpoint is of")
    missing = [name for name in FIELDS if not isinstance(config.get(name), int)]
    if missing:
        remedy = "use the directory as it was published"
        raise InputError("config.json", ", ".join(missing), "is missing", remedy)
    if act != "relu":
        raise InputError("config.json", f"dense_act_fn {act}", "is not supported", "use relu")
    if not config.get("tie_word_embeddings", True):
        problem = "is not supported: text, answer and head share a table"
        raise InputError("config.json", "tie_word_embeddings false", problem, "use a model that ties them")
    layers = config["num_layers"]
    return SwitchSizes(
        vocab_size=config["vocab_size"],
        width=config["d_model"],
        heads=config["num_heads"],
        head_size=config["d_kv"],
        hidden=config["d_ff"],
        num_experts=config["num_experts"],
        text_slots=config["expert_capacity"],
        encoder=_stack(layers, config.get("num_sparse_encoder_layers", 3), False),
        decoder=_stack(config.get("num_decoder_layers") or layers, config.get("num_sparse_decoder_layers", 3),
                       True),
        buckets=config.get("relative_attention_num_buckets", 32),
        distance=config.get("relative_attention_max_distance", 128),
        epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        router_bias=bool(config.get("router_bias", False)),
        start=config.get("decoder_start_token_id") or 0,
    )  # fmt: skip


def _stack(layers: int, mixtures: int, causal: bool) -> StackSizes:
    """Returns a stack with as many layers of experts; as transformers has it, one without is none."""
    step = layers // mixtures if mixtures else layers
    if not step or layers % step:
        problem = f"of experts among {layers} layers are not supported"
        remedy = "use a model with one in every so many"
        raise InputError("config.json", f"{mixtures} layers", problem, remedy)
    return StackSizes(layers, step, causal)
