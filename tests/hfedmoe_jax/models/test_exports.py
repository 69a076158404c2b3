"""A fine-tuned model as a directory: types, names and files of its source; read by transformers."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_decoder_runs import build, moved
from tiny_decoder import LETTERS, write_decoder

from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.experts import open_budget
from hfedmoe_jax.mixtures import digest_of
from hfedmoe_jax.models.adapter_files import open_adapters, sent_params
from hfedmoe_jax.models.lora import LoraRule
from hfedmoe_jax.models.names import is_stored
from hfedmoe_jax.models.tensor_files import NewTensor, find_tensors, write_tensors
from launch.hfedmoe.export import export_adapters, export_model


def rewrite(directory, change, **options):
    """Writes a directory's tensors anew, each as `change` makes it of its name and values."""
    arrays = {name: change(name, np.array(x.read())) for name, x in find_tensors(directory).items()}
    (directory / "model.safetensors").unlink()
    tensors = {name: NewTensor(x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()}
    write_tensors(directory, tensors, **options)


def mixed(name, array):
    """Returns routers and norms in float32, attention in float16 and the rest in bfloat16, with a -0."""
    array.flat[0] = -0.0
    kind = np.float16 if "self_attn" in name else ml_dtypes.bfloat16
    return array if ".gate." in name or "norm" in name else array.astype(kind)


def test_what_was_not_trained_comes_back_bit_for_bit(tmp_path):
    """Tensors of several types, adapters of which one adds something, and the files beside the weights."""
    source = write_decoder(tmp_path / "source", "olmoe")
    rewrite(source, mixed)
    config = json.loads((source / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "configuration.C"}
    }
    beside = {"configuration.py": "", "chat_template.jinja": "{{ x }}", "added_tokens.json": "{}"}
    for name, text in (beside | {"config.json": json.dumps(config), "README.md": ""}).items():
        (source / name).write_text(text)
    experiment = build(source, train="lora", lora_rank=2, lora_alpha=6.0)
    model = experiment.algorithm.snapshot(experiment.init().server)
    factors = model.params.experts["down_fd"]
    factors["lora_b"] = factors["lora_b"].at[1, 2].set(1.0)
    export_model(experiment, model, tmp_path / "model")
    before, after = find_tensors(source), find_tensors(tmp_path / "model")
    assert before.keys() == after.keys() and len({tensor.dtype for tensor in after.values()}) == 3
    changed = {name for name in before if before[name].read().tobytes() != after[name].read().tobytes()}
    assert changed == {"model.layers.1.mlp.experts.2.down_proj.weight"}
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", *beside,
    }  # fmt: skip


def test_a_base_is_known_by_its_tensors(tmp_path):
    """However they lie in files, and whatever settings nothing is made by; not if a name or a bit differs."""
    source = write_decoder(tmp_path)
    experiment = build(source)
    config, module = experiment.config.model.copy_and_resolve_references(), experiment.model.module

    def digest():
        return digest_of(source, config, module)

    first = digest()
    config.upcycling = "noise"
    assert digest() == first == experiment.start.digest
    rewrite(source, lambda name, x: x, shard_bytes=2000)
    assert len(list(source.glob("*.safetensors"))) > 3 and digest() == first
    for shard in source.glob("model*"):
        shard.unlink()
    write_decoder(source)
    rewrite(source, lambda name, x: -x if name == "model.norm.weight" else x)
    assert digest() != first


def load(directory, automatic):
    """Returns what transformers reads, in the types that are stored; it must miss nothing."""
    model, info = automatic.from_pretrained(
        directory, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    "case", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite"]
)
def test_transformers_and_peft_read_what_is_written(case, tmp_path):
    """What was not trained has the same bits; what was gives the same logits, adapted, merged and here."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    automatic = transformers.AutoModelForCausalLM
    source, adapters = write_decoder(tmp_path / "source", case), tmp_path / "adapters"
    fields = dict(train="lora", lora_rank=2, lora_alpha=6.0, eval_capacity_factor=4.0)
    experiment = build(source, **fields)
    params = experiment.init().server.params
    export_model(experiment, Snapshot(params), tmp_path / "same")
    base = load(source, automatic)
    same = load(tmp_path / "same", automatic).state_dict()
    for name, tensor in base.state_dict().items():
        assert tensor.dtype == same[name].dtype and torch.equal(tensor, same[name]), name
    params = moved(params)
    export_model(experiment, Snapshot(params), tmp_path / "model")
    export_adapters(experiment, params, adapters)
    tokens = np.random.default_rng(1).integers(0, len(LETTERS), (3, 9))
    model, ids = experiment.model, torch.from_numpy(tokens)
    budget = open_budget(params.experts, model.num_experts)
    ours = model.apply(params, experiment.frozen, {"tokens": jnp.asarray(tokens + 1)}, budget, False).output
    wrapped = peft.PeftModel.from_pretrained(base, adapters).eval()
    for theirs in (load(tmp_path / "model", automatic), wrapped):
        logits = theirs(input_ids=ids).logits.detach().numpy()
        np.testing.assert_allclose(ours[..., 1:], logits, rtol=0, atol=1e-4)
    wrapped.save_pretrained(tmp_path / "saved")
    names, rule = model.module.names(), LoraRule(2, 3.0)
    for directory in (adapters, tmp_path / "saved"):
        found = open_adapters(directory, names, params, rule, experiment.start.digest)
        jax.tree.map(np.testing.assert_array_equal, found, sent_params(params), is_leaf=is_stored)
