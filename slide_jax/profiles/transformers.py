"""Transformers for images and for text: a unit is the embedding, a block or the final norm with the head.

The work of a language model is one forward pass over `sequence_length` tokens (the prefill), with logits at
every position: what scoring a text takes; a first token alone needs the head at the last position only.
The accuracy of the language models is HellaSwag (arXiv 1905.07830), zero-shot, as each one's source has it;
evaluation harnesses differ by a point or two.
"""

from slide_jax.errors import InputError
from slide_jax.profiles.layers import (
    Layer,
    Operation,
    Profile,
    attention_products,
    convolution,
    dense,
    layer,
    norm,
    positive_integers,
    table,
)

SEQUENCE_LENGTH = 128


def classic_block(name: str, width: int, tokens: int) -> Layer:
    """Returns a block of ViT and GPT-2: layer norms, biases, a hidden layer of 4 `width`."""
    return layer(
        name,
        norm(width),
        dense(width, 3 * width, tokens),
        attention_products(tokens, width),
        dense(width, width, tokens),
        norm(width),
        dense(width, 4 * width, tokens),
        dense(4 * width, width, tokens),
    )


def llama_block(name: str, width: int, heads: int, key_value_heads: int, hidden: int, tokens: int) -> Layer:
    """Returns a block of Llama: RMS norms, grouped-query attention, a gated hidden layer, no biases.

    Args:
      name: of the layer.
      width: of the residual stream, a multiple of `heads`.
      heads: of the queries.
      key_value_heads: of keys and values, each shared by several queries' heads.
      hidden: width of the gated layer.
      tokens: of the sequence.
    """
    key_value_width = width // heads * key_value_heads
    return layer(
        name,
        norm(width, shift=False),
        dense(width, width + 2 * key_value_width, tokens, bias=False),
        attention_products(tokens, width),
        dense(width, width, tokens, bias=False),
        norm(width, shift=False),
        dense(width, 2 * hidden, tokens, bias=False),
        dense(hidden, width, tokens, bias=False),
    )


def _vit(name: str, width: int, depth: int, accuracy: float) -> Profile:
    patch, grid, classes = 16, 14, 1000  # images of 224 pixels, the size that the position table is for
    tokens = grid**2 + 1
    layers = [
        layer(
            "embedding",
            convolution(3, width, patch, grid, bias=True),
            table(1 + tokens, width),  # the class token and the positions
        ),
        *(classic_block(f"blocks.{index}", width, tokens) for index in range(depth)),
        layer("head", norm(width), dense(width, classes)),  # reads the class token alone
    ]
    return Profile(name, "vision", accuracy, tuple(layers))


def vit_b16(accuracy: float = 0.81072) -> Profile:
    """Returns ViT-B/16 on 224x224 images (arXiv 2010.11929).

    Args:
      accuracy: ImageNet-1K top-1, default of torchvision's `ViT_B_16_Weights.IMAGENET1K_V1`.
    """
    return _vit("vit_b16", 768, 12, accuracy)


def vit_l16(accuracy: float = 0.79662) -> Profile:
    """Returns ViT-L/16 on 224x224 images (arXiv 2010.11929).

    Args:
      accuracy: ImageNet-1K top-1, default of torchvision's `ViT_L_16_Weights.IMAGENET1K_V1`; like
        ViT-B/16's it was trained from scratch on ImageNet-1K, and stays below it.
    """
    return _vit("vit_l16", 1024, 24, accuracy)


def _tied_head(width: int, vocabulary: int, tokens: int) -> Operation:
    """Returns a head whose matrix is the embedding's: work without a download."""
    return Operation(0, width * vocabulary * tokens)


def _checked_length(sequence_length: int, context_length: int) -> int:
    (sequence_length,) = positive_integers(sequence_length=sequence_length)
    if sequence_length > context_length:
        raise InputError(
            "sequence_length",
            sequence_length,
            f"above the model's context of {context_length}",
            "give a shorter one",
        )
    return sequence_length


def gpt2(sequence_length: int = SEQUENCE_LENGTH, accuracy: float = 0.3114) -> Profile:
    """Returns GPT-2 of 124 million parameters (Radford et al., 2019), its head tied to the embedding.

    Args:
      sequence_length: tokens of the prefill, at most 1024.
      accuracy: default of the EleutherAI harness as quoted in karpathy/build-nanogpt, hellaswag.py.

    Raises:
      InputError: a length outside of 1 to 1024.
    """
    vocabulary, context, width, depth = 50257, 1024, 768, 12
    tokens = _checked_length(sequence_length, context)
    layers = (
        layer("embedding", table(vocabulary, width), table(context, width)),
        *(classic_block(f"blocks.{index}", width, tokens) for index in range(depth)),
        layer("head", norm(width), _tied_head(width, vocabulary, tokens)),
    )
    return Profile("gpt2", "language", accuracy, layers)


def smollm2_135m(sequence_length: int = SEQUENCE_LENGTH, accuracy: float = 0.421) -> Profile:
    """Returns SmolLM2-135M (arXiv 2502.02737), its head tied to the embedding.

    Args:
      sequence_length: tokens of the prefill, at most 8192.
      accuracy: default of the base model in the card of HuggingFaceTB/SmolLM2-135M.

    Raises:
      InputError: a length outside of 1 to 8192.
    """
    tokens = _checked_length(sequence_length, 8192)
    vocabulary, width = 49152, 576
    layers = (
        layer("embedding", table(vocabulary, width)),
        *(llama_block(f"blocks.{index}", width, 9, 3, 1536, tokens) for index in range(30)),
        layer("head", norm(width, shift=False), _tied_head(width, vocabulary, tokens)),
    )
    return Profile("smollm2_135m", "language", accuracy, layers)


def llama3_8b(sequence_length: int = SEQUENCE_LENGTH, accuracy: float = 0.7906) -> Profile:
    """Returns Llama-3-8B (arXiv 2407.21783), with a head of its own.

    Args:
      sequence_length: tokens of the prefill, at most 8192.
      accuracy: default of the float16 base model in arXiv 2404.00456 (QuaRot), table 12.

    Raises:
      InputError: a length outside of 1 to 8192.
    """
    tokens = _checked_length(sequence_length, 8192)
    vocabulary, width = 128256, 4096
    layers = (
        layer("embedding", table(vocabulary, width)),
        *(llama_block(f"blocks.{index}", width, 32, 8, 14336, tokens) for index in range(32)),
        layer("head", norm(width, shift=False), dense(width, vocabulary, tokens, bias=False)),
    )
    return Profile("llama3_8b", "language", accuracy, layers)
