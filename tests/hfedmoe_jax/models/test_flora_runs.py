"""Runs whose base changes in every round: evaluation, the best round, checkpoints and exports follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from test_decoder_runs import SEQ_LEN, run_config
from test_lora import section
from tiny_decoder import write_decoder
from tiny_run import ROOT, run_main

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, algorithms, make_mesh
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models import build_model, tree_bytes
from hfedmoe_jax.models.frozen import add_to_frozen
from hfedmoe_jax.models.lora import adapter_pairs
from hfedmoe_jax.models.tensor_files import find_tensors
from launch.compiling import megabytes
from launch.hfedmoe.dry_run import classes
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
        _, copy = checkpoints.restore(experiment.init())
    copy, row, _ = experiment.step(copy)
    experiment.close()
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


@pytest.mark.slow
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
        expected = config.model.lora_alpha / 2 * (a @ b)
        np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert mean["fedavg"][1] == pytest.approx(mean["flora"][1], rel=1e-5)


def test_a_dry_run_tells_the_bytes_of_a_client_that_missed_a_round(source):
    experiment = Experiment(config_of(source), make_mesh(jax.devices()[:1]), shapes_only=True)
    params, _ = jax.eval_shape(experiment.model.init, jax.random.key(0))
    pairs = adapter_pairs(params.shared | {"experts": params.experts}).values()
    # Half of the experts' budget is one of two ranks, of all experts.
    one = sum(tree_bytes(pair) for pair in pairs) // 2
    dense = sum(4 * a.size // 2 * b.shape[-1] for a, b in pairs)
    rest = tree_bytes((params.router, params.shared)) - sum(
        tree_bytes(pair) for pair in adapter_pairs(params.shared).values()
    )
    _, header, rows = classes(experiment)
    members = experiment.config.fl.clients_per_round
    for row in rows:
        found = dict(zip(header, row, strict=True))
        assert found["MB up"] == megabytes(rest + one)
        assert found["MB down"] == megabytes(rest + min(members * one, dense))


def test_bases_that_take_no_sums_are_refused(source):
    for fields, field in (
        (dict(base="int8"), "model.base"),
        (dict(base="nf4"), "model.base"),
        (dict(adapters="somewhere"), "model.adapters"),
    ):
        with pytest.raises(InputError) as error:
            Experiment(config_of(source, **fields), make_mesh(jax.devices()[:1]))
        assert error.value.field == field


@pytest.mark.parametrize("family", ["bert", "mixtral", "deepseek_v2_lite"])
def test_what_is_added_has_the_paths_and_shapes_of_the_matrices(family, tmp_path):
    model, sizes = section(family, tmp_path)
    model.update(train="lora", lora_rank=2)
    built = build_model(model, sizes, {"tokens": jax.ShapeDtypeStruct((2, 6), jnp.int32)})
    params, frozen = jax.eval_shape(built.init, jax.random.key(0))
    config = get_config("smoke")
    config.fl.update(algorithm="flora", base="fedavg")
    config.model.update(model)
    added = traverse_util.flatten_dict(jax.eval_shape(algorithms["flora"](config).extra, params))
    kept = traverse_util.flatten_dict(frozen)
    factors = [path for path in traverse_util.flatten_dict(params.shared) if path[-1] == "lora_a"]
    assert len(added) == len(params.experts) + len(factors) > len(params.experts)
    assert {path: x.shape for path, x in added.items()} == {path: kept[path].shape for path in added}


def test_sums_have_the_type_that_a_base_is_kept_in():
    rng = np.random.default_rng(0)
    kept = {"experts": {"w": rng.normal(size=(2, 3)), "b": np.ones(3)}, "norm": {"scale": np.ones(2)}}
    frozen = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), kept)
    more = {"experts": {"w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)}}
    found = add_to_frozen(frozen, more)
    assert found["norm"]["scale"] is frozen["norm"]["scale"] and found["experts"]["b"].dtype == jnp.bfloat16
    exact = np.asarray(frozen["experts"]["w"], np.float32) + np.asarray(more["experts"]["w"])
    np.testing.assert_array_equal(found["experts"]["w"], jnp.asarray(exact).astype(jnp.bfloat16))
    assert add_to_frozen(frozen, None) is frozen


@pytest.mark.slow
def test_a_finished_run_writes_the_merged_model_alone(source, tmp_path):
    fields = {"model__family": "decoder", "model__source": source, "model__train": "lora"}
    fields |= {"data__tokenizer": "checkpoint", "data__seq_len": SEQ_LEN, "task__name": "language_modeling"}
    fields |= {"fl__algorithm": "flora", "fl__base": "fedavg", "fl__rounds": 1}
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    work = tmp_path / "work"
    screen = run_main([f"--config={ROOT}/configs/hfedmoe.py:smoke", f"--workdir={work}", *flags])
    assert screen.code == 0 and "no adapters/: flora adds to W" in screen.out
    assert (work / "model" / "config.json").exists() and not (work / "adapters").exists()
