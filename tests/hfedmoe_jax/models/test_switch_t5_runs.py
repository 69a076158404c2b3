"""A Switch Transformer in, fine-tuned on classes' names by clients under budgets, and out again."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder_runs import moved
from tiny_switch_t5 import EXPECTED, write_switch_t5

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh
from hfedmoe_jax.data.tokenizers import load_tokenizer
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models import ModelSizes, families
from hfedmoe_jax.models.switch_t5 import SwitchT5
from hfedmoe_jax.models.switch_t5_sizes import read_switch_sizes
from hfedmoe_jax.models.tensor_files import find_tensors
from launch.hfedmoe.export import can_export, export_adapters, export_model


def run_config(directory, **model):
    config = get_config("smoke")
    config.model.update(family="switch_t5", source=str(directory), **model)
    config.data.update(tokenizer="checkpoint", seq_len=12)
    config.task.name = "text_to_text"
    config.eval.update(batch_size=16, max_examples=16)
    return config


def build(directory, **model):
    return Experiment(run_config(directory, **model), make_mesh(jax.devices()[:1]))


def test_experts_learn_under_budgets_and_the_model_goes_back(tmp_path):
    source = write_switch_t5(tmp_path / "source")
    experiment = build(source, train="router", eval_capacity_factor=4.0)
    state = experiment.init()
    check_likelihoods(experiment, state)
    assert can_export(experiment)
    export_model(experiment, experiment.algorithm.snapshot(state.server), tmp_path / "before")
    for _ in range(2):
        state, row, failures = experiment.step(state)
        assert failures == [] and 0 < row["trained_share"] <= 0.5 and np.isfinite(row["train_loss"])
    experiment.close()
    export_model(experiment, experiment.algorithm.snapshot(state.server), tmp_path / "after")
    original, before, after = (find_tensors(tmp_path / name) for name in ("source", "before", "after"))
    assert set(original) == set(before) == set(after)
    for name in original:
        np.testing.assert_array_equal(original[name].read(), before[name].read())
    changed = {name for name in before if not np.array_equal(before[name].read(), after[name].read())}
    assert all("experts." in name or "router." in name for name in changed)
    for stack in ("encoder", "decoder"):  # experts of both are in one array
        assert any(name.startswith(stack) and "experts." in name for name in changed)


def check_likelihoods(experiment, state):
    """A class is as likely as the tokens of its name, each text and each class on its own."""
    quality, _ = experiment.splits.validate(experiment.algorithm.snapshot(state.server))
    rows, _ = experiment.splits.validation
    module = experiment.model.module.clone(capacity_factor=4.0)  # none is dropped
    params = module.read(pathlib.Path(experiment.config.model.source))
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params, is_leaf=lambda x: hasattr(x, "place"))
    answers = experiment.data.validation["choices"][0]
    tokenizer = load_tokenizer(experiment.config.model.source)
    for name, answer in zip(experiment.data.label_names, answers, strict=True):
        assert [int(x) for x in answer if x] == [*tokenizer.encode(name, add_special_tokens=False).ids, 1]

    @jax.jit
    def logits(tokens, answer):
        return module.apply({"params": params}, {"tokens": tokens, "answers": answer}).output.logits

    each = []
    for answer in answers:
        tokens = rows["tokens"]
        log_probs = jax.nn.log_softmax(logits(tokens, np.tile(answer, (len(tokens), 1))))
        each.append([sum(float(text[i, t]) for i, t in enumerate(answer) if t) for text in log_probs])
    labels = rows["labels"]
    assert quality.scores["accuracy"] == pytest.approx(np.mean(np.argmax(each, axis=0) == labels))
    right = sum(each[label][text] for text, label in enumerate(labels))
    count = np.sum(answers[labels] != 0)
    assert quality.scores["loss"] == pytest.approx(-right / count, rel=1e-5)


def test_layers_see_the_tokens_of_their_stack():
    shape = read_switch_sizes(EXPECTED["uneven/config"])
    module = SwitchT5(ModelSizes(1, 1, 1), shape, 4.0, 4.0)
    batch = {"tokens": jnp.array([[5, 6, 0], [7, 0, 0]]), "answers": jnp.array([[8, 9, 3, 1], [8, 1, 0, 0]])}
    out, _ = jax.jit(module.init_with_output)(jax.random.key(0), batch)
    mask = module.mask(batch)
    np.testing.assert_array_equal(mask.sum(-1), [[2, 1], [4, 2]])
    gates = out.routing.gates.reshape((*mask.shape, 4))
    np.testing.assert_allclose(gates.sum(-1)[np.asarray(mask)], 1, rtol=1e-6)
    own = out.routing.own.reshape(gates.shape)
    np.testing.assert_array_equal(own.any(-1), mask)
    assert out.permit.shape == (2, 4)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_type": "t5"}, "model_type='t5'; model.family=switch_t5 reads 'switch_transformers'"),
        ({"dense_act_fn": "gated-gelu"}, "dense_act_fn='gated-gelu'; only 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False; only True"),
        ({"num_sparse_encoder_layers": 3}, "of experts among 2 layers"),
        ({"d_ff": None}, "config.json has no d_ff"),
        ({"vocab_size": 20}, "is of 20 tokens, its tokenizer of 30"),
        ({"num_layers": 4, "num_sparse_encoder_layers": 2}, "encoder.block.3.*is missing"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(fields, problem, tmp_path):
    config = run_config(write_switch_t5(tmp_path, **fields)).model
    with pytest.raises(InputError, match=problem) as error:
        families["switch_t5"](config, ModelSizes(30, 30, 12)).read(tmp_path)
    assert "\n" not in str(error.value)


def test_other_tasks_and_published_sizes_are_refused(tmp_path):
    config = run_config(write_switch_t5(tmp_path))
    config.task.name = "classification"
    with pytest.raises(InputError, match=r"task\.name='classification'.*use one of text_to_text"):
        Experiment(config, make_mesh(jax.devices()[:1]))
    with pytest.raises(InputError, match=r"'switch_base_8': is a published size, whose weights are not here"):
        build("switch_base_8")


def test_peft_adds_the_same_adapters(tmp_path):
    """To attention of three kinds and to experts, not to dense networks with the same names of modules."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    source, adapters = write_switch_t5(tmp_path / "source"), tmp_path / "adapters"
    experiment = build(source, train="lora", lora_rank=2, lora_alpha=6.0)
    params = moved(experiment.init().server.params)
    export_model(experiment, Snapshot(params), tmp_path / "model")
    export_adapters(experiment, params, adapters)
    plain, merged = (
        transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, dtype="auto").eval()
        for directory in (source, tmp_path / "model")
    )
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 30, (3, 9)))
    inputs = dict(input_ids=ids, decoder_input_ids=ids[:, :4])
    before = plain(**inputs).logits.detach().numpy()
    adapted = peft.PeftModel.from_pretrained(plain, adapters).eval()(**inputs).logits.detach().numpy()
    np.testing.assert_allclose(adapted, merged(**inputs).logits.detach().numpy(), rtol=0, atol=1e-4)
    assert np.max(np.abs(adapted - before)) > 0.1
