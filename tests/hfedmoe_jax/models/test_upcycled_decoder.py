"""A dense Llama whose last networks become mixtures: the same function, and the start of a federated run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import EXPECTED, LETTERS, write_decoder

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh, mixtures
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelSizes
from hfedmoe_jax.models.decoder import Decoder, decoder
from hfedmoe_jax.models.names import is_stored
from hfedmoe_jax.tasks import multiple_choice
from launch.hfedmoe.export import can_export

SIZES = ModelSizes(len(LETTERS) + 1, len(LETTERS) + 1, 12, offset=1)
LAYERS = EXPECTED["llama/config"]["num_hidden_layers"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mixtures, "TEXTS", 80)
    monkeypatch.setattr(mixtures, "HELD_OUT", 40)


def section(directory, **fields):
    model = get_config("decoder").model
    model.update(source=str(directory), num_layers=1, num_experts=4, top_k=2, **fields)
    return model


def read(params):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params, is_leaf=is_stored)


def texts():
    tokens = np.random.default_rng(0).integers(1, len(LETTERS) + 1, (3, 12)).astype(np.int32)
    tokens[1, 7:], tokens[2, 1:] = 0, 0
    return jnp.asarray(tokens)


@pytest.mark.parametrize("num_layers", [1, LAYERS])
def test_a_copy_computes_what_the_dense_model_does(num_layers, tmp_path):
    """Whichever experts a token takes, and where all layers are mixtures."""
    model = section(write_decoder(tmp_path, "llama"), upcycling="copy", eval_capacity_factor=4.0)
    model.num_layers = num_layers
    module, batch = decoder(model, SIZES), {"tokens": texts()}
    start = mixtures.load_start(model, module)
    assert start.report["relative_error"] == pytest.approx(0, abs=1e-10)
    assert start.report["loss"] == pytest.approx(start.report["dense_loss"], rel=1e-5)
    params = module.init(jax.random.key(0), batch)["params"]
    loaded = read(start.params)
    unlike = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, loaded)
    assert all(jax.tree.leaves(unlike["blocks"])[:1]) and unlike["embed"]
    found = module.apply({"params": loaded}, batch, None, False).output
    dense = Decoder(SIZES, module.dense, 1.0, 1.0)
    wanted = dense.apply({"params": read(dense.read(tmp_path))}, batch).output
    real = np.asarray(batch["tokens"]) != 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], rtol=0, atol=1e-5)


def test_the_inputs_of_the_networks_are_those_of_the_dense_model(tmp_path):
    """Each layer alone, with the module of its norm."""
    model = section(write_decoder(tmp_path, "llama"), upcycling="copy")
    model.num_layers = LAYERS
    module, tokens = decoder(model, SIZES), texts()
    params = module.read(tmp_path)
    _, found = module.inputs(params, tokens)
    assert found.shape == (LAYERS, *tokens.shape, module.width)
    fewer = section(tmp_path, upcycling="copy")
    np.testing.assert_allclose(
        decoder(fewer, SIZES).inputs(params, tokens)[1][0], found[-1], rtol=1e-5, atol=1e-6
    )
    network = module.networks(params)[-1]
    stack = read(params)["dense"]["network"]
    np.testing.assert_array_equal(network.gate_df, stack["gate"]["kernel"][-1])
    np.testing.assert_array_equal(network.in_df, stack["up"]["kernel"][-1])
    np.testing.assert_array_equal(network.out_fd, stack["down"]["kernel"][-1])


def questions(tmp_path):
    """Writes questions whose right answer is in the order of the alphabet."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(60):
        begin = rng.integers(0, 10)
        right, wrong = (" ".join("abcdefghijklm"[begin:][::step][:3]) for step in (1, -1))
        label = int(rng.integers(2))
        rows.append(dict(question="abc"[begin % 3], choices=[wrong, right] if label else [right, wrong],
                         answer=label))  # fmt: skip
        rows[-1]["question"] += " " + " ".join(rng.choice(list("pqrstu"), 4))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def run_config(tmp_path, **model):
    config = get_config("smoke")
    config.model.update(family="decoder", num_layers=1, num_experts=4, top_k=2, **model)
    config.model.source = str(write_decoder(tmp_path / "source", "llama"))
    config.data.update(source="file", train_path=str(questions(tmp_path)), tokenizer="checkpoint", seq_len=16)
    config.data.update(text_column="question", choices_column="choices", label_column="answer", prompt="{}")
    config.task.name = "multiple_choice"
    config.partition.name = "iid"
    return config


