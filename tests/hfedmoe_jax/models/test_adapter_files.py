"""Adapters as directories of PEFT: what lies where, back again, and whose are refused."""

import json
import re

import jax
import numpy as np
import pytest
from test_decoder_runs import build, moved
from tiny_decoder import write_decoder

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models.adapter_files import open_adapters
from hfedmoe_jax.models.lora import LoraRule
from hfedmoe_jax.models.names import StoredParam
from hfedmoe_jax.models.tensor_files import NewTensor, find_tensors, write_tensors
from launch.hfedmoe.export import export_adapters, export_model
from launch.hfedmoe.run_notes import adapters_note

FIELDS = dict(train="lora", lora_rank=2, lora_alpha=6.0)
RULE = LoraRule(2, 3.0)
GATE, UP, DOWN = ("gate_up_proj", 0, 2), ("gate_up_proj", 1, 2), ("down_proj", 0, 1)
PLACES = dict(w1=GATE, w3=UP, w2=DOWN, gate_proj=GATE, up_proj=UP, down_proj=DOWN)
"""Of an expert's matrices: the parameter that they are fused into, which of its parts, and of how many."""
WRAPPERS = dict(gate_up_proj="base_layer.", down_proj="")
"""Where PEFT keeps the factors of a fused parameter."""


def read(directory):
    return {name: np.array(tensor.read()) for name, tensor in find_tensors(directory).items()}


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def write_config(directory, content):
    (directory / "adapter_config.json").write_text(json.dumps(content))


def adapted(weights, factors, config, num_experts):
    """Returns weights of one expert each with adapters as PEFT 0.21 adds them to a model of transformers 5.

    Its ParamWrapper adds "o r e, e r i -> e o i" of B [out, rank * experts] and A [experts * rank, in].
    """
    result, used = dict(weights), set()

    def stored(name):
        used.add(f"base_model.model.{name}")
        return factors[f"base_model.model.{name}"]

    for name, weight in weights.items():
        module = name.replace("block_sparse_moe", "mlp").removesuffix("weight")
        expert = re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)\.(\w+)\.", module)
        if expert and config["target_parameters"]:
            parameter, part, parts = PLACES[expert[3]]
            target = f"mlp.experts.{parameter}"
            assert target in config["target_parameters"]
            module = expert[1] + WRAPPERS[parameter]
            rank = config["rank_pattern"].get(target, config["r"])
            scale = config["alpha_pattern"].get(target, config["lora_alpha"]) / rank
            b = stored(f"{module}lora_B.weight").reshape(-1, rank, num_experts)
            a = stored(f"{module}lora_A.weight").reshape(num_experts, rank, -1)
            delta = np.einsum("ore,eri->eoi", b, a)[int(expert[2])]
            result[name] = weight + scale * np.split(delta, parts)[part]
        elif any(module.endswith(f".{target}.") for target in config["target_modules"]):
            scale = config["lora_alpha"] / config["r"]
            result[name] = weight + scale * stored(f"{module}lora_B.weight") @ stored(
                f"{module}lora_A.weight"
            )
        elif any(module.endswith(f".{target}.") for target in config["modules_to_save"]):
            result[name] = stored(f"{module}weight")
    assert used == set(factors)
    return result


