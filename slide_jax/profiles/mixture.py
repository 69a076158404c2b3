"""A mixture-of-experts classifier of texts of which a user downloads only some experts.

HFedMoE (arXiv 2601.00583) trains a client on the experts S_c that it chose; provisioning the same client
sends it the shared parameters, every router and those experts: a model with smaller layers.
"""

import numbers
from collections.abc import Sequence

from slide_jax.errors import InputError
from slide_jax.profiles.layers import (
    Layer,
    Operation,
    Profile,
    attention_products,
    dense,
    layer,
    norm,
    positive_integers,
    table,
)


def expert_block(
    name: str, width: int, hidden: int, num_experts: int, top_k: int, experts_kept: int, tokens: int
) -> Layer:
    """Returns self-attention and a mixture of experts without biases, each behind a layer norm.

    Args:
      name: of the layer.
      width: of the residual stream.
      hidden: units of an expert.
      num_experts: that the router chooses from.
      top_k: experts of a token; no more of them run than are kept, and dropped tokens are not deducted.
      experts_kept: experts that are downloaded.
      tokens: of the sequence.
    """
    weights_per_expert = 2 * width * hidden
    assignments = tokens * min(top_k, experts_kept)
    return layer(
        name,
        norm(width),
        dense(width, 3 * width, tokens),
        attention_products(tokens, width),
        dense(width, width, tokens),
        norm(width),
        dense(width, num_experts, tokens, bias=False),
        Operation(experts_kept * weights_per_expert, assignments * weights_per_expert),
    )


def switch_classifier(
    *,
    num_classes: int,
    vocab_size: int,
    seq_len: int,
    num_layers: int,
    width: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    accuracy: float,
    experts_kept: int | Sequence[int] | None = None,
    task: str = "text_classification",
) -> Profile:
    """Returns a Switch-style Transformer encoder with a classification head (arXiv 2101.03961).

    Args:
      num_classes, vocab_size, seq_len: sizes of the task; a text is `seq_len` tokens, padded or not.
      num_layers, width, hidden, num_experts, top_k: sizes of the model.
      accuracy: measured with the experts kept; nothing is published for a model of one's own.
      experts_kept: experts of each layer that are downloaded, one number or one a layer; None: all.
      task: what its accuracy is of.

    Raises:
      InputError: a size below 1, or more experts kept or chosen than there are.
    """
    num_classes, vocab_size, seq_len, num_layers, width, hidden, num_experts, top_k = positive_integers(
        num_classes=num_classes,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_layers=num_layers,
        width=width,
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k,
    )
    if top_k > num_experts:
        raise InputError("top_k", top_k, f"above num_experts={num_experts}", "choose at most all experts")
    kept = _kept_per_layer(experts_kept, num_layers, num_experts)
    blocks = (
        expert_block(f"blocks.{index}", width, hidden, num_experts, top_k, kept[index], seq_len)
        for index in range(num_layers)
    )
    layers = (
        layer("embedding", table(vocab_size, width), table(seq_len, width)),
        *blocks,
        layer("head", norm(width), dense(width, num_classes)),  # reads the mean over the tokens
    )
    return Profile("switch_classifier", task, accuracy, layers)


def _kept_per_layer(experts_kept: int | Sequence[int] | None, num_layers: int, num_experts: int) -> list[int]:
    if experts_kept is None:
        return [num_experts] * num_layers
    if isinstance(experts_kept, int | numbers.Integral):  # the latter are NumPy's
        kept: list[int] = [experts_kept] * num_layers
    else:
        kept = list(experts_kept)
        if len(kept) != num_layers:
            raise InputError("experts_kept", kept, f"must be one number or {num_layers}", "give one a layer")
    for index, number in enumerate(kept):
        (kept[index],) = positive_integers(**{f"experts_kept[{index}]": number})
        if number > num_experts:
            raise InputError(
                f"experts_kept[{index}]", number, f"above num_experts={num_experts}", "keep at most all"
            )
    return kept
