"""Features of frozen layers, computed once: the same bits, and refused where nothing is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_process import run_python
from tiny_bert import write_bert
from tiny_decoder import write_decoder

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh, mixtures
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.family import ATTENDED, FEATURES


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mixtures, "TEXTS", 80)
    monkeypatch.setattr(mixtures, "HELD_OUT", 40)


def build(directory, **fields):
    config = get_config("smoke")
    config.model.update(family="bert", source=str(directory), num_layers=1, num_experts=4, top_k=2)
    config.model.update(dict(train="experts_router_head", upcycling="copy") | fields)
    config.data.update(tokenizer="checkpoint", seq_len=12)
    config.fl.rounds = 2
    return Experiment(config, make_mesh(jax.devices()[:1]))


ATTENTION_TOO = "router|head|blocks/attend"


def run_both(directory, train="experts_router_head", cut=ATTENDED):
    """Asserts that a run with cached features has the bits of one without, and counts less work."""
    ends, servers, runs = [], [], []
    for cached in (False, True):
        experiment = build(directory, cache_trunk=cached, train=train, num_layers=2)
        state = experiment.init()
        for _ in range(2):
            state, _, failures = experiment.step(state)
            assert failures == []
        runs.append(experiment)
        servers.append(state.server)
        ends.append(experiment.finish(state))
    jax.tree.map(np.testing.assert_array_equal, *servers)
    for name in ("final", "best", "expert_load", "client_scores"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(end, name) for end in ends))
    plain, cached = runs
    assert cut not in plain.data.train and cached.data.train[cut].shape[1:] == (12, 16)
    assert cached.fingerprint == plain.fingerprint
    assert cached.cost.shared_flop < plain.cost.shared_flop


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older compilers fuse across the cut")
def test_cached_features_change_no_bit_of_a_run(tmp_path):
    """Compiled as a run compiles it, not as quickly as the tests do."""
    as_usual = "import jax; jax.config.update('jax_disable_most_optimizations', False)"
    directory = str(write_bert(tmp_path))
    both = f"run_both({directory!r}); run_both({directory!r}, {ATTENTION_TOO!r}, {FEATURES!r})"
    run_python(f"{as_usual}; from test_trunk import run_both; {both}", 1)


@pytest.mark.parametrize(("train", "cut"), [("experts_router_head", ATTENDED), (ATTENTION_TOO, FEATURES)])
def test_features_are_cached_as_deep_as_parameters_are_frozen(train, cut, tmp_path):
    experiment = build(write_bert(tmp_path), cache_trunk=True, train=train)
    tokens = jnp.asarray(experiment.data.test["tokens"][:4])
    found = experiment.model.module.features(experiment.frozen, tokens, cut)
    np.testing.assert_allclose(experiment.data.test[cut][:4], found, atol=1e-5)


def test_a_decoders_round_is_that_without_a_cache(tmp_path):
    source = write_decoder(tmp_path / "source", "llama")
    losses = []
    for cached in (False, True):
        config = get_config("smoke")
        config.model.update(family="decoder", source=str(source), num_layers=1, num_experts=4, top_k=2)
        config.model.update(train="router", upcycling="copy", cache_trunk=cached)
        config.data.update(tokenizer="checkpoint", seq_len=12)
        config.task.name = "language_modeling"
        experiment = Experiment(config, make_mesh(jax.devices()[:1]))
        assert (FEATURES in experiment.data.train) == cached
        state, row, _ = experiment.step(experiment.init())
        losses.append((row["train_loss"], row["validation_loss"]))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [(dict(family="bert", train="all"), "trunk is trained"), (dict(family="switch"), "no layers below")],
)
def test_what_is_trained_cannot_be_cached(fields, problem, tmp_path):
    config = get_config("smoke")
    if fields["family"] == "bert":
        config.model.update(source=str(write_bert(tmp_path)), num_layers=1, num_experts=4, top_k=2)
        config.data.update(tokenizer="checkpoint", seq_len=12)
    config.model.update(cache_trunk=True, **fields)
    with pytest.raises(InputError, match=rf"model\.cache_trunk=True.*{problem}"):
        Experiment(config, make_mesh(jax.devices()[:1]))


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("hfedmoe_jax.trunk.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"model\.cache_trunk=True.* GB of disk"):
        build(write_bert(tmp_path), cache_trunk=True)
