"""An algorithm that a user writes: the server moves a bias of the routers towards equal expert use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from loop import (
    algorithm_of,
    assert_close,
    config_of,
    doubles,
    mean,
    rounds,
    start,
    trained_alone,
)
from tiny import run_round

from hfedmoe_jax.algorithms import Transformed, algorithms, compose

RATE = 0.5


@algorithms.register("balanced")
def balanced(config):
    """The clients' mean usage, summed over the cohort, moves a bias [L, E] that every router adds."""
    method = compose(config)
    experts = (config.model.num_layers, config.model.num_experts)

    def step(totals, bias):
        return totals.change, bias + RATE * (1 / experts[1] - totals.summed / totals.count)

    return method._replace(
        rule=method.rule._replace(router_bias=lambda bias: bias),
        extra=lambda params: jnp.zeros(experts),
        transform=lambda update: Transformed(update.change, summed=update.upload.usage),
        step=step,
    )


@functools.cache
def built():
    config = config_of(fl__algorithm="balanced")
    return config, algorithm_of(config)


def test_the_server_moves_the_bias_by_the_cohorts_mean_usage():
    config, algorithm = built()
    train = trained_alone(config, balanced(config).rule)
    state = algorithm.init(start())
    bias = np.zeros((1, 6))
    for data, key in rounds(config):
        members = train(state.params, data, key, jnp.float32(bias))
        expected = jax.tree.map(np.add, doubles(state.params), mean(members))
        usage = np.mean([member.upload.usage for member in members], axis=0)
        bias = bias + RATE * (1 / 6 - usage)
        state, _ = run_round(algorithm, state, data, key)
        assert_close(state.params, expected)
        assert_close(state.extra, bias)
        assert_close(algorithm.snapshot(state).router_bias, bias)
    assert np.abs(bias).max() > 0.1


def test_a_bias_turns_every_token_to_one_expert():
    config, algorithm = built()
    data, key = next(rounds(config))
    state = algorithm.init(start())
    bias = jax.device_put(jnp.zeros((1, 6)).at[0, 4].set(100.0), state.extra.sharding)
    _, metrics = run_round(algorithm, state._replace(extra=bias), data, key)
    assert np.all(metrics.report.trained_size == 1)
