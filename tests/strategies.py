"""Random inputs that the tests share."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def routings(draw):
    """Draws (gates [L, N, E], chosen [L, N, E], token_mask [N], k) with at least one real token."""
    # Few shapes, because each compiles anew.
    layers, tokens, experts = (draw(st.sampled_from(sizes)) for sizes in ((1, 3), (1, 9), (1, 2, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 10.0]))
    logits = sharpness * rng.standard_normal((layers, tokens, experts))
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    gates = (gates / gates.sum(-1, keepdims=True)).astype(np.float32)
    token_mask = rng.random(tokens) < 0.7
    token_mask[rng.integers(tokens)] = True
    top_k = draw(st.integers(1, experts))
    rank = np.argsort(np.argsort(-gates, axis=-1, kind="stable"), axis=-1)
    chosen = (rank < top_k) & token_mask[:, None]
    return gates, chosen, token_mask, top_k
