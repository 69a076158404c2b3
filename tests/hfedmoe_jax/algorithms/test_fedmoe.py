"""FedMoE's means against a loop over experts: each, and its row of the router, over those that trained it."""

import jax
import numpy as np
from loop import algorithm_of, assert_close, config_of, doubles, mean, rounds, start, trained_alone
from tiny import run_round

from hfedmoe_jax.reports import OK


def test_an_expert_and_its_router_row_are_a_mean_over_who_trained_it():
    config = config_of(fl__algorithm="fedmoe", fl__local_steps=1)
    algorithm = algorithm_of(config)
    train, state = trained_alone(config), algorithm.init(start())
    partly = nobody = 0
    for data, key in rounds(config):
        expected = doubles(state.params)
        members = train(state.params, data, key)
        state, metrics = run_round(algorithm, state, data, key)
        trained = np.stack([member.upload.trained for member in members])
        for place in np.ndindex(trained.shape[1:]):
            trainers = [m for m in members if m.upload.trained[place]]
            partly, nobody = partly + (0 < len(trainers) < len(members)), nobody + (not trainers)
            if trainers:
                change, (layer, expert) = mean(trainers), place
                for leaf, of in zip(*map(jax.tree.leaves, (expected.experts, change.experts)), strict=True):
                    leaf[place] += of[place]
                for leaf, of in zip(*map(jax.tree.leaves, (expected.router, change.router)), strict=True):
                    leaf[layer, :, expert] += of[layer, :, expert]
        shared = jax.tree.map(np.add, expected.shared, mean(members).shared)
        assert_close(state.params, expected._replace(shared=shared))
        np.testing.assert_array_equal(metrics.uploaded[metrics.report.status == OK], trained)
    assert partly > 0
    assert nobody > 0
