"""The losses of pretrained models, against loops."""

import numpy as np
import pytest

from hfedmoe_jax.models.losses import contrastive_loss, next_token_loss


def test_contrastive_loss_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 5, 4)).astype(np.float32)
    mask = np.arange(5) < np.array([5, 3, 1, 4, 2, 5])[:, None]
    pooled = [row[real].mean(0) for row, real in zip(states, mask, strict=True)]
    unit = [row / np.sqrt(np.sum(row**2)) for row in pooled]
    wanted = 0.0
    for i in range(3):
        logits = np.array([20 * unit[2 * i] @ unit[2 * j + 1] for j in range(3)])
        wanted -= np.log(np.exp(logits[i]) / np.exp(logits).sum()) / 3
    assert contrastive_loss(states, mask) == pytest.approx(wanted, rel=1e-4)


def test_next_token_loss_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    tokens = rng.integers(1, 7, (3, 5)).astype(np.int32)
    tokens[1, 3:], tokens[2, 1:] = 0, 0
    lost = [
        np.log(np.exp(logits[b, t]).sum()) - logits[b, t, tokens[b, t + 1]]
        for b in range(3)
        for t in range(4)
        if tokens[b, t + 1]
    ]
    assert next_token_loss(logits, tokens) == pytest.approx(np.mean(lost), rel=1e-5)