def build(config):
    return Experiment(config, make_mesh(jax.devices()[:1]))


def test_clients_learn_to_answer_and_nobody_trains_the_trunk(tmp_path):
    config = run_config(tmp_path, upcycling="cluster", train="router")
    config.client.learning_rate = 0.02
    config.fl.local_steps = 8
    experiment = build(config)
    state = experiment.init()
    assert experiment.start is not None and experiment.start.report["relative_error"] < 1
    before, losses = jax.tree.map(np.array, state.server.params), []
    for _ in range(2):
        state, row, failures = experiment.step(state)
        losses.append(row["train_loss"])
        assert failures == [] and {"validation_acc", "validation_acc_norm"} <= row.keys()
    experiment.close()
    assert losses[-1] < losses[0] and not can_export(experiment)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.server.params)
    assert any(jax.tree.leaves(changed.experts)) and any(jax.tree.leaves(changed.router))
    assert "embed" in experiment.frozen and "dense" in experiment.frozen


def test_adapters_begin_as_the_mixtures_and_learn(tmp_path):
    """Of attention in all layers, the dense ones too; outputs are at first those without adapters."""
    fields = dict(upcycling="cluster", eval_capacity_factor=4.0)
    plain = build(run_config(tmp_path, **fields))
    adapted = build(run_config(tmp_path, train="lora", lora_rank=2, **fields))
    start = adapted.init()
    scores = [e.splits.validate(e.algorithm.snapshot(e.init().server))[0].scores for e in (plain, adapted)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(start.server.params.shared)
    ]
    assert {"dense", "blocks"} == {path.split("'")[1] for path in paths} and len(paths) == 16
    state, _, failures = adapted.step(start)
    adapted.close()
    moved = jax.tree.map(lambda x: bool(np.any(x)), state.server.params)
    assert failures == [] and all(jax.tree.leaves(moved.shared))


def test_a_run_of_no_round_tells_how_good_the_start_is(tmp_path, monkeypatch):
    """Scores are those of whole rows, whatever length they are cut to."""
    config = run_config(tmp_path, upcycling="copy", eval_capacity_factor=4.0)
    config.fl.rounds = 0
    config.data.seq_len = 64
    experiment = build(config)
    cut = experiment.finish(experiment.init()).final.scores
    assert set(cut) == {"acc", "acc_norm", "loss"}
    assert len(multiple_choice.by_length(experiment.data.test)[0]["tokens"][0]) < 64
    task = experiment.task._replace(by_length=None)
    monkeypatch.setattr(experiment.splits, "_task", task)
    assert experiment.finish(experiment.init()).final.scores == pytest.approx(cut, rel=1e-5)


def test_what_cannot_become_mixtures_is_refused(tmp_path):
    source = write_decoder(tmp_path, "llama")
    for fields, problem in (
        (
            {"num_layers": LAYERS + 1},
            rf"model\.num_layers={LAYERS + 1}: above the checkpoint's {LAYERS} layers",
        ),
        ({"num_experts": 7, "upcycling": "split"}, r"model\.num_experts=7: does not divide"),
        ({"upcycling": "mix"}, r"model\.upcycling='mix'"),
    ):
        model = section(source)
        model.update(fields)
        with pytest.raises(InputError, match=problem):
            decoder(model, SIZES)
