"""SCAFFOLD against a loop over clients and steps that writes the paper's equations down."""

import jax
import jax.numpy as jnp
import numpy as np
from loop import (
    BUDGETS,
    MODEL,
    ROUNDS,
    algorithm_of,
    assert_close,
    assert_same,
    client,
    config_of,
    doubles,
    rounds,
    start,
)
from tiny import VOCABULARY, run_round, tiny_frozen, tiny_model

from hfedmoe_jax.experts import Budget, Experts, flat, gradient_rules, open_layers
from hfedmoe_jax.models import Params, tree_bytes
from hfedmoe_jax.tasks import tasks
from launch.run.checkpoints import Checkpoints


def make_gradient(config):
    """Returns `gradient(params, batch) -> (Params, experts that served a token [L, E])`, of a plain pass."""
    model, task = tiny_model(config), tasks["classification"]
    number = model.num_layers * model.num_experts

    def gradient(params, batch):
        experts = Experts(flat(params.experts), (), gradient_rules(number))
        budget = Budget(experts, open_layers(model.num_layers, model.num_experts))

        def objective(rest, tape):
            out = model.apply(rest, tiny_frozen(**MODEL), batch, budget._replace(tape=tape), True)
            loss, _ = task.loss(out.output, batch)
            total = loss + config.model.load_balance * jnp.mean(out.routing.balance)
            return (total, out.tape, out.permit), out.routing.kept > 0

        zeros = jax.tree.map(jnp.zeros_like, experts.bank)
        _, pull, served = jax.vjp(objective, params._replace(experts=None), zeros, has_aux=True)
        rows = jnp.arange(number, dtype=jnp.float32).reshape(model.num_layers, -1)
        rest, of_experts = pull((jnp.float32(1), zeros, rows))
        of_experts = jax.tree.map(lambda g, x: g.reshape(x.shape), of_experts, params.experts)
        return rest._replace(experts=of_experts), served

    return jax.jit(gradient)


def local_steps(gradient, start: Params, batches, drift: Params, rate: float):
    """Returns what K steps of descent along g + drift come to, and in how many each parameter took part.

    An expert does in the steps in which it serves a token, a row of the table if the client has its token.
    """
    params = jax.tree.map(np.copy, start)
    own = np.isin(np.arange(VOCABULARY), batches["tokens"])[:, None]
    times = jax.tree.map(lambda x: np.zeros((1,) * x.ndim, int), start)
    for step in range(len(batches["tokens"])):
        batch = jax.tree.map(lambda x, step=step: x[step], batches)
        found, served = gradient(jax.tree.map(np.float32, params), batch)
        takes = jax.tree.map(lambda x: np.ones((1,) * x.ndim, int), start)
        takes.shared["embed"] = 1 * own
        takes = takes._replace(
            experts=jax.tree.map(
                lambda x, s=served: 1 * np.asarray(s).reshape(s.shape + (1,) * (x.ndim - 2)), start.experts
            )
        )
        params = jax.tree.map(lambda x, g, d, t: x - rate * t * (g + d), params, doubles(found), drift, takes)
        times = jax.tree.map(np.add, times, takes)
    return params, times


def test_rounds_are_those_of_the_paper():
    """With a learning rate that halves from round to round."""
    config = config_of(fl__algorithm="scaffold", client__learning_rate=0.1)
    algorithm, gradient = algorithm_of(config), make_gradient(config)
    state = algorithm.init(start())
    params = doubles(start())
    control = jax.tree.map(np.zeros_like, params)
    own = [control for _ in BUDGETS]
    unequal = 0
    for turn, (data, key) in enumerate(rounds(config)):
        decay = 0.5**turn
        data, rate = data._replace(rate=np.full(len(data.client), decay, np.float32)), 0.1 * decay
        size, total = 0.0, jax.tree.map(np.zeros_like, params)
        delta = total
        for row, number in enumerate(data.client):
            if not data.available[row]:
                continue
            batches = jax.tree.map(lambda x, row=row: x[row], data.batch)
            drift = jax.tree.map(np.subtract, control, own[number])
            after, times = local_steps(gradient, params, batches, drift, rate)
            unequal += len(np.unique(jax.tree.leaves(times.experts)[0])) > 1
            new = jax.tree.map(
                lambda c_i, c, x, y, k, rate=rate: np.where(
                    k > 0, c_i - c + (x - y) / (np.maximum(k, 1) * rate), c_i
                ),
                own[number], control, params, after, times,
            )  # fmt: skip
            delta = jax.tree.map(lambda d, new, old: d + new - old, delta, new, own[number])
            total = jax.tree.map(lambda t, y, x, w=data.size[row]: t + w * (y - x), total, after, params)
            size, own[number] = size + data.size[row], new
        params = jax.tree.map(lambda x, t, size=size: x + t / size, params, total)
        control = jax.tree.map(lambda c, d: c + d / len(BUDGETS), control, delta)
        state, _ = run_round(algorithm, state, data, key)
        assert_close(state.params, params, rtol=1e-4, atol=1e-5)
        assert_close(state.extra, control, rtol=1e-4, atol=1e-5)
        for number in range(len(BUDGETS)):
            assert_close(client(state.clients, number), own[number], rtol=1e-4, atol=2e-5)
    assert unequal > 0
    assert any(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(control))


def test_the_servers_variate_is_the_mean_of_the_clients_whatever_they_send(tmp_path):
    """With selection and sparse aggregation, too; and all of it survives a checkpoint."""
    config = config_of(fl__algorithm="scaffold", fl__base="hfedmoe")
    algorithm = algorithm_of(config)
    state = algorithm.init(start())
    for (members, available), (data, key) in zip(ROUNDS, rounds(config), strict=True):
        before = jax.tree.map(np.array, state.clients)
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(1, state)
            checkpoints.wait()
            _, copy = checkpoints.restore(algorithm.init(start()))
        state, _ = run_round(algorithm, state, data, key)
        own = [doubles(client(state.clients, number)) for number in range(len(BUDGETS))]
        assert_close(state.extra, jax.tree.map(lambda *x: sum(x) / len(x), *own), atol=1e-6)
        took_part = np.array(members)[np.array(available or [True] * len(members))]
        for number in set(range(len(BUDGETS))) - set(took_part.tolist()):
            assert_same(client(state.clients, number), client(before, number))
    copy, _ = run_round(algorithm, copy, data, key)
    assert_same(copy, state)


def test_control_variates_double_what_travels():
    sparse = algorithm_of(config_of(fl__algorithm="fedavg"))
    algorithm, sent = algorithm_of(config_of(fl__algorithm="scaffold")), np.array([0, 3, 6])
    clients, missed = np.array([4, 0, 2]), np.zeros(3, int)
    twice = 2 * sparse.traffic.up(sent, clients)
    np.testing.assert_array_equal(algorithm.traffic.up(sent, clients), twice)
    assert algorithm.traffic.down(missed, clients).tolist() == [2 * tree_bytes(start())] * 3
