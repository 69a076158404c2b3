"""Figures of gate mass, against loops over a table of routing."""

import numpy as np
import pytest

from hfedmoe_jax.specialisation import figures, gate_mass


def test_the_figures_of_a_table_are_what_loops_find():
    rng = np.random.default_rng(0)
    count, tokens, top_k = 12, 90, 3
    expert = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)])
    gate = rng.random((tokens, top_k)).astype(np.float32)
    kind = np.array(["law", "intent", "summary"])[rng.integers(0, 3, tokens)]
    mass = {name: [0.0] * count for name in sorted(set(kind))}
    for n in range(tokens):
        for k in range(top_k):
            mass[kind[n]][expert[n, k]] += float(gate[n, k])
    table = gate_mass(expert, gate, kind, count)
    np.testing.assert_allclose(table, list(mass.values()), rtol=1e-12)
    entropy, gini, quarter, best = [], [], [], []
    for row in mass.values():
        share = [m / sum(row) for m in row]
        entropy.append(-sum(p * np.log(p) for p in share if p) / np.log(count))
        gini.append(sum(abs(p - q) for p in share for q in share) / (2 * count))
        order = sorted(range(count), key=lambda e: -share[e])[: count // 4]
        quarter.append(sum(share[e] for e in order))
        best.append(set(order))
    overlap = [len(best[i] & best[j]) / (count // 4) for i, j in ((0, 1), (0, 2), (1, 2))]
    wanted = dict(usage_entropy=entropy, usage_gini=gini, best_quarter=quarter, overlap=overlap)
    found = figures(table)
    assert found == pytest.approx({name: np.mean(each) for name, each in wanted.items()}, rel=1e-9)


def test_figures_of_even_and_of_separate_use():
    even = figures(np.ones((2, 8)))
    assert even == pytest.approx(dict(usage_entropy=1, usage_gini=0, best_quarter=0.25, overlap=1))
    apart = figures(np.eye(8)[[0, 4]] + np.eye(8)[[1, 5]])
    assert apart["best_quarter"] == 1 and apart["overlap"] == 0
    assert apart["usage_entropy"] == pytest.approx(np.log(2) / np.log(8))
