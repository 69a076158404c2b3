"""What pretrained models learned with, by which the mixtures made of them are judged and trained.

Token 0 is padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hfedmoe_jax.arrays import AnyArray

SIMILARITY_SCALE = 20.0


def contrastive_loss(
    x_btd: Float[AnyArray, "batch tokens model"], mask_bt: Bool[AnyArray, "batch tokens"]
) -> Float[Array, ""]:
    """Returns the mean cross-entropy of finding a text's second half among those of all texts of a batch.

    Rows 2 i and 2 i + 1 are the halves of text i. Logits are the cosine similarities of mean-pooled states,
    by `SIMILARITY_SCALE`; this is how sentence encoders learn (arXiv 1705.00652, multiple negatives).
    """
    real = mask_bt[..., None]
    pooled = jnp.sum(x_btd * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
    unit = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=1, keepdims=True), 1e-9)
    logits = SIMILARITY_SCALE * unit[::2] @ unit[1::2].T
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))


def next_token_loss(
    logits_btv: Float[AnyArray, "batch tokens vocabulary"], tokens_bt: AnyArray
) -> Float[Array, ""]:
    """Returns the mean cross-entropy of real tokens, each from those before it."""
    real = tokens_bt[:, 1:] != 0
    share = jax.nn.log_softmax(logits_btv[:, :-1])
    taken = jnp.take_along_axis(share, tokens_bt[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(taken * real) / jnp.maximum(jnp.sum(real), 1)
