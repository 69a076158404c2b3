"""Aggregation (17)-(21) against naive float64 loops that hold every client's model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_oracle import bits
from ml_collections import ConfigDict

from hfedmoe_jax import aggregation as a
from hfedmoe_jax.aggregation import running_mean as m
from hfedmoe_jax.bank import ExpertRows
from hfedmoe_jax.models import Params

TOLERANCE = dict(rtol=1e-5, atol=1e-6)
ROWS = 4  # of the embedding table


@st.composite
def populations(draw):
    """Draws a population of few sizes, because each compiles anew."""
    layers, experts = draw(st.sampled_from([(1, 1), (3, 4)]))
    clients, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**32 - 1))
    return one_population(clients, seed, layers, experts, draw(st.sampled_from([0.0, 0.1, 0.5])))


def one_population(clients, seed, layers=3, experts=4, tau=0.1):
    """Returns clients' experts [C, L, E, 2] and other parameters, usage, importance, trained and sizes."""
    rng = np.random.default_rng(seed)
    shape = (clients, layers, experts)
    return dict(
        experts=rng.standard_normal((*shape, 2)).astype(np.float32),
        router=rng.standard_normal((clients, layers, 3)).astype(np.float32),
        table=rng.standard_normal((clients, ROWS, 2)).astype(np.float32),
        bias=rng.standard_normal((clients, 3)).astype(np.float32),
        usage=(rng.random(shape) * (rng.random(shape) < 0.8)).astype(np.float32),
        importance=rng.random(shape).astype(np.float32),
        trained=rng.random(shape) < 0.6,
        sizes=rng.integers(1, 50, clients).astype(np.float32),
        tau=tau,
    )


def uploads(p):
    return [
        a.Upload(p["usage"][c], p["importance"][c], p["trained"][c], p["trained"][c] * 1, p["sizes"][c])
        for c in range(len(p["sizes"]))
    ]


BLOCK = 2  # clients of a chunk, and between two settlings


def unit_of(largest):
    """One over the smallest power of two that holds the largest weight."""
    return m.Scale(np.float32(2.0 ** -np.ceil(np.log2(max(largest, 1.0)))), np.float32(2.0**14))


@jax.jit
def add_block(mean, start, clients, unit):
    return m.mean_settle(m.mean_accumulate(mean, start, clients, unit, "table"))


finalize, merge = jax.jit(m.mean_finalize), jax.jit(m.mean_merge)


def parameters(p, clients):
    """Returns the parameters of some clients, stacked: experts a row each, a router, a table and a bias."""
    experts = p["experts"][clients].reshape(len(clients), -1, p["experts"].shape[-1])
    return Params(
        {"w": experts},
        {"r": p["router"][clients]},
        {"table": p["table"][clients], "bias": p["bias"][clients]},
    )


def start_of(p):
    layers, experts = p["usage"].shape[1:]
    return Params(
        {"w": np.full((layers, experts, 2), 7.0, np.float32)},
        {"r": np.full((layers, 3), 7.0, np.float32)},
        {"table": np.full((ROWS, 2), 7.0, np.float32), "bias": np.full(3, 7.0, np.float32)},
    )


def stacked_weights(p, section):
    """Returns the weights of all clients by the sparse rules."""
    each = [
        Params(a.expert_rules["dominant"](u, section), a.gating_rules["importance"](u, section), u.size)
        for u in uploads(p)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *each)


def streamed(p, groups=None, by_row=False, weights=None, block=BLOCK, changes=False):
    """The streaming mean over groups of clients, each summed apart, as on devices of its own.

    Args:
      groups: numbers of clients; by default all on one device.
      by_row: as a client of a budget sends its experts, and rows of its table.
      block: clients of a chunk.
      changes: they send what they changed instead of parameters.
    """
    start, clients = start_of(p), len(p["sizes"])
    weights = stacked_weights(p, ConfigDict(dict(tau=p["tau"]))) if weights is None else weights
    unit = unit_of(p["sizes"].max())
    sums = []
    for group in groups or [list(range(clients))]:
        mean = m.mean_init(start)
        for begin in range(0, len(group), block):
            # A block has a fixed size: the last one is filled up with clients of weight zero.
            part = group[begin : begin + block]
            members = (part + [0] * block)[:block]
            real = np.arange(block) < len(part)
            own = jax.tree.map(
                lambda w, m=members, r=real: np.where(r.reshape(-1, *[1] * (w.ndim - 1)), w[m], 0), weights
            )
            params, trained, token = parameters(p, members), everyone(p, members), None
            if by_row:
                params, trained, token = as_rows(p, members)
            dominant = (p["usage"][members] >= p["tau"]) & p["trained"][members] & real[:, None, None]
            if changes:
                params = jax.tree.map(lambda x: x - np.float32(7), params)
            given = m.Contribution(params, trained, token, own, dominant)
            mean = add_block(mean, None if changes else start, given, unit)
        sums.append(mean)
    mean = merge(jax.tree.map(lambda *x: jnp.stack(x), *sums))
    change = finalize(mean, start)
    return mean, jax.tree.map(lambda c, x: np.asarray(c) + x, change, start), unit


