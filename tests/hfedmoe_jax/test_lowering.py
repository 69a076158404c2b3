"""Programs lowered from shapes alone are those that a run calls."""

import jax
import numpy as np
import pytest
from test_experiment import build

from hfedmoe_jax.population import put_members


def described(tree):
    """Returns shape, type and place of every array."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)


CASES = {
    "hfedmoe": dict(budget__fraction=0.5),
    "scaffold": dict(fl__algorithm="scaffold"),  # with states of the clients, and arrays of its own
    "local": dict(fl__algorithm="local"),
    "frozen": dict(model__train="^(?!.*attend)"),
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_arguments_from_shapes_are_those_of_a_round(fields):
    experiment = build(**fields)
    state, plan = experiment.init().server, experiment.plan(1)
    block, data = next(experiment.blocks(plan))
    arguments = experiment.algorithm.arguments(data)
    portion = next(iter(experiment.portions(plan)))
    count = put_members(experiment.mesh, block.count)
    sums, broadcast, members, counted = arguments[f"tier {block.tier}"]
    assert described(members._replace(state=())) == described(portion.data._replace(state=()))
    assert described(counted) == described(count)
    assert described(broadcast.frozen) == described(experiment.frozen)
    if experiment.algorithm.personal:
        store, _ = arguments["gather states"]
        assert described(store) == described(state.params)
    else:
        assert described(sums) == described(experiment.algorithm.programs["open"]())
        assert described(broadcast.params) == described(state.params)
        _, params, optimizer, extra, _ = arguments["finish"]
        assert described((params, optimizer, extra)) == described(
            (state.params, state.optimizer, state.extra)
        )
    if jax.tree.leaves(state.clients):
        store, index = arguments["gather states"]
        assert described(store) == described(state.clients)
        rows = experiment.algorithm.programs["gather states"](
            state.clients, put_members(experiment.mesh, np.zeros(index.shape, np.int32))
        )
        assert described(members.state) == described(rows)


def test_every_program_of_a_run_is_lowered_and_can_be_compiled():
    experiment = build(budget__fraction=0.5)
    lowered = {name: lower() for name, lower in experiment.lower()}
    assert set(lowered) == {"tier 4", "open", "settle", "finish", "evaluate", "usage"}
    model = experiment.algorithm.snapshot(experiment.init().server)
    block = jax.tree.map(lambda x: np.zeros((16, *x.shape[1:]), x.dtype), experiment.splits.holdout)
    count = np.ones(1, np.int32)
    members = put_members(experiment.mesh, ((block, ()), count))
    _, score = lowered["evaluate"].compile()((), (model, experiment.frozen), *members)
    assert score.load.shape == (16, 2, 4)