@pytest.mark.parametrize(
    ("case", "base"),
    [
        ("mixtral", "nf4"),
        ("deepseek", "float32"),
        pytest.param("deepseek_v2_lite", "float32", marks=pytest.mark.slow),
    ],
)
def test_adapters_go_back_as_such_and_merged(case, base, tmp_path):
    """W + scale * A B of the checkpoint's own W, whatever is kept of it; A and B as PEFT reads them."""
    source = write_decoder(tmp_path / "source", case)
    experiment = build(source, base=base, **FIELDS)
    params = moved(experiment.init().server.params)
    export_model(experiment, Snapshot(params), tmp_path / "model")
    export_adapters(experiment, params, tmp_path / "adapters")
    config, stored, model = config_of(tmp_path / "adapters"), read(source), read(tmp_path / "model")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 6.0, "LORA")
    count = experiment.model.module.num_experts
    expected = adapted(stored, read(tmp_path / "adapters"), config, count)
    assert set(model) == set(stored)
    for name, array in model.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        touched = any(part in name for part in ("self_attn", ".experts.", ".gate.")) and "norm" not in name
        assert np.any(array != stored[name]) == touched, name


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Returns the directory of a tiny Mixtral, an experiment with it, and other parameters of its."""
    source = write_decoder(tmp_path_factory.mktemp("mixtral"))
    experiment = build(source, **FIELDS)
    return source, experiment, moved(experiment.init().server.params)


def test_a_run_starts_from_adapters_of_its_base_alone(mixtral, tmp_path):
    source, first, params = mixtral
    adapters = tmp_path / "adapters"
    export_adapters(first, params, adapters)
    second = build(source, adapters=str(adapters), **FIELDS)
    assert second.start.digest == first.start.digest and not adapters_note(adapters)
    check_same(second.init().server.params, params)
    other = write_decoder(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    for directory, train, problem in ((other, "lora", "another base"), (source, "router", "reads none")):
        with pytest.raises(InputError, match=r"model\.adapters=.*" + problem):
            build(directory, **FIELDS | dict(adapters=str(adapters), train=train))


def check_same(found, params):
    """Compares experts and routers, and the factors among the rest, bit for bit."""
    for group in ("experts", "router"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, group), getattr(params, group))
    factors = {path: leaf for path, leaf in flat(found.shared).items() if "lora" in path}
    assert len(factors) == 8
    for path, leaf in factors.items():
        np.testing.assert_array_equal(leaf, flat(params.shared)[path])


@pytest.fixture
def opener(mixtral, tmp_path):
    """Returns a directory of adapters, the parameters in it, and a function that opens it."""
    _, first, params = mixtral
    adapters = tmp_path / "adapters"
    export_adapters(first, params, adapters)

    def opened(directory=adapters, rule=RULE):
        return open_adapters(directory, first.model.module.names(), params, rule, first.start.digest)

    return adapters, params, opened


def test_experts_that_are_modules_are_read_too(opener):
    """As transformers 4 has them: a module an expert, under the published names."""
    adapters, params, opened = opener
    tensors = {name: x for name, x in read(adapters).items() if ".experts." not in name}
    tensors = {name.replace("mlp.gate", "block_sparse_moe.gate"): x for name, x in tensors.items()}
    for path, leaf in params.experts.items():
        for factor, which in (("lora_a", "A"), ("lora_b", "B")):
            for layer, expert in np.ndindex(*leaf[factor].shape[:2]):
                part = {"gate_df": "w1", "up_df": "w3", "down_fd": "w2"}[path]
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                tensors[f"{module}.lora_{which}.weight"] = np.asarray(leaf[factor][layer, expert]).T.copy()
    save(adapters, tensors)
    found = opened()
    for path, leaf in flat(params.experts).items():
        np.testing.assert_array_equal(np.asarray(flat(found["experts"])[path]), leaf)


def save(adapters, tensors):
    write_tensors(adapters, {name: NewTensor(x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()})
    (adapters / "model.safetensors").rename(adapters / "adapter_model.safetensors")


def test_adapters_that_would_be_misread_are_refused(opener, tmp_path):
    adapters, _, opened = opener
    kept = config_of(adapters)
    fused = "mlp.experts.gate_up_proj"
    for arguments, fields, problem in (
        (dict(rule=LoraRule(3, 2.0)), {}, r"has r=2, the run 3; set model\.lora_rank"),
        (dict(rule=LoraRule(2, 1.0)), {}, r"has lora_alpha=6\.0, the run 2\.0"),
        (dict(directory=tmp_path), {}, "has no adapter_config.json"),
        ({}, dict(lora_alpha="6"), "has lora_alpha='6'"),
        ({}, dict(peft_type="LOHA"), "has peft_type='LOHA'"),
        ({}, dict(use_rslora=True), "has use_rslora=True, which is not supported"),
        ({}, dict(use_dora=True), "has use_dora=True"),
        ({}, dict(alpha_pattern={}), rf"scales {fused} by 6\.0 / 4, the run by 3"),
        ({}, dict(alpha_pattern={fused: 12, "q_proj": 2}), "scales q_proj by 2 / 2, the run by 3"),
        ({}, dict(rank_pattern={fused: 4, "q_proj": 0}), r"scales q_proj by 6\.0 / 0"),
    ):
        write_config(adapters, kept | fields)
        with pytest.raises(InputError, match=r"model\.adapters=.*" + problem) as caught:
            opened(**arguments)
        assert "\n" not in str(caught.value)
    ranks, alphas = {fused: 4, "q_proj": 4}, {fused: 12, "q_proj": 12.0}  # one alpha / r for all
    del kept["hfedmoe_base"]
    write_config(adapters, kept | dict(rank_pattern=ranks, alpha_pattern=alphas))
    assert "names its base only" in adapters_note(adapters)
    assert all(isinstance(leaf, StoredParam) for leaf in flat(opened()).values())
    stored = adapters / "adapter_model.safetensors"
    whole, tensors = stored.read_bytes(), read(adapters)
    mixed = next(name for name in tensors if name.endswith("experts.base_layer.lora_B.weight"))
    tensors[mixed][0, -1] = 1  # a gate's output from a rank of the up matrix
    save(adapters, tensors)
    with pytest.raises(InputError, match=rf"{mixed} has ranks that several of its 2 matrices share"):
        opened()
    for broken, problem in (
        (whole[:-4], "is cut off"),
        (whole.replace(b"experts.lora_A", b"experts.lora_C"), "missing"),
    ):
        stored.write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.adapters=.*" + problem):
            opened()


def flat(tree):
    stored = dict(is_leaf=lambda x: isinstance(x, StoredParam))
    leaves = jax.tree_util.tree_leaves_with_path(tree, **stored)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