def everyone(p, members):
    """Returns that every client trained every expert, in order."""
    num_experts = p["usage"][0].size
    every = np.tile(np.arange(num_experts, dtype=np.int32), (len(members), 1))
    return ExpertRows(every, every, np.full(len(members), num_experts, np.int32))


def as_rows(p, members):
    """Returns the clients with their trained experts alone, in rows of any order, and shuffled words."""
    params, num_experts = parameters(p, members), p["usage"][0].size
    rng = np.random.default_rng(0)
    rows, expert, row, count = [], [], [], []
    for client, weights in zip(members, params.experts["w"], strict=True):
        place = rng.permutation(num_experts)
        trained = np.flatnonzero(p["trained"][client])
        rows.append(np.full_like(weights, np.nan))  # what lies in the other rows counts for nothing
        rows[-1][place[trained]] = weights[trained]
        unused = num_experts - len(trained)
        expert.append([*trained, *[num_experts] * unused])
        row.append([*place[trained], *[0] * unused])
        count.append(len(trained))
    words = np.stack([rng.permutation(ROWS + 1) for _ in members])  # the last is nobody's
    table = np.concatenate([params.shared["table"], np.full((len(members), 1, 2), 1e6, np.float32)], axis=1)
    shared = params.shared | {"table": np.take_along_axis(table, words[..., None], axis=1)}
    trained = ExpertRows(np.int32(expert), np.int32(row), np.int32(count))
    return Params({"w": np.stack(rows)}, params.router, shared), trained, words.astype(np.int32)


@given(populations())
def test_experts_are_averaged_over_the_clients_that_hold_them(p):
    clients, layers, experts = p["usage"].shape
    previous = np.full((layers, experts, 2), 7.0, np.float32)
    expected = previous.astype(np.float64)
    for layer in range(layers):
        for expert in range(experts):
            holders = [
                c for c in range(clients)
                if p["usage"][c, layer, expert] >= p["tau"] and p["trained"][c, layer, expert]
            ]  # fmt: skip
            if holders:
                total = sum(float(p["sizes"][c]) for c in holders)
                expected[layer, expert] = (
                    sum(
                        float(p["sizes"][c]) * p["experts"][c, layer, expert].astype(np.float64)
                        for c in holders
                    )
                    / total
                )
    mean, result, _ = streamed(p)
    np.testing.assert_allclose(result.experts["w"], expected, **TOLERANCE)
    untouched = ~np.any((p["usage"] >= p["tau"]) & p["trained"], axis=0)
    np.testing.assert_array_equal(result.experts["w"][untouched], 7.0)
    dominant = (p["usage"] >= p["tau"]) & p["trained"]
    np.testing.assert_array_equal(mean.dominant, dominant.sum(axis=0))
    for name in ("table", "bias"):
        wide = p[name].astype(np.float64)
        np.testing.assert_allclose(
            result.shared[name], np.average(wide, axis=0, weights=p["sizes"]), **TOLERANCE
        )


@given(populations())
def test_gating_is_averaged_by_importance(p):
    clients, layers, experts = p["usage"].shape
    dominant = (p["usage"] >= p["tau"]) & p["trained"]
    union_size = np.any(dominant, axis=0).sum()
    alpha = np.zeros(clients)
    for c in range(clients):
        for layer in range(layers):
            for expert in range(experts):
                if dominant[c, layer, expert]:
                    alpha[c] += float(p["usage"][c, layer, expert]) * float(p["importance"][c, layer, expert])
    previous = np.full((layers, 3), 7.0, np.float32)
    mean, result, unit = streamed(p)
    router = p["router"].astype(np.float64)
    if alpha.sum() > 0:
        expected = np.einsum("c,cld->ld", alpha / alpha.sum(), router)
        literal = np.einsum("c,cld->ld", alpha / union_size, router)  # (20)-(21) as printed
        printed = m.literal_gating(mean, start_of(p).router, unit, np.float32(union_size))
        np.testing.assert_allclose(printed["r"], literal, rtol=1e-4, atol=1e-5)
    else:
        expected = previous
    np.testing.assert_allclose(result.router["r"], expected, rtol=1e-4, atol=1e-5)


