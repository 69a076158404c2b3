"""What distinguishes the decoders of the Hugging Face hub from each other, read off their config.json."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hfedmoe_jax.models.config_fields import MOST, ConfigFields
from hfedmoe_jax.models.lora import LoraRule
from hfedmoe_jax.models.routing import RouterRule


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


def read_sizes(config: Mapping[str, Any], source: str = "config.json") -> DecoderSizes:
    """Returns the sizes of a decoder.

    Args:
      config: the content of a config.json of transformers 4 or 5.
      source: directory of the checkpoint, for errors.

    Raises:
      InputError: another family, a field that is missing or out of range, or a variant that is not computed.
    """
    fields, family = ConfigFields(config, source), config.get("model_type")
    if family not in MIXTURES + DENSE:
        fields.refuse(f"model_type={family!r}", f"model.family=decoder reads {', '.join(MIXTURES + DENSE)}")
    fields.refuse_quantised()
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    layers, dense = fields.whole("num_hidden_layers"), family in DENSE
    # transformers writes intermediate_size for the experts of Mixtral and OLMoE.
    expert_hidden = 0 if dense else fields.whole("moe_intermediate_size", "intermediate_size")
    head_size = max(1, width // heads)
    if family in ("mixtral", "qwen3_moe", "llama"):
        head_size = fields.whole("head_dim", default=head_size)
    latent = None
    if family == "deepseek_v2":
        rope = fields.whole("qk_rope_head_dim")
        latent = Latent(
            fields.whole("q_lora_rank", default=0, low=0), fields.whole("kv_lora_rank"),
            fields.whole("qk_nope_head_dim"), fields.whole("v_head_dim"),
        )  # fmt: skip
        head_size = latent.plain + rope
    elif "head_dim" not in config and width % heads:
        fields.refuse(f"num_attention_heads={heads}, which does not divide hidden_size={width}")
    key_heads = fields.whole("num_key_value_heads", default=heads)
    if heads % key_heads:
        fields.refuse(f"num_key_value_heads={key_heads}, which does not divide num_attention_heads={heads}")
    deepseek = family in ("deepseek_v2", "deepseek")
    below = fields.whole("first_k_dense_replace", default=0, low=0) if deepseek else 0
    if below >= layers:
        fields.refuse(f"first_k_dense_replace={below}, which leaves no experts of {layers} layers")
    num_experts = 0 if dense else fields.whole("num_local_experts", "num_experts", "n_routed_experts")
    bias = fields.flag("attention_bias")
    sizes = DecoderSizes(
        family=family,
        vocab_size=fields.whole("vocab_size"),
        positions=fields.whole("max_position_embeddings"),
        width=width,
        num_layers=layers,
        dense_layers=layers if dense else below,
        num_heads=heads,
        num_key_heads=key_heads,
        head_size=head_size,
        hidden=fields.whole("intermediate_size", default=None if dense or below else 0, low=0),
        num_experts=num_experts,
        expert_hidden=expert_hidden,
        shared_hidden=_shared_hidden(family, fields, expert_hidden),
        shared_gate=family == "qwen2_moe",
        router=RouterRule(1) if dense else _router(family, fields, num_experts),
        router_bias=False,
        rotary=_rotary(fields, family, rope if latent else head_size),
        latent=latent,
        query_bias=fields.flag("qkv_bias", True) if family == "qwen2_moe" else bias,
        output_bias=family != "qwen2_moe" and bias,
        norm_heads={"olmoe": "all", "qwen3_moe": "head"}.get(family, ""),
        clip=fields.number("clip_qkv", 0.0),
        epsilon=fields.number("rms_norm_eps"),
        tied=fields.flag("tie_word_embeddings"),
    )
    _refuse_variants(fields, sizes)
    return sizes


def _shared_hidden(family: str, fields: ConfigFields, expert_hidden: int) -> int:
    if family == "qwen2_moe":
        return fields.whole("shared_expert_intermediate_size")
    if family in ("deepseek_v2", "deepseek"):
        return expert_hidden * fields.whole("n_shared_experts", default=0, low=0)
    return 0


def _router(family: str, fields: ConfigFields, num_experts: int) -> RouterRule:
    top_k = fields.whole("num_experts_per_tok")
    deepseek = family in ("deepseek_v2", "deepseek")
    balance, groups, top_groups = "model", 1, 1
    if deepseek:
        balance = "text" if fields.flag("seq_aux", True) else "layer"
        fields.only("scoring_func", "softmax")
        if fields.only("topk_method", "greedy", "group_limited_greedy") != "greedy":
            groups, top_groups = fields.whole("n_group"), fields.whole("topk_group")
            if num_experts % groups or top_groups > groups:
                fields.refuse(f"n_group={groups} and topk_group={top_groups} of {num_experts} experts")
    if top_k > num_experts // groups * top_groups:
        fields.refuse(f"num_experts_per_tok={top_k}, more than the experts that a token can take")
    if family == "deepseek_v2":  # whose code in transformers never renormalises
        scale = fields.number("routed_scaling_factor", 1.0)
        return RouterRule(top_k, False, scale, groups, top_groups, balance=balance)
    renormalise = family == "mixtral" or fields.flag("norm_topk_prob")
    return RouterRule(top_k, renormalise, 1.0, groups, top_groups, balance=balance)


def _rotary(fields: ConfigFields, family: str, size: int) -> Rotary:
    # transformers 5 keeps both in one field, transformers 4 in two.
    scaling = fields.group("rope_parameters", "rope_scaling")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10_000.0, low=1.0), low=1.0)
    _, kind = scaling.value("rope_type", "type")
    if kind not in (None, "default", "yarn"):
        fields.refuse(f"rope_type {kind}", "only plain positions and YaRN can be computed")
    for part in (fields, scaling):
        if part.number("partial_rotary_factor", 1.0) != 1:
            fields.refuse("partial_rotary_factor", "only heads that turn whole can be computed")
    if size % 2:
        fields.refuse(f"heads of {size} numbers, which positions turn in pairs")
    yarn = None
    if kind == "yarn":
        original = scaling.whole("original_max_position_embeddings", default=0)
        yarn = (
            scaling.number("factor", low=1.0),
            float(original or fields.whole("max_position_embeddings")),
            scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0),
            scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0),
        )  # fmt: skip
    return Rotary(theta, size, family == "deepseek_v2", yarn)


def _refuse_variants(fields: ConfigFields, sizes: DecoderSizes) -> None:
    """Raises an InputError for what the module does not compute."""
    fields.only("hidden_act", "silu")
    fields.only("mlp_bias", False)
    fields.only("moe_layer_freq", 1)
    sparse = fields.whole("decoder_sparse_step", default=1)
    if sizes.num_experts and (sparse != 1 or fields.content.get("mlp_only_layers")):
        fields.refuse("dense layers between those of experts (decoder_sparse_step, mlp_only_layers)",
                      "use a model with experts in every layer after the first ones")  # fmt: skip
    window = fields.whole("sliding_window", default=0, low=0) or MOST
    in_use = fields.flag("use_sliding_window", not sizes.family.startswith("qwen"))
    kinds = fields.content.get("layer_types")
    if kinds is not None:
        in_use = kinds != ["full_attention"] * sizes.num_layers
    if in_use and (window < sizes.positions or kinds is not None):
        fields.refuse("sliding_window, or layer_types with other than full_attention",
                      "only attention to all earlier tokens can be computed")  # fmt: skip


def yarn_scale(factor: float, mscale: float) -> float:
    """Returns the factor of the attention's logits or of the turned heads at a longer context (YaRN, 3.4).

    >>> yarn_scale(1.0, 1.0)
    1.0
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
