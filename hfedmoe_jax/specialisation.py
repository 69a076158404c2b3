"""How experts are shared out among kinds of text: four figures of gate mass, ours and published ones alike.

Axes: Q kinds of text (topics, tasks), E experts, N tokens, K chosen experts of a token.
"""

import numpy as np
from jaxtyping import Float, Int

DEEPSEEK = dict(
    best_quarter=(0.52, 0.72), overlap=(0.31, 0.42), usage_entropy=(0.79, 0.94), usage_gini=(0.39, 0.62)
)
"""Least and largest of the tasks, or pairs of tasks, in DeepSeek-V2-Lite's recorded routing, as `by_kind`.

Each is a mean over 26 layers of 64 experts, of which a token takes 6. Source: the routing of four tasks that
was published with ESFT, arXiv 2407.01906.
"""


def gate_mass(
    expert_nk: Int[np.ndarray, "N K"], gate_nk: Float[np.ndarray, "N K"], kind_n: np.ndarray, num_experts: int
) -> Float[np.ndarray, "Q E"]:
    """Returns the mass that each kind of text gives each expert, of a table of routing; kinds in order.

    Args:
      expert_nk, gate_nk: a token's chosen experts, and their gates before any renormalisation.
      kind_n: of each token.
    """
    kinds, row_n = np.unique(kind_n, return_inverse=True)
    mass_qe = np.zeros((len(kinds), num_experts))
    np.add.at(mass_qe, (row_n[:, None], expert_nk), gate_nk.astype(np.float64))
    return mass_qe


def by_kind(mass_qe: Float[np.ndarray, "Q E"]) -> dict[str, np.ndarray]:
    """Returns the `figures` of each kind [Q], and as `overlap` that of each pair of kinds."""
    share_qe = mass_qe / mass_qe.sum(1, keepdims=True)
    count = share_qe.shape[1]
    quarter = max(1, count // 4)
    best = [set(np.argsort(-share)[:quarter].tolist()) for share in share_qe]
    pairs = [(a, b) for i, a in enumerate(best) for b in best[:i]]
    rising_qe = np.sort(share_qe, axis=1)
    rank = np.arange(1, count + 1)
    return dict(
        usage_entropy=-np.sum(rising_qe * np.log(np.maximum(rising_qe, 1e-300)), axis=1) / np.log(count),
        usage_gini=rising_qe @ (2 * rank - count - 1) / count,
        best_quarter=rising_qe[:, -quarter:].sum(1),
        overlap=np.array([len(a & b) / quarter for a, b in pairs] or [1.0]),
    )


def figures(mass_qe: Float[np.ndarray, "Q E"]) -> dict[str, float]:
    """Returns what distinguishes experts by what they are used for, of the gate mass of one layer.

    Returns:
      usage_entropy: of the mass over the experts, by kind of text, over ln E; 1 if all are used alike.
      usage_gini: of the same, 0 if all are used alike.
      best_quarter: share of a kind's mass in the quarter of the experts that has the most of it.
      overlap: share of such a quarter that another kind has too, mean over pairs of kinds.
    """
    return {name: float(each.mean()) for name, each in by_kind(mass_qe).items()}
