"""The suite `pretrained` on tiny checkpoints: its tables hold what they say."""

import numpy as np
import pytest
import tiny_bert
import tiny_decoder

from hfedmoe_jax import mixtures
from launch.suites import pretrained
from launch.suites.timing import Timing

SMALL = dict(hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, vocab_size=32)  # fmt: skip


def test_the_forward_pass_is_timed_and_left_alone_without_pytorch(tmp_path, monkeypatch):
    source = tiny_decoder.write_decoder(tmp_path, "llama")
    monkeypatch.setattr(pretrained, "find_source", lambda name: source)
    monkeypatch.setattr(pretrained, "TOKENS", 6)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    ((model, ours, torch, ratio),) = pretrained.forward_table(3).rows
    assert (model, torch, ratio) == ("smollm2", None, None)
    assert isinstance(ours, Timing) and ours.median_s > 0


def test_the_logits_are_the_checkpoints(tmp_path, monkeypatch):
    """Token t of a batch is the checkpoint's t: nothing is shifted by the padding of our batches."""
    tokens = tiny_decoder.EXPECTED["llama/tokens"]
    monkeypatch.setattr(pretrained, "TOKENS", tokens.shape[1])
    source = tiny_decoder.write_decoder(tmp_path / "llama", "llama")
    logits, expected = pretrained.our_forward(source, tokens)(), tiny_decoder.EXPECTED["llama/logits"]
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits[tokens != 0], expected[tokens != 0], atol=1e-5)


@pytest.mark.slow
def test_rounds_with_and_without_a_cache_are_compared(tmp_path, monkeypatch):
    tiny_bert.install_as_minilm(monkeypatch, tmp_path)
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mixtures, "TEXTS", 80)
    monkeypatch.setattr(mixtures, "HELD_OUT", 40)
    monkeypatch.setattr(pretrained, "LAYERS", (1,))
    whole = pretrained.get_config

    def small(preset):
        config = whole(preset)
        config.model.update(num_experts=4, upcycling="copy")
        config.data.seq_len = 12
        config.fl.update(clients=4, clients_per_round=2, local_steps=2, batch_size=4)
        return config

    monkeypatch.setattr(pretrained, "get_config", small)
    ((layers, cached, computed, ratio),) = pretrained.rounds_table(3).rows
    assert layers == 1 and ratio == pytest.approx(computed.median_s / cached.median_s)


def test_the_start_from_a_checkpoint_is_measured(monkeypatch):
    """In this process, which spares its imports."""
    monkeypatch.setattr(pretrained, "MIXTURE", pretrained.MIXTURE | SMALL)
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 2000)
    monkeypatch.setattr(pretrained, "STARTS", (("router", "float32"),))
    monkeypatch.setattr(pretrained, "start_in_child", pretrained.start_here)
    ((trained, time, kept, beside, share),) = pretrained.reading_table(3).rows
    assert trained == "model.train=router, float32" and time.median_s > 0
    per_layer = 4 * 16 * 16 + 2 * 16 + 2 * 16 + 16 * 4 + 4 * 3 * 16 * 12  # attention, norms, router, experts
    assert kept == pytest.approx(4e-6 * (2 * per_layer + 2 * 32 * 16 + 16))
    assert beside * share >= 0
