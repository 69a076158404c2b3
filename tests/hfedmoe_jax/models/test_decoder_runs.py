"""A checkpoint of the hub in, fine-tuned by clients under budgets, and out again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import LETTERS, write_decoder

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models.adapter_files import open_adapters
from hfedmoe_jax.models.decoder import Decoder
from hfedmoe_jax.models.lora import LoraRule
from hfedmoe_jax.models.tensor_files import find_tensors
from launch.hfedmoe.export import can_export, export_adapters, export_model

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
    assert set(before) == set(after)
    for name in set(original) & set(before):  # the others are fused in one of the two
        np.testing.assert_array_equal(original[name].read(), before[name].read())
    changed = {name for name in before if not np.array_equal(before[name].read(), after[name].read())}
    assert changed and all("experts." in name or "gate." in name for name in changed)


@pytest.mark.parametrize(
    ("case", "base"),
    [("mixtral", "nf4"), pytest.param("deepseek_v2_lite", "float32", marks=pytest.mark.slow)],
)
def test_adapters_go_back_as_such_and_merged(case, base, tmp_path):
    """W + scale * A B of the checkpoint's own W, and A and B themselves as PEFT names and lays them."""
    source = write_decoder(tmp_path / "source", case)
    experiment = build(source, train="lora", lora_rank=2, lora_alpha=6.0, base=base)
    params = moved(experiment.init().server.params)
    export_model(experiment, Snapshot(params), tmp_path / "model")
    export_adapters(experiment, params, tmp_path / "adapters")
    (tmp_path / "adapters" / "adapter_model.safetensors").rename(tmp_path / "adapters" / "model.safetensors")
    stored, after, factors = (find_tensors(tmp_path / name) for name in ("source", "model", "adapters"))
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 6.0, "LORA")
    found = set()
    for name in after:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        module = module.replace("block_sparse_moe.gate", "mlp.gate")  # as transformers 5 names it
        if f"{module}.lora_A.weight" in factors:
            assert name.removesuffix(".weight").rsplit(".", 1)[-1] in config["target_modules"]
            a, b = (factors[f"{module}.lora_{x}.weight"].read() for x in "AB")
            found |= {f"{module}.lora_{x}.weight" for x in "AB"}
            if name in stored:  # the others are fused in the source
                expected = stored[name].read() + 3.0 * (b @ a)
                np.testing.assert_allclose(after[name].read(), expected, rtol=1e-5, atol=1e-6)
        elif f"{module}.weight" in factors:
            found.add(f"{module}.weight")
            np.testing.assert_array_equal(factors[f"{module}.weight"].read(), after[name].read())
        elif name in stored:
            np.testing.assert_array_equal(stored[name].read(), after[name].read())
    assert found == set(factors) and any(".experts.1." in name for name in found)
    assert any("self_attn" in name and np.any(factors[name].read()) for name in found)


def test_a_run_starts_from_adapters_of_its_base_alone(tmp_path):
    source, adapters = write_decoder(tmp_path / "source"), tmp_path / "adapters"
    fields = dict(train="lora", lora_rank=2, lora_alpha=6.0)
    first = build(source, **fields)
    params = moved(first.init().server.params)
    export_adapters(first, params, adapters)
    second = build(source, adapters=str(adapters), **fields)
    found = second.init().server.params
    assert second.start.digest == first.start.digest
    for group in ("experts", "router"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, group), getattr(params, group))
    factors = {path: leaf for path, leaf in flat(found.shared).items() if "lora" in path}
    assert len(factors) == 8
    for path, leaf in factors.items():
        np.testing.assert_array_equal(leaf, flat(params.shared)[path])
    other = write_decoder(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    for directory, train, problem in ((other, "lora", "another base"), (source, "router", "reads none")):
        with pytest.raises(InputError, match=r"model\.adapters=.*" + problem):
            build(directory, **fields | dict(adapters=str(adapters), train=train))

    right = LoraRule(2, 3.0)

    def opened(directory=adapters, rule=right):
        return open_adapters(directory, first.model.module.names(), params, rule, first.start.digest)

    for arguments, problem in (
        (dict(rule=LoraRule(3, 2.0)), r"has r=2, the run 3; set model\.lora_rank"),
        (dict(rule=LoraRule(2, 1.0)), r"has lora_alpha=6\.0, the run 2\.0"),
        (dict(directory=tmp_path), "has no adapter_config.json"),
    ):
        with pytest.raises(InputError, match=r"model\.adapters=.*" + problem):
            opened(**arguments)
    content = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps({**content, "hfedmoe_base": None}))
    stored = adapters / "adapter_model.safetensors"
    whole = stored.read_bytes()
    for broken, problem in (
        (whole[:-4], "is cut off"),
        (whole.replace(b".0.w1.lora_A", b".0.w1.lora_C"), "missing"),
    ):
        stored.write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.adapters=.*" + problem):
            opened()


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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
