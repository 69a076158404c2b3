"""BERT-like encoders: against transformers, and as the start of a federated run."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
from parity_results import check_sketch
from parity_weights import draw
from tiny_bert import EXPECTED, write_bert, write_tokenizer

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh, mixtures, pretrained
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelSizes
from hfedmoe_jax.models.encoder import bert
from hfedmoe_jax.models.encoder_sizes import encoder_names
from hfedmoe_jax.models.names import export_params
from hfedmoe_jax.models.switch import Head
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.upcycling import Mixture, Network, mix, output

SIZES = ModelSizes(num_outputs=3, vocab_size=tiny_bert.CONFIG["vocab_size"], seq_len=12)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mixtures, "TEXTS", 80)
    monkeypatch.setattr(mixtures, "HELD_OUT", 40)


def section(directory, **fields):
    model = get_config("agnews_minilm").model
    model.update(source=str(directory), num_layers=2, num_experts=4, top_k=2, train="all")
    return model.update(fields) or model


def run_config(directory, **fields):
    config = get_config("smoke")
    config.model.update(family="bert", source=str(directory), num_layers=1, num_experts=4, top_k=2, **fields)
    config.data.update(tokenizer="checkpoint", seq_len=12)
    return config


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_hidden_states_are_those_of_transformers(prefix, tmp_path):
    """With padding, for texts of several lengths."""
    module = bert(section(write_bert(tmp_path, prefix)), SIZES)
    params, tokens = module.read(tmp_path), jnp.asarray(EXPECTED["tokens"])
    hidden, read = module.whole.apply({"params": params}, tokens, tokens != 0)
    real = EXPECTED["tokens"] != 0
    np.testing.assert_allclose(np.asarray(hidden)[real], EXPECTED["hidden"][real], rtol=0, atol=1e-5)
    features, inputs = module.inputs(params, tokens)
    np.testing.assert_allclose(inputs, read[-2:], rtol=1e-5, atol=1e-6)
    blocks = jax.tree.map(lambda *parts: np.stack(parts), *module.networks(params))
    states, _ = module.run_above(params, blocks, features, tokens != 0)
    np.testing.assert_allclose(states, hidden, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_transformers(tmp_path):
    """Of a weighted sum of the hidden states of real tokens."""
    module = bert(section(write_bert(tmp_path / "source")), SIZES)
    tokens, weight = jnp.asarray(EXPECTED["tokens"]), draw("loss", (tiny_bert.CONFIG["hidden_size"],))

    @jax.grad
    def gradient(params):
        hidden, _ = module.whole.apply({"params": params}, tokens, tokens != 0)
        return jnp.sum((hidden @ weight) * (tokens != 0))

    names = encoder_names(find_tensors(tmp_path / "source"))
    export_params(tmp_path / "gradient", names, gradient(module.read(tmp_path / "source")), {})
    found = find_tensors(tmp_path / "gradient")
    kept = [key for key in EXPECTED if key.startswith("gradient ")]
    assert len(kept) > 20
    for key in kept:
        check_sketch(found[key.removeprefix("gradient ")].read(), EXPECTED[key], key)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_copy_computes_what_the_dense_model_does(num_layers, tmp_path):
    """Whichever experts a token takes, and where all layers are mixtures."""
    model = section(write_bert(tmp_path), upcycling="copy", num_layers=num_layers)
    model.update(capacity_factor=4.0, eval_capacity_factor=4.0)  # drops no token
    module, tokens = bert(model, SIZES), jnp.asarray(EXPECTED["tokens"])
    params = module.init(jax.random.key(0), {"tokens": tokens})["params"]
    start = mixtures.load_start(model, module)
    assert start.report["relative_error"] == pytest.approx(0, abs=1e-10)
    assert start.report["loss"] == pytest.approx(start.report["dense_loss"], rel=1e-5)
    assert {**start.params, "head": 0}.keys() == params.keys()
    loaded = jax.tree.map(jnp.asarray, start.params) | {"head": params["head"]}
    logits = module.apply({"params": loaded}, {"tokens": tokens}).output
    hidden, _ = module.whole.apply({"params": module.read(tmp_path)}, tokens, tokens != 0)
    dense = Head(3).apply({"params": params["head"]}, hidden, tokens != 0)
    np.testing.assert_allclose(logits, dense, rtol=0, atol=1e-5)


def test_runs_share_mixtures_and_make_damaged_ones_again(tmp_path, monkeypatch):
    model = section(write_bert(tmp_path / "a"))
    module, made = bert(model, SIZES), []
    make = mixtures.make_mixtures
    monkeypatch.setattr(mixtures, "make_mixtures", lambda *args: made.append(1) or make(*args))
    first, second = (mixtures.load_start(model, module) for _ in range(2))
    assert len(made) == 1 and first.digest == second.digest and first.report == second.report
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    (file,) = mixtures.cache_dir().glob("*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    third = mixtures.load_start(model, module)
    jax.tree.map(np.testing.assert_array_equal, first.params, third.params)
    other = mixtures.load_start(
        section(tmp_path / "a", top_k=1), bert(section(tmp_path / "a", top_k=1), SIZES)
    )
    assert len(made) == 3 and other.digest != first.digest
    write_bert(tmp_path / "b", "bert.")
    assert mixtures.load_start(section(tmp_path / "b"), module).digest not in (first.digest, other.digest)


def test_a_run_starts_from_the_checkpoint_and_leaves_its_trunk_alone(tmp_path):
    config = run_config(write_bert(tmp_path), train="experts_router_head")
    experiment = Experiment(config, make_mesh(jax.devices()[:1]))
    tokens = experiment.data.train["tokens"]
    assert np.all(tokens[:, 0] == 2) and np.all(np.sum(tokens == 3, axis=1) == 1)  # [CLS] text [SEP]
    trunk = experiment.start.params["trunk"]
    state = experiment.init()
    np.testing.assert_array_equal(
        np.asarray(state.server.params.experts["in_df"]), experiment.start.params["experts"]["in_df"]
    )
    before = jax.tree.map(np.asarray, state.server.params)
    state, row, failures = experiment.step(state)
    experiment.close()
    assert failures == [] and np.isfinite(row["train_loss"])
    jax.tree.map(np.testing.assert_array_equal, experiment.frozen["trunk"], trunk)
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), before, state.server.params)
    assert all(jax.tree.leaves(moved))
    assert set(state.server.params.shared) == {"head"}


def test_what_does_not_fit_together_is_refused(tmp_path, monkeypatch):
    source = write_bert(tmp_path / "whole")
    cases = {
        "data.tokenizer": lambda config: config.data.update(tokenizer="bpe"),
        "model.num_layers": lambda config: config.model.update(num_layers=4),
        "model.num_experts": lambda config: config.model.update(num_experts=5),
        "data.seq_len": lambda config: config.data.update(seq_len=21),
        "model.upcycling": lambda config: config.model.update(upcycling="splt"),
    }
    for field, change in cases.items():
        config = run_config(source)
        change(config)
        with pytest.raises(InputError) as error:
            Experiment(config, make_mesh(jax.devices()[:1]))
        assert error.value.field == field and "\n" not in str(error.value)
    config = get_config("smoke")
    config.model.source = str(source)
    with pytest.raises(InputError, match=r"model\.source=.* is trained from scratch"):
        Experiment(config, make_mesh(jax.devices()[:1]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.source='minilm': .*run `make pretrained`"):
        pretrained.find_source("minilm")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda d: write_bert(d, model_type="roberta"),
            "model_type='roberta'; model.family=bert reads 'bert'",
        ),
        (lambda d: write_bert(d, hidden_act="relu"), "hidden_act='relu'"),
        (lambda d: write_bert(d, vocab_size=None), "config.json has no vocab_size"),
        (lambda d: write_bert(d, vocab_size=39), "is of 39 tokens, its tokenizer of 40"),
        (lambda d: write_bert(d, num_hidden_layers=4), "encoder.layer.3.* is missing"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json': is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json': cannot be read"),
        (lambda d: write_tokenizer(d, ["zz", *tiny_bert.WORDS[1:], "[PAD]"]), "has another token 0"),
        (lambda d: (d / "model.safetensors").unlink(), "holds neither"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_told_in_one_line(spoil, problem, tmp_path):
    source = write_bert(tmp_path / "whole")
    spoil(source)
    with pytest.raises(InputError, match=problem) as error:
        Experiment(run_config(source), make_mesh(jax.devices()[:1]))
    assert "\n" not in str(error.value)


def test_what_the_report_says_is_what_a_loop_finds():
    rng = np.random.default_rng(0)
    count, width, hidden, top_k = 8, 5, 6, 2
    network = Network(
        *(rng.normal(size=s).astype(np.float32) for s in ((width, hidden), (hidden, width), (hidden,)))
    )
    experts = jax.tree.map(lambda part: rng.normal(size=(count, *part.shape)).astype(np.float32), network)
    mixture = Mixture(
        experts, rng.normal(size=(width, count)).astype(np.float32), np.zeros(count, np.float32)
    )
    x, topic = (
        rng.normal(size=(60, width)).astype(np.float32),
        np.array(["a", "b", "c"])[rng.integers(0, 3, 60)],
    )
    report = mixtures.judge(mixture, network, x, topic, 2.0, top_k)
    mass = {name: np.zeros(count) for name in "abc"}
    for row, name in zip(x, topic, strict=True):
        gate = np.exp(row @ mixture.router_de)
        gate /= gate.sum()
        for expert in np.argsort(-gate)[:top_k]:
            mass[name][expert] += gate[expert]
    shares = [each / each.sum() for each in mass.values()]
    assert report["best_quarter"] == pytest.approx(np.mean([np.sort(s)[-2:].sum() for s in shares]), rel=1e-5)
    entropy = np.mean([-sum(p * np.log(p) for p in s if p) / np.log(count) for s in shares])
    assert report["usage_entropy"] == pytest.approx(entropy, rel=1e-5)
    gini = np.mean([np.abs(s[:, None] - s[None]).sum() / (2 * count) for s in shares])
    assert report["usage_gini"] == pytest.approx(gini, rel=1e-5)
    best = [set(np.argsort(s)[-2:]) for s in shares]
    overlap = np.mean([len(best[i] & best[j]) / 2 for i, j in [(0, 1), (0, 2), (1, 2)]])
    assert report["overlap"] == pytest.approx(overlap)
    assert list(report["by_topic"]) == ["a", "b", "c"]
    for share, of_topic in zip(shares, report["by_topic"].values(), strict=True):
        assert of_topic["best_quarter"] == pytest.approx(np.sort(share)[-2:].sum(), rel=1e-5)
        assert of_topic.keys() == {"best_quarter", "usage_entropy", "usage_gini"}
    found, wanted = mix(mixture, x, top_k, 2.0)[0], output(network, x)
    assert report["relative_error"] == pytest.approx(
        float(jnp.sum((found - wanted) ** 2) / jnp.sum(wanted**2))
    )
    assert json.dumps(report)
