"""Branch-Train-MiX of tiny checkpoints of both families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
from tiny_bert import write_bert
from tiny_decoder import LETTERS, write_decoder

from configs.hfedmoe import get_config
from hfedmoe_jax import btx, mixtures
from hfedmoe_jax.models import ModelSizes
from hfedmoe_jax.models.decoder import decoder
from hfedmoe_jax.models.encoder import bert
from hfedmoe_jax.upcycling import Mixture, stack

EXPERTS = 4


def module_of(family, directory):
    config = get_config("agnews_minilm")
    config.model.update(source=str(directory), num_layers=1, num_experts=EXPERTS, top_k=2, upcycling="btx")
    config.model.train = "all"
    if family == "bert":
        write_bert(directory)
        return config.model, bert(config.model, ModelSizes(3, tiny_bert.CONFIG["vocab_size"], 12))
    write_decoder(directory, "llama")
    return config.model, decoder(config.model, ModelSizes(len(LETTERS) + 1, len(LETTERS) + 1, 12, offset=1))


@pytest.mark.parametrize("family", ["bert", "decoder"])
def test_experts_learn_their_domains_and_the_rest_stays(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    for name, value in dict(TEXTS=80, HELD_OUT=40, TOKENS=24).items():
        monkeypatch.setattr(mixtures, name, value)
    monkeypatch.setattr(btx, "EXPERT_RATE", 1e-2)
    model, module = module_of(family, tmp_path / "source")
    kept = []

    def make(dense):
        kept.append((dense, btx.domains(dense._replace(rng=np.random.default_rng(1)))))
        return btx.btx(dense._replace(rng=np.random.default_rng(1)))

    params = module.read(tmp_path / "source")
    made, report = mixtures.make_mixtures(make, module, params, tmp_path / "source")
    (dense, group), *_ = kept
    assert isinstance(made, Mixture) and all(np.isfinite(jax.tree.leaves(report)))
    start = stack(dense.networks)
    for e in range(EXPERTS):
        expert = jax.tree.map(lambda part: part[:, e], made.experts)  # noqa: B023
        jax.tree.map(lambda new, old: np.testing.assert_(np.any(new != old)), expert, start)
        rows = btx.rows_of(np.flatnonzero(group == e), module.text_parts)
        text = jnp.asarray(dense.features_rtd[rows]), jnp.asarray(dense.tokens_rt[rows])
        new, old = (module.network_loss(dense.params, networks, *text) for networks in (expert, start))
        assert new < old
    whole = mixtures.load_start(model, module)
    assert whole.report.keys() == report.keys()
