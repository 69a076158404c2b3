"""Runs whose base changes in every round: evaluation, the best round, checkpoints and exports follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder_runs import run_config
from tiny_decoder import write_decoder

from hfedmoe_jax import Experiment, make_mesh
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models.tensor_files import find_tensors
from launch.hfedmoe.export import export_model
from launch.run.checkpoints import Checkpoints


def config_of(directory, **model):
    config = run_config(directory, train="lora", lora_rank=2, **model)
    config.fl.update(algorithm="flora", base="fedavg")
    config.client.learning_rate = 0.1
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("source"))


def without_clock(state):
    return state._replace(ledger=state.ledger._replace(wall_s=0, train_s=0, timed_steps=0))


def test_two_rounds_go_on_from_a_checkpoint_and_out_as_one_model(source, tmp_path):
    experiment = Experiment(config_of(source), make_mesh(jax.devices()[:1]))
    state = experiment.init()
    before = jax.tree.map(np.array, state.server.params)
    assert not any(np.any(x) for x in jax.tree.leaves(state.best.added))
    rows = []
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        for number in range(2):
            if number == 1:
                first = jax.tree.map(jnp.copy, experiment.algorithm.snapshot(state.server))
                checkpoints.save(1, state)
                checkpoints.wait()
            state, row, failures = experiment.step(state)
            assert failures == []
            rows.append(row)
        experiment.close()
        again = Experiment(config_of(source), make_mesh(jax.devices()[:1]))
        _, copy = checkpoints.restore(again.init())
    copy, row, _ = again.step(copy)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, without_clock(copy), without_clock(state))
    # Nobody had missed anything in the first round: routers travel, then factors too.
    assert rows[0]["bytes_down"] < rows[1]["bytes_down"] == row["bytes_down"]
    model = experiment.algorithm.snapshot(state.server)
    params = model.params
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(before), strict=True
    ):
        if path[-1] == jax.tree_util.DictKey("lora_b"):
            assert not np.any(new)
        else:
            assert np.any(new != old)
    added = jax.tree.leaves(model.added)
    assert len(added) > 3 and all(np.any(x) for x in added)
    # The model by itself: its W is the checkpoint's and what was added, and adapters do nothing.
    quality, _ = experiment.splits.validate(model)
    without, _ = experiment.splits.validate(Snapshot(params))
    assert quality.scores["loss"] != without.scores["loss"]
    export_model(experiment, model, tmp_path / "model")
    config = run_config(tmp_path / "model", train="router")
    merged = Experiment(config, make_mesh(jax.devices()[:1]))
    found, _ = merged.splits.validate(merged.init().best)
    assert quality.scores["loss"] == pytest.approx(found.scores["loss"], rel=1e-5)
    for kept, number in ((first, 1), (state.best, int(state.best_round))):  # each with its own sums
        assert experiment.splits.validate(kept)[0].scores["loss"] == rows[number - 1]["validation_loss"]
    stored, out = find_tensors(source), find_tensors(tmp_path / "model")
    name = next(name for name in stored if "q_proj" in name)
    assert np.any(stored[name].read() != out[name].read())


def test_one_client_is_lora_whose_adapters_are_merged(source):
    """A cohort of one: what FLoRA adds to W is what the same round makes of the same client's adapters."""
    mean = {}
    for name in ("fedavg", "flora"):
        config = config_of(source)
        config.fl.update(algorithm=name, clients=1, clients_per_round=1)
        config.budget.fraction = 1.0
        config.partition.name = "iid"
        experiment = Experiment(config, make_mesh(jax.devices()[:1]))
        state, _, failures = experiment.step(experiment.init())
        experiment.close()
        assert failures == []
        model = experiment.algorithm.snapshot(state.server)
        quality, _ = experiment.splits.validate(model)
        mean[name] = model, quality.scores["loss"]
    plain, stacked = mean["fedavg"][0], mean["flora"][0]
    for path, matrix in stacked.added["experts"].items():
        a, b = (np.asarray(plain.params.experts[path][name], np.float64) for name in ("lora_a", "lora_b"))
        scale = config.model.lora_alpha / 2
        np.testing.assert_allclose(matrix, scale * (a @ b), rtol=1e-5, atol=1e-6)
    assert mean["fedavg"][1] == pytest.approx(mean["flora"][1], rel=1e-5)


def test_bases_that_take_no_sums_are_refused(source):
    for fields, field in (
        (dict(base="int8"), "model.base"),
        (dict(base="nf4"), "model.base"),
        (dict(adapters="somewhere"), "model.adapters"),
    ):
        with pytest.raises(InputError) as error:
            Experiment(config_of(source, **fields), make_mesh(jax.devices()[:1]))
        assert error.value.field == field
