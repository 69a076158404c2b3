"""What a `Method` of one's own may do: transform updates, keep states, sum arrays, and over many clients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from test_algorithms import BUDGETS, CLIENTS, FIELDS, MODEL, build, cohort, run, step
from tiny import tiny_algorithm, tiny_cohort, tiny_config, tiny_params

from hfedmoe_jax.aggregation import expert_rules, gating_rules
from hfedmoe_jax.aggregation.sums import MOST_TERMS, largest_term
from hfedmoe_jax.algorithms import Method, Transformed, Weights, algorithms, compose
from hfedmoe_jax.client import LocalRule


def doubled(config):
    """Returns a method whose clients count their rounds and double their change; the server counts too."""

    def transform(change):
        twice = jax.tree.map(lambda x: 2 * x, change.change)
        return Transformed(
            twice, change.state + change.extra, {"rounds": change.state, "huge": jnp.float32(12_000)}
        )

    def advance(totals, extra):
        return totals.change, extra + totals.summed["rounds"] + totals.summed["huge"] + 100 * totals.count

    return compose(config)._replace(
        extra=lambda params: jnp.float32(1),
        state=lambda params: jnp.float32(3),
        transform=transform,
        step=advance,
        tensor_bytes=lambda tensor: 7,
    )


def test_a_method_transforms_updates_keeps_states_and_sums(monkeypatch):
    monkeypatch.setitem(algorithms._parts, "doubled", doubled)
    config, model, plain = build()
    params, data = tiny_params(**MODEL), cohort(config, available=[True, False, True])
    algorithm = tiny_algorithm(tiny_config(**FIELDS, fl__algorithm="doubled", fl__base="hfedmoe"), BUDGETS)
    expected, _ = run(plain, params, data)
    state, metrics = run(algorithm, params, data)
    twice = jax.tree.map(lambda new, old: 2 * new - old, expected.params, params)
    chex.assert_trees_all_close(state.params, twice, rtol=1e-5, atol=1e-6)
    # The client that dropped out is as it was, and adds nothing.
    assert np.asarray(state.clients)[:CLIENTS].tolist() == [4, 3, 3, 4, 3]
    # 12,000 is cut, so that the sum over a cohort has room.
    cut = largest_term(config.fl.clients_per_round)
    assert cut < 12_000
    assert state.extra == 1 + 2 * 3 + 2 * cut + 100 * 2
    rest, one = (len(jax.tree.leaves(tree)) for tree in ((params.router, params.shared), params.experts))
    assert algorithm.traffic.up(np.array([0, 3]), np.array([1, 2])).tolist() == [
        7 * rest,
        7 * (rest + 3 * one),
    ]
    # The second round reads what the first has left.
    extra = float(state.extra)
    data = cohort(config, (3,))
    state, _ = step(algorithm, state, data)
    assert np.asarray(state.clients)[:CLIENTS].tolist() == [4, 3, 3, 4 + extra, 3]
    assert state.extra == extra + 4 + cut + 100


TERM = 2.0**-16 - 2.0**-40
"""All ones in the lower part of an exact sum, which overflows with 128 of them that nothing carries."""


def test_sums_of_more_clients_than_have_room_at_once_are_carried_in_time(monkeypatch):
    """Every client sends the same change; two layers, so a weight of one counts half of it."""
    clients, grown = 200, np.float32(2 * TERM)
    assert clients > 2 * MOST_TERMS
    monkeypatch.setitem(algorithms._parts, "grow", lambda config: Method(
        LocalRule(None), Weights(expert_rules["all"], gating_rules["mean"]), ("sgd", config.server),
        transform=lambda change: Transformed(jax.tree.map(lambda x: jnp.full_like(x, grown), change.change)),
    ))  # fmt: skip
    fields = dict(fl__algorithm="grow", fl__local_steps=1, fl__batch_size=1, fl__clients=clients)
    fields |= dict(fl__clients_per_round=clients, server__learning_rate=1.0)
    config = tiny_config(**fields)
    algorithm = tiny_algorithm(config, [6] * clients)
    data = tiny_cohort(config, [0] * clients, [6])._replace(client=np.arange(clients, dtype=np.int32))
    data = data._replace(size=np.ones(clients, np.float32))
    params = jax.tree.map(jnp.zeros_like, tiny_params())
    state = algorithm.init(params)
    for number in range(1, 3):
        state, _ = step(algorithm, state, data)
        for leaf in jax.tree.leaves(state.params):
            np.testing.assert_allclose(leaf, number * grown, rtol=1e-6)
    assert algorithm.programs["settle"]._cache_size() >= 1
