"""What distinguishes the decoders of the Hugging Face hub from each other, read off their config.json."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.lora import LoraRule
from hfedmoe_jax.models.routing import RouterRule

_UNUSED = object()


class Rotary(NamedTuple):
    """Rotary positions (arXiv 2104.09864).

    Attributes:
      theta: base of the wavelengths.
      size: of the part of a head that is turned.
      interleaved: pairs are neighbours, not the two halves of a head.
      yarn: (factor, original positions, beta_fast, beta_slow, mscale, mscale_all_dim) of YaRN
        (arXiv 2309.00071); None: plain.
    """

    theta: float
    size: int
    interleaved: bool = False
    yarn: tuple[float, float, float, float, float, float] | None = None


class Latent(NamedTuple):
    """Sizes of multi-head latent attention (arXiv 2405.04434).

    Attributes:
      query_rank: of the queries' projection; 0: a single matrix.
      key_rank: of what keys and values share.
      plain, value: width of a head's part without positions, and of its values.
    """

    query_rank: int
    key_rank: int
    plain: int
    value: int


class DecoderSizes(NamedTuple):
    """Sizes and variants of a decoder.

    Attributes:
      family: `model_type` of the hub.
      vocab_size, positions, width, num_layers: of the model.
      dense_layers: the first layers, which have no experts; all of them in a dense model.
      num_heads, num_key_heads, head_size: of attention.
      hidden: units of a dense layer's network.
      num_experts, expert_hidden: experts of a layer, and units of each; 0 in a dense model.
      shared_hidden: units of the experts that serve every token, together; 0: none.
      shared_gate: whether a sigmoid of the token scales them.
      router: how tokens are sent to experts.
      router_bias: whether its logits have a bias.
      rotary: see there.
      latent: see there; None: keys and values have heads of their own.
      query_bias, output_bias: whether attention's projections have a bias.
      norm_heads: whether queries and keys are normalised: "", each "head", or "all" heads together.
      clip: limit of queries, keys and values; 0: none.
      epsilon: of the norms.
      tied: whether the embedding table is the head's matrix too.
      lora: adapters of attention's projections; None: without.
    """

    family: str
    vocab_size: int
    positions: int
    width: int
    num_layers: int
    dense_layers: int
    num_heads: int
    num_key_heads: int
    head_size: int
    hidden: int
    num_experts: int
    expert_hidden: int
    shared_hidden: int
    shared_gate: bool
    router: RouterRule
    router_bias: bool
    rotary: Rotary
    latent: Latent | None
    query_bias: bool
    output_bias: bool
    norm_heads: str
    clip: float
    epsilon: float
    tied: bool
    lora: LoraRule | None = None


MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek")
DENSE = ("llama",)


def read_sizes(config: Mapping[str, Any]) -> DecoderSizes:
    """Returns the sizes of a decoder.

    Args:
      config: the content of a config.json of transformers 4 or 5.

    Raises:
      InputError: another family, a field that is missing, or a variant that is not supported.
    """
    family = config.get("model_type")
    if family not in MIXTURES + DENSE:
        known = ", ".join(MIXTURES + DENSE)
        raise InputError("config.json", family, "is no model_type of a known decoder", f"use one of {known}")

    def field(*names: str, default: Any = _UNUSED) -> Any:
        for name in names:
            if config.get(name) is not None:
                return config[name]
        if default is _UNUSED:
            raise InputError("config.json", names[0], "is missing", "use the directory as it was published")
        return default

    width, heads, layers = field("hidden_size"), field("num_attention_heads"), field("num_hidden_layers")
    dense = family in DENSE
    # transformers writes intermediate_size for the experts of Mixtral and OLMoE.
    expert_hidden = 0 if dense else field("moe_intermediate_size", "intermediate_size")
    head_size = field("head_dim", default=width // heads)
    if family not in ("mixtral", "qwen3_moe", "llama"):
        head_size = width // heads
    latent = None
    if family == "deepseek_v2":
        rope = field("qk_rope_head_dim")
        latent = Latent(
            field("q_lora_rank", default=0), field("kv_lora_rank"), field("qk_nope_head_dim"),
            field("v_head_dim"),
        )  # fmt: skip
        head_size = latent.plain + rope
    deepseek = family in ("deepseek_v2", "deepseek")
    sizes = DecoderSizes(
        family=family,
        vocab_size=field("vocab_size"),
        positions=field("max_position_embeddings"),
        width=width,
        num_layers=layers,
        dense_layers=layers if dense else field("first_k_dense_replace", default=0) if deepseek else 0,
        num_heads=heads,
        num_key_heads=field("num_key_value_heads", default=heads),
        head_size=head_size,
        hidden=field("intermediate_size", default=0),
        num_experts=0 if dense else field("num_local_experts", "num_experts", "n_routed_experts"),
        expert_hidden=expert_hidden,
        shared_hidden=_shared_hidden(family, field, expert_hidden),
        shared_gate=family == "qwen2_moe",
        router=RouterRule(1) if dense else _router(family, field),
        router_bias=False,
        rotary=_rotary(config, family, field("qk_rope_head_dim") if latent else head_size),
        latent=latent,
        query_bias=bool(field("qkv_bias", default=True))
        if family == "qwen2_moe"
        else bool(field("attention_bias", default=False)),
        output_bias=family != "qwen2_moe" and bool(field("attention_bias", default=False)),
        norm_heads={"olmoe": "all", "qwen3_moe": "head"}.get(family, ""),
        clip=float(field("clip_qkv", default=0.0)),
        epsilon=float(field("rms_norm_eps")),
        tied=bool(field("tie_word_embeddings", default=False)),
    )
    _refuse_variants(config, sizes)
    return sizes


def _shared_hidden(family: str, field: Any, expert_hidden: int) -> int:
    if family == "qwen2_moe":
        return field("shared_expert_intermediate_size")
    if family in ("deepseek_v2", "deepseek"):
        return expert_hidden * field("n_shared_experts", default=0)
    return 0


def _router(family: str, field: Any) -> RouterRule:
    top_k = field("num_experts_per_tok")
    balance = "model"
    if family in ("deepseek_v2", "deepseek"):
        balance = "text" if field("seq_aux", default=True) else "layer"
    if family == "deepseek_v2":
        limited = field("topk_method", default="greedy") == "group_limited_greedy"
        groups = (field("n_group"), field("topk_group")) if limited else (1, 1)
        scale = float(field("routed_scaling_factor", default=1.0))
        return RouterRule(top_k, False, scale, *groups, balance=balance)
    renormalise = family == "mixtral" or bool(field("norm_topk_prob", default=False))
    return RouterRule(top_k, renormalise, balance=balance)


def _rotary(config: Mapping[str, Any], family: str, size: int) -> Rotary:
    # transformers 5 keeps both in one field, transformers 4 in two.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    yarn = None
    if kind == "yarn":
        factor = float(scaling["factor"])
        original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        yarn = (
            factor, float(original),
            float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1),
            float(scaling.get("mscale") or 0), float(scaling.get("mscale_all_dim") or 0),
        )  # fmt: skip
    elif kind != "default":
        raise InputError(
            "config.json", f"rope_type {kind}", "is not supported", "use plain positions or YaRN"
        )
    return Rotary(float(theta), size, family == "deepseek_v2", yarn)


def _refuse_variants(config: Mapping[str, Any], sizes: DecoderSizes) -> None:
    """Raises an InputError for what the module does not compute."""
    if config.get("hidden_act", "silu") != "silu":
        raise InputError("config.json", f"hidden_act {config['hidden_act']}", "is not supported", "use silu")
    if config.get("mlp_bias"):
        raise InputError("config.json", "mlp_bias", "is not supported", "use a model without it")
    sparse = config.get("decoder_sparse_step", 1) or 1
    if sizes.num_experts and (sparse != 1 or config.get("mlp_only_layers")):
        raise InputError("config.json", "decoder_sparse_step or mlp_only_layers",
                         "dense layers between those of experts are not supported",
                         "use a model with experts in every layer after the first ones")  # fmt: skip
    if (config.get("moe_layer_freq", 1) or 1) != 1:
        raise InputError("config.json", "moe_layer_freq", "is not supported", "use 1")


def yarn_scale(factor: float, mscale: float) -> float:
    """Returns the factor of the attention's logits or of the turned heads at a longer context (YaRN, 3.4).

    >>> yarn_scale(1.0, 1.0)
    1.0
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
