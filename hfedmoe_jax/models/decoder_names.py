"""The tensors of Hugging Face decoders, by the parameters of `decoder.Decoder`."""

from hfedmoe_jax.models.decoder_sizes import DecoderSizes
from hfedmoe_jax.models.names import Name

UNUSED = r"rotary_emb\.inv_freq$"
"""Tensors that follow from config.json."""

_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def decoder_names(sizes: DecoderSizes) -> list[Name]:
    """Returns the names of a decoder's parameters: as published, then with experts fused (transformers 5)."""
    names = [Name("embed", "model.embed_tokens.weight"), Name("norm/scale", "model.norm.weight")]
    if not sizes.tied:
        names.append(Name("lm_head/kernel", "lm_head.weight", transposed=True))
    if sizes.dense_layers:
        names += _block("dense", sizes, 0)
        names += [
            Name(f"dense/network/{part}/kernel", f"model.layers.{{layer}}.mlp.{part}_proj.weight", True)
            for part in ("gate", "up", "down")
        ]
    if sizes.dense_layers < sizes.num_layers:
        names += _block("blocks", sizes, sizes.dense_layers)
        names += _mixture(sizes)
    return names


def _block(stack: str, sizes: DecoderSizes, first: int) -> list[Name]:
    layer, names = "model.layers.{layer}.", []

    def add(path: str, tensor: str, transposed: bool = False) -> None:
        names.append(Name(f"{stack}/attend/{path}", layer + tensor, transposed, first))

    def project(path: str, tensor: str, bias: bool) -> None:
        add(f"attention/{path}/kernel", f"self_attn.{tensor}.weight", True)
        if bias:
            add(f"attention/{path}/bias", f"self_attn.{tensor}.bias")

    add("norm_attention/scale", "input_layernorm.weight")
    add("norm_network/scale", "post_attention_layernorm.weight")
    project("out", "o_proj", sizes.output_bias)
    if sizes.latent is None:
        for path in ("query", "key", "value"):
            project(path, f"{path[0]}_proj", sizes.query_bias)
        for path in ("query", "key") if sizes.norm_heads else ():
            add(f"attention/norm_{path}/scale", f"self_attn.{path[0]}_norm.weight")
        return names
    project("key_down", "kv_a_proj_with_mqa", sizes.query_bias)
    project("key_value", "kv_b_proj", False)
    add("attention/norm_key/scale", "self_attn.kv_a_layernorm.weight")
    if sizes.latent.query_rank:
        project("query_down", "q_a_proj", sizes.query_bias)
        project("query", "q_b_proj", False)
        add("attention/norm_query/scale", "self_attn.q_a_layernorm.weight")
    else:
        project("query", "q_proj", False)
    return names


def _mixture(sizes: DecoderSizes) -> list[Name]:
    first = sizes.dense_layers
    mixtral = sizes.family == "mixtral"
    mlp = "model.layers.{layer}." + ("block_sparse_moe." if mixtral else "mlp.")
    names = [Name("blocks/router/kernel", f"{mlp}gate.weight", True, first)]
    if mixtral:  # transformers 5 renamed the block
        names.append(Name("blocks/router/kernel", "model.layers.{layer}.mlp.gate.weight", True, first))
    fused = "model.layers.{layer}.mlp.experts."
    for part, axes in (("gate", "df"), ("up", "df"), ("down", "fd")):
        stored = _MIXTRAL[part] if mixtral else f"{part}_proj"
        path = f"experts/{part}_{axes}"
        names.append(Name(path, f"{mlp}experts.{{expert}}.{stored}.weight", True, first))
        if sizes.family == "deepseek":  # not in transformers
            continue
        if part == "down":
            names.append(Name(path, f"{fused}down_proj", True, first))
        else:
            names.append(Name(path, f"{fused}gate_up_proj", True, first, (("gate", "up").index(part), 2)))
    if sizes.shared_hidden:
        shared = "shared_expert" if sizes.family == "qwen2_moe" else "shared_experts"
        names += [
            Name(f"blocks/shared/{part}/kernel", f"{mlp}{shared}.{part}_proj.weight", True, first)
            for part in ("gate", "up", "down")
        ]
    if sizes.shared_gate:
        names.append(Name("blocks/shared_gate/kernel", f"{mlp}shared_expert_gate.weight", True, first))
    return names
