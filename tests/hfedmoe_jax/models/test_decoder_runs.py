"""A checkpoint of the hub in, fine-tuned by clients under budgets, and out again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import LETTERS, write_decoder

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.decoder import Decoder
from hfedmoe_jax.models.tensor_files import find_tensors
from launch.hfedmoe.export import can_export, export_model

SEQ_LEN = 12


def run_config(directory, **model):
    config = get_config("smoke")
    config.model.update(family="decoder", source=str(directory), **model)
    config.data.update(tokenizer="checkpoint", seq_len=SEQ_LEN)
    config.task.name = "language_modeling"
    return config


def build(directory, **model):
    return Experiment(run_config(directory, **model), make_mesh(jax.devices()[:1]))


def test_a_run_begins_where_the_checkpoint_is(tmp_path):
    """Tokens are one more than the tokenizer's, whose token 0 is no padding; the loss is the checkpoint's."""
    config = run_config(write_decoder(tmp_path), eval_capacity_factor=2.0)
    config.eval.max_examples = 0
    experiment = Experiment(config, make_mesh(jax.devices()[:1]))
    tokens = experiment.data.validation["tokens"]
    assert experiment.data.token_offset == 1 and experiment.data.vocab_size == len(LETTERS) + 1
    assert set(np.unique(tokens)) <= set(range(len(LETTERS) + 1)) and LETTERS[tokens[0, 0] - 1].isalpha()
    state = experiment.init()
    quality, _ = experiment.splits.validate(experiment.algorithm.snapshot(state.server))
    module, plain = experiment.model.module, experiment.model.module.read(tmp_path)
    plain = jax.tree.map(np.asarray, plain, is_leaf=lambda x: hasattr(x, "place"))
    # The same module as it is published: tokens as the tokenizer numbers them, and all of them real.
    published = AllReal(module.sizes._replace(offset=0), module.shape, 2.0, 2.0)
    plain = jax.tree.map(jnp.asarray, plain)
    apply = jax.jit(lambda tokens: published.apply({"params": plain}, {"tokens": tokens}, None, False).output)
    total = count = 0.0
    for row in tokens:
        text = row[row != 0] - 1
        logits = np.asarray(jax.nn.log_softmax(apply(jnp.asarray(text)[None])[0]))
        total -= np.sum(logits[np.arange(len(text) - 1), text[1:]])
        count += len(text) - 1
    assert quality.scores["loss"] == pytest.approx(total / count, rel=1e-4)
    assert quality.scores["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)


def test_texts_without_labels_are_a_corpus(tmp_path):
    source, text = write_decoder(tmp_path / "source"), tmp_path / "text.csv"
    text.write_text("text\n" + "".join(f"{'abcde' * 4}{LETTERS[i]}{LETTERS[-i]}\n" for i in range(20)))
    config = run_config(source)
    config.data.update(source="file", train_path=str(text), label_column="")
    config.partition.name = "iid"
    data = Experiment(config, make_mesh(jax.devices()[:1])).data
    assert data.label_names == ("text",)
    assert sum(map(len, data.client_train)) + sum(map(len, data.client_holdout)) == len(data.train["tokens"])
    with pytest.raises(InputError, match=r"data\.label_column=''.*task\.name=classification asks for labels"):
        config = get_config("smoke")
        config.data.label_column = ""
        Experiment(config, make_mesh(jax.devices()[:1]))


class AllReal(Decoder):
    """Without padding, so that token 0 is a letter."""

    def mask(self, batch):
        return jnp.ones_like(batch["tokens"], bool)


@pytest.mark.parametrize(
    "case", ["mixtral", "qwen2_moe", pytest.param("deepseek_v2_lite", marks=pytest.mark.slow)]
)
def test_experts_learn_under_budgets_and_the_model_goes_back(case, tmp_path):
    source = write_decoder(tmp_path / "source", case)
    experiment = build(source, train="router")
    state = experiment.init()
    assert can_export(experiment)
    export_model(experiment, experiment.algorithm.snapshot(state.server), tmp_path / "before")
    losses = []
    for _ in range(2):
        state, row, failures = experiment.step(state)
        losses.append(row["train_loss"])
        assert failures == [] and 0 < row["trained_share"] <= 0.5
    experiment.close()
    export_model(experiment, experiment.algorithm.snapshot(state.server), tmp_path / "after")
    original, before, after = (find_tensors(tmp_path / name) for name in ("source", "before", "after"))
    assert (tmp_path / "after" / "config.json").read_text() and (
        tmp_path / "after" / "tokenizer.json"
    ).exists()
    assert set(original) == set(before) == set(after)
    for name in original:
        np.testing.assert_array_equal(original[name].read(), before[name].read())
    changed = {name for name in before if not np.array_equal(before[name].read(), after[name].read())}
    assert changed and all("experts." in name or "gate." in name for name in changed)


def moved(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), tree)


def test_what_cannot_be_fine_tuned_is_refused(tmp_path):
    for case, fields, problem in (
        ("mixtral", {"model_type": "gpt2"}, "model_type='gpt2'; model.family=decoder reads"),
        ("mixtral", {"vocab_size": 20}, "is of 20 tokens, its tokenizer of 23"),
        ("mixtral", {"num_hidden_layers": 3}, "layers.2.* is missing"),
    ):
        with pytest.raises(InputError, match=problem) as error:
            build(write_decoder(tmp_path / "source", case, **fields))
        assert "\n" not in str(error.value)
    config = run_config(write_decoder(tmp_path / "source"))
    config.task.name = "classification"
    with pytest.raises(
        InputError, match=r"task\.name='classification'.*use one of language_modeling, multiple_choice"
    ):
        Experiment(config, make_mesh(jax.devices()[:1]))
    config = run_config(tmp_path / "source")
    config.mesh.experts = 3
    with pytest.raises(InputError, match=r"mesh\.experts=3: does not divide the 4 experts"):
        Experiment(config, make_mesh(jax.devices()[:1]))
