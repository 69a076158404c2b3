"""Sizes of a BERT-like checkpoint, and the names of its tensors."""

from typing import Any, NamedTuple

from hfedmoe_jax.models.config_fields import ConfigFields
from hfedmoe_jax.models.lora import LoraRule
from hfedmoe_jax.models.names import Name, read_config

UNUSED = r"position_ids$|^(bert\.)?pooler\.|^cls\."
"""Tensors of a checkpoint that the classifier has no use for."""


class EncoderSizes(NamedTuple):
    """Sizes of a checkpoint, as its config.json has them.

    Attributes:
      layers, width, heads, hidden: of the dense encoder.
      vocab_size, positions, kinds: rows of its embedding tables.
      epsilon: of its norms.
      lora: adapters of attention's projections; None: without.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    vocab_size: int
    positions: int
    kinds: int
    epsilon: float
    lora: LoraRule | None = None


def read_encoder_sizes(directory: str) -> EncoderSizes:
    """Reads config.json of a directory.

    Raises:
      InputError: it is no BERT, or of a variant that is not supported.
    """
    content = read_config(directory)
    fields, kind = ConfigFields(content, directory), content.get("model_type")
    if kind != "bert":
        fields.refuse(f"model_type={kind!r}", "model.family=bert reads 'bert'")
    fields.refuse_quantised()
    fields.only("hidden_act", "gelu")
    fields.only("position_embedding_type", "absolute")
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if width % heads:
        fields.refuse(f"num_attention_heads={heads}, which does not divide hidden_size={width}")
    return EncoderSizes(
        fields.whole("num_hidden_layers"), width, heads, fields.whole("intermediate_size"),
        fields.whole("vocab_size"), fields.whole("max_position_embeddings"), fields.whole("type_vocab_size"),
        fields.number("layer_norm_eps", 1e-12),
    )  # fmt: skip


def encoder_names(stored: Any) -> list[Name]:
    """Returns the names of a whole dense `Trunk`.

    Args:
      stored: the checkpoint's tensors; those of a BertForSomething begin with "bert.".
    """
    root = "bert." if any(name.startswith("bert.") for name in stored) else ""
    names = [
        Name("embed", f"{root}embeddings.word_embeddings.weight"),
        Name("position", f"{root}embeddings.position_embeddings.weight"),
        Name("kind", f"{root}embeddings.token_type_embeddings.weight"),
        Name("norm_embed/scale", f"{root}embeddings.LayerNorm.weight"),
        Name("norm_embed/bias", f"{root}embeddings.LayerNorm.bias"),
    ]
    layer = f"{root}encoder.layer.{{layer}}."
    for path, tensor in {
        "attend/query": "attention.self.query", "attend/key": "attention.self.key",
        "attend/value": "attention.self.value", "attend/out": "attention.output.dense",
        "network_in": "intermediate.dense", "network_out": "output.dense",
    }.items():  # fmt: skip
        names.append(Name(f"dense/{path}/kernel", f"{layer}{tensor}.weight", transposed=True))
        names.append(Name(f"dense/{path}/bias", f"{layer}{tensor}.bias"))
    for path, tensor in {"attend/norm_attention": "attention.output", "norm_network": "output"}.items():
        names.append(Name(f"dense/{path}/scale", f"{layer}{tensor}.LayerNorm.weight"))
        names.append(Name(f"dense/{path}/bias", f"{layer}{tensor}.LayerNorm.bias"))
    return names
