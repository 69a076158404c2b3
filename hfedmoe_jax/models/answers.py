"""What an encoder-decoder makes of a text and its answer.

Axes: B batch, A tokens of an answer, V vocabulary, C answers to choose from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hfedmoe_jax.arrays import AnyArray


class Answers(NamedTuple):
    """The output of a module whose `output` is "answer".

    Attributes:
      logits: of the tokens of the right answer, each from the text and those before it.
      choices: log-likelihoods of all answers; None in training.
    """

    logits: Float[Array, "batch tokens vocabulary"]
    choices: Float[Array, "batch choices"] | None


def token_log_probs(
    logits: Float[AnyArray, "batch tokens vocabulary"], answer: Int[AnyArray, "batch tokens"]
) -> Float[Array, "batch tokens"]:
    """Returns the log-probability of each token of an answer, 0 for padding."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), answer[..., None], axis=-1)[..., 0]
    return jnp.where(answer != 0, chosen, 0.0)
