"""FLoRA's stacked adapters, and the bytes of ranks that differ, against loops over clients in NumPy."""

import jax
import numpy as np
import pytest
from compilations import compilations
from loop import (
    BUDGETS,
    MODEL,
    ROUNDS,
    algorithm_of,
    config_of,
    doubles,
    rounds,
    trained_alone,
)
from tiny import run_round, tiny_params

from hfedmoe_jax.algorithms import adapters, compose
from hfedmoe_jax.models import tree_bytes
from hfedmoe_jax.models.lora import adapter_pairs

RANK, SCALE, TAU = 3, 16.0 / 3, 0.02
LORA = {"model__train": "lora", "model__lora_rank": RANK}
EXPERTS = MODEL["model__num_experts"]


def config(name="flora", base="fedavg"):
    return config_of(aggregation__tau=TAU, fl__algorithm=name, fl__base=base, **LORA)


def rank_of(client: int, base: str = "fedavg") -> int:
    return int(np.ceil(RANK * BUDGETS[client] / EXPERTS)) if base == "fedavg" else RANK


def begin():
    return tiny_params(**MODEL, **LORA)


def weight_of(member, base: str) -> np.ndarray:
    """Returns what a client's experts count, [L, E]."""
    upload = member.upload
    dominant = upload.trained & (upload.usage >= TAU)  # (17)
    return float(upload.size) * (np.ones(dominant.shape) if base == "fedavg" else dominant)


@pytest.mark.parametrize("base", ["fedavg", "hfedmoe"])
def test_the_server_adds_what_stacked_factors_multiply_to(base):
    run = config(base=base)
    algorithm, rule = algorithm_of(run), compose(run).rule
    if base == "fedavg":
        rule = rule._replace(start=adapters.truncate(RANK))
    members_of = trained_alone(run, rule, frozen_fields=MODEL | LORA)
    state, unseen = algorithm.init(begin()), 0
    for data, key in rounds(run):
        before, frozen = jax.tree.map(np.array, (state.params, algorithm.snapshot(state).added))
        members = members_of(before, data, key, added=frozen)
        state, _ = run_round(algorithm, state, data, key)
        weights = [weight_of(member, base) for member in members]
        total = np.sum(weights, axis=0)
        unseen += int(np.sum(total == 0))
        found = algorithm.snapshot(state).added["experts"]
        for path, base_before in frozen["experts"].items():
            a_s, b_s = [], []
            for member, weight in zip(members, weights, strict=True):
                after = jax.tree.map(np.add, doubles(before.experts), member.change.experts)
                a, b = adapter_pairs(after)[(path,)]
                rank = rank_of(member.client, base)
                assert not np.any(b[..., rank:, :]) and np.any(b[..., :rank, :])
                share = weight / np.where(total > 0, total, 1)
                a_s.append(share[..., None, None] * a[..., :rank])
                b_s.append(b[..., :rank, :])
            stacked = np.concatenate(a_s, -1) @ np.concatenate(b_s, -2)
            expected = np.asarray(base_before, np.float64) + SCALE * stacked
            size = np.abs(expected).max()
            assert size > 0
            np.testing.assert_allclose(found[path], expected, rtol=1e-6, atol=1e-6 * size)
        for (_, (a, b)), (_, (old, _)) in zip(
            *(adapter_pairs(tree).items() for tree in (state.params.experts, before.experts)), strict=True
        ):
            assert not np.any(b)
            changed = np.any(np.asarray(a) != old, axis=(-1, -2))
            np.testing.assert_array_equal(changed, total > 0)
            assert np.abs(a).max() <= 1.001 * a.shape[-2] ** -0.5
    assert (unseen > 0) == (base == "hfedmoe")


def test_ranks_that_are_sent_are_those_that_are_charged():
    """HetLoRA receives and sends its own ranks; FLoRA what the others have sent since, or the sum."""
    for name in ("hetlora", "flora"):
        algorithm, params = algorithm_of(config(name)), begin()
        state = algorithm.init(params)
        missed, dense = np.zeros(len(BUDGETS), np.int64), 0
        for a, b in adapter_pairs(params.experts).values():
            dense += 4 * int(np.prod(a.shape[:2])) * a.shape[2] * b.shape[3]

        def bytes_of(client, params=params):
            count = tree_bytes((params.router, params.shared))
            for a, b in adapter_pairs(params.experts).values():
                count += 4 * EXPERTS * rank_of(client) * (a.shape[2] + b.shape[3])
            return count

        for (members, available), (data, key) in zip(ROUNDS, rounds(config(name)), strict=True):
            before = compilations()
            state, metrics = run_round(algorithm, state, data, key)
            assert members == ROUNDS[0][0] or compilations() == before
            counts = available or (True,) * len(members)
            up = [bytes_of(client) if ok else 0 for client, ok in zip(members, counts, strict=True)]
            assert metrics.bytes_up.tolist() == up and metrics.bytes_up.dtype == np.int64
            if name == "hetlora":
                assert metrics.bytes_down.tolist() == [bytes_of(client) for client in members]
                continue
            rest = tree_bytes((params.router, params.shared))
            assert metrics.bytes_down.tolist() == [rest + min(missed[c], dense) for c in members]
            missed[list(members)] = 0
            missed += sum(size - rest for size in up if size)
            np.testing.assert_array_equal(state.records.missed, missed)
        assert bytes_of(0) < bytes_of(2)
