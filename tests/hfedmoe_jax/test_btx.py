"""Branch-Train-MiX: what experts and routers learn, on a model whose losses are a line each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfedmoe_jax import btx
from hfedmoe_jax.upcycling import DenseModel, Network, mix, output, upcyclings

WIDTH, HIDDEN, LAYERS, DOMAINS, TEXTS, LENGTH = 6, 8, 2, 4, 32, 5


class Linear:
    """Layers that add; each domain wants what another matrix makes of its vectors."""

    num_experts, top_k, text_parts, step_texts = DOMAINS, 1, 2, 4

    def wanted(self, params, x_btd):
        domain = jnp.argmax(jnp.abs(x_btd[..., :DOMAINS]), axis=-1)
        return jnp.einsum("btd,btde->bte", x_btd, params["matrix"][domain])

    def loss(self, params, y_btd, x_btd, tokens_bt):
        real = (tokens_bt != 0)[..., None]
        return jnp.sum(real * (y_btd - self.wanted(params, x_btd)) ** 2) / jnp.sum(real)

    def network_loss(self, params, networks, x_btd, tokens_bt):
        y_nd = x_btd.reshape(-1, WIDTH)
        for i in range(LAYERS):
            y_nd = y_nd + output(jax.tree.map(lambda part: part[i], networks), y_nd)  # noqa: B023
        return self.loss(params, y_nd.reshape(x_btd.shape), x_btd, tokens_bt)

    def mixture_loss(self, params, mixtures, x_btd, tokens_bt, capacity_factor):
        y_nd, balance = x_btd.reshape(-1, WIDTH), 0.0
        for i in range(LAYERS):
            found, gates, weight = mix(jax.tree.map(lambda part: part[i], mixtures), y_nd, 1, 1.0)  # noqa: B023
            y_nd = y_nd + found * jnp.max(gates, axis=1, keepdims=True)  # so that the router has a gradient
            balance += DOMAINS * jnp.sum(jnp.mean(weight > 0, axis=0) * jnp.mean(gates, axis=0))
        return self.loss(params, y_nd.reshape(x_btd.shape), x_btd, tokens_bt), balance


@pytest.fixture
def dense():
    rng = np.random.default_rng(0)
    networks = [
        Network(*(0.3 * rng.normal(size=s).astype(np.float32)
                  for s in ((WIDTH, HIDDEN), (HIDDEN, WIDTH), (HIDDEN,))))
        for _ in range(LAYERS)
    ]  # fmt: skip
    truth = np.repeat(np.arange(TEXTS) % DOMAINS, 2)
    features = 0.5 * rng.normal(size=(2 * TEXTS, LENGTH, WIDTH)) + 2 * np.eye(WIDTH)[truth][:, None]
    tokens = np.ones((2 * TEXTS, LENGTH), np.int32)
    tokens[::3, 3:] = 0
    params = {"matrix": jnp.asarray(rng.normal(size=(DOMAINS, WIDTH, WIDTH)).astype(np.float32))}
    features = features.astype(np.float32)
    inputs = np.stack([features[tokens != 0]] * LAYERS)
    return DenseModel(Linear(), params, networks, inputs, features, tokens, np.random.default_rng(1))


def test_each_expert_is_better_on_its_domain_than_the_dense_network(dense, monkeypatch):
    monkeypatch.setattr(btx, "EXPERT_STEPS", 60)
    monkeypatch.setattr(btx, "EXPERT_RATE", 1e-2)
    group = np.arange(TEXTS) % DOMAINS
    experts = btx.train_experts(dense, group)
    start = jax.tree.map(lambda *parts: np.stack(parts), *dense.networks)
    module, losses = dense.module, np.zeros((DOMAINS + 1, DOMAINS))
    for domain in range(DOMAINS):
        rows = btx.rows_of(np.flatnonzero(group == domain), 2)
        text = dense.features_rtd[rows], dense.tokens_rt[rows]
        for e in range(DOMAINS):
            expert = jax.tree.map(lambda part: part[:, e], experts)  # noqa: B023
            losses[e, domain] = module.network_loss(dense.params, expert, *text)
        losses[DOMAINS, domain] = module.network_loss(dense.params, start, *text)
    assert np.array_equal(np.argmin(losses, axis=0), np.arange(DOMAINS))
    assert np.all(np.diagonal(losses) < 0.7 * losses[DOMAINS])


def test_domains_are_equal_in_size_and_those_of_the_texts(dense):
    group = btx.domains(dense)
    assert np.bincount(group).tolist() == [TEXTS // DOMAINS] * DOMAINS
    fewer = dense._replace(features_rtd=dense.features_rtd[:-2], tokens_rt=dense.tokens_rt[:-2])
    left_out = btx.domains(fewer)
    assert np.sum(left_out == -1) == TEXTS - 1 - DOMAINS * ((TEXTS - 1) // DOMAINS)


def test_a_discriminant_gives_the_probabilities_of_gaussian_domains(monkeypatch):
    """Against Bayes' rule with the densities themselves."""
    monkeypatch.setattr(btx, "RIDGE", 0.0)
    rng = np.random.default_rng(0)
    domain = np.arange(300) % 3
    x = (rng.normal(size=(3, 4))[domain] + rng.normal(size=(300, 4)) @ rng.normal(size=(4, 4)) + 5).astype(
        np.float32
    )
    kernel, bias = btx.discriminant(x, domain, 3)
    mean = np.stack([x[domain == e].mean(0) for e in range(3)])
    covariance = sum(np.outer(row - mean[e], row - mean[e]) for row, e in zip(x, domain, strict=True)) / 300
    inverse = np.linalg.inv(covariance)
    for row in x[:20]:
        density = np.array([np.exp(-0.5 * (row - m) @ inverse @ (row - m)) for m in mean])
        np.testing.assert_allclose(
            jax.nn.softmax(row @ kernel + bias), density / density.sum(), rtol=2e-3, atol=1e-5
        )


def test_only_routers_learn_on_all_domains(dense, monkeypatch):
    monkeypatch.setattr(btx, "EXPERT_STEPS", 5)
    made = btx.btx(dense)
    monkeypatch.setattr(btx, "ROUTER_STEPS", 0)
    before = btx.btx(dense._replace(rng=np.random.default_rng(1)))
    jax.tree.map(np.testing.assert_array_equal, made.experts, before.experts)
    assert not np.array_equal(made.router_de, before.router_de)
    assert made.experts.in_df.shape == (LAYERS, DOMAINS, WIDTH, HIDDEN) and made.router_e.shape == (
        LAYERS,
        DOMAINS,
    )
    for i, network in enumerate(dense.networks):
        assert all(np.any(made.experts.in_df[i, e] != network.in_df) for e in range(DOMAINS))


def test_batches_read_every_text_before_any_twice():
    made = btx.batches(np.arange(10, 17), 3, 5, np.random.default_rng(0))
    assert [len(each) for each in made] == [3] * 5
    for pair in (made[0:2], made[2:4]):
        assert len(set(np.concatenate(pair).tolist())) == 6
    assert [len(each) for each in btx.batches(np.arange(2), 3, 2, np.random.default_rng(0))] == [2, 2]


def test_all_methods_make_what_follows_from_their_random_numbers(dense):
    for name in upcyclings:
        one, other = (upcyclings[name](dense._replace(rng=np.random.default_rng(3))) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert one.router_de.shape == (LAYERS, WIDTH, DOMAINS)