@given(populations())
def test_consistency_is_the_share_of_the_union(p):
    clients = len(p["sizes"])
    dominant = (p["usage"] >= p["tau"]) & p["trained"]
    took_part = p["sizes"] > 10
    sets = [
        set(zip(*np.nonzero(dominant[c]), strict=True)) if took_part[c] else set() for c in range(clients)
    ]
    union = set().union(*sets)
    expected = [len(s & union) / max(len(union), 1) for s in sets]
    np.testing.assert_allclose(a.routing_consistency(dominant, took_part), expected, **TOLERANCE)


@given(populations(), st.randoms(use_true_random=False), st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=30)
def test_order_grouping_devices_and_rows_do_not_change_a_bit(p, random, devices, one_by_one, changes):
    """The server's sums are exact, however the clients are dealt out and whatever they leave out."""
    order = list(range(len(p["sizes"])))
    random.shuffle(order)
    groups = [order[device::devices] for device in range(devices)]
    block = 1 if one_by_one else BLOCK
    one, other = streamed(p), streamed(p, groups, by_row=True, block=block, changes=changes)
    assert bits(one[:2]) == bits(other[:2])


@given(st.integers(0, 2**31), st.integers(1, 3))
@settings(max_examples=20)
def test_routers_may_be_weighed_expert_by_expert(seed, clients):
    """A column of the router, its expert's row, has the mean by its own weights; without any it stays."""
    rng, layers, experts, width = np.random.default_rng(seed), 2, 4, 3
    p = one_population(clients, seed, layers, experts)
    old, new = (
        rng.standard_normal((*n, layers, width, experts)).astype(np.float32) for n in ((), (clients,))
    )
    weight = rng.random((clients, layers, experts)).astype(np.float32) * (
        rng.random((clients, layers, experts)) < 0.6
    )
    start = start_of(p)._replace(router={"r": old})
    everybody = list(range(clients))
    weights = stacked_weights(p, ConfigDict(dict(tau=p["tau"])))._replace(router=weight)
    given_clients = m.Contribution(
        parameters(p, everybody)._replace(router={"r": new}),
        everyone(p, everybody),
        None,
        weights,
        p["trained"],
    )
    mean = add_block(m.mean_init(start, router_rows=True), start, given_clients, unit_of(p["sizes"].max()))
    change = finalize(merge(jax.tree.map(lambda x: x[None], mean)), start).router["r"]
    total = weight.astype(np.float64).sum(axis=0)[:, None]
    terms = np.einsum("cle,clde->lde", weight.astype(np.float64), new.astype(np.float64) - old)
    expected = np.divide(
        terms, total, out=np.zeros_like(terms), where=np.broadcast_to(total > 0, terms.shape)
    )
    np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_zero_weight_hides_even_a_nan(value):
    p = one_population(clients=2, seed=1)
    expected = streamed(p, [[0]])
    for name in ("experts", "router", "table", "bias"):
        p[name][1] = value
    weights = stacked_weights(p, ConfigDict(dict(tau=p["tau"])))
    weights = jax.tree.map(lambda w: w * np.array([1, 0], w.dtype).reshape(-1, *[1] * (w.ndim - 1)), weights)
    p["trained"][1] = False
    assert bits(streamed(p, weights=weights)[:2]) == bits(expected[:2])


@pytest.mark.parametrize("size", [1.0, 3.0, 81.0])
def test_one_client_alone_gets_its_own_parameters_back(size):
    p = one_population(clients=1, seed=2)
    p["sizes"][0] = size
    p["trained"][:] = True
    p["usage"][:] = 0.5
    _, result, _ = streamed(p)
    np.testing.assert_allclose(result.experts["w"], p["experts"][0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.router["r"], p["router"][0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.shared["table"], p["table"][0], rtol=1e-6, atol=1e-6)


def test_the_mean_of_many_clients_is_exact_to_float32():
    """A thousand clients that all moved by the same tiny step: a float32 sum of them loses digits."""
    p = one_population(clients=1000, seed=3)
    step = np.float32(3e-5)
    for name in ("experts", "router", "table", "bias"):
        p[name][:] = np.float32(7.0) + step
    p["trained"][:], p["usage"][:], p["importance"][:] = True, 0.5, 0.5
    mean, _, _ = streamed(p)
    moved = np.float32(7.0) + step - np.float32(7.0)
    for leaf in jax.tree.leaves(m.mean_finalize(mean, start_of(p))):
        np.testing.assert_allclose(leaf, moved, rtol=1e-6)
