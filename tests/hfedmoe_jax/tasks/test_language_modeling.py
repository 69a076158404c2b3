"""Perplexity against its definition, of diverged models too."""

import numpy as np
import pytest

from hfedmoe_jax.tasks.language_modeling import perplexity


@pytest.mark.parametrize(
    ("sums", "expected"),
    [([[6.0, 3.0], [2.0, 5.0]], np.e), ([[0.0, 0.0]], 1.0), ([[4000.0, 4.0]], np.inf)],
)
def test_perplexity_is_of_all_tokens_together(sums, expected):
    scores = perplexity(np.array(sums, np.float32), {}, np.arange(len(sums))).scores
    assert scores["perplexity"] == pytest.approx(expected)
