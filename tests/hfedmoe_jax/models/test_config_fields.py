"""config.json and headers as nobody should write them: each is read, or refused in one line that names it."""

import json

import numpy as np
import pytest
import tiny_bert
import tiny_decoder
import tiny_switch_t5
from hypothesis import given
from hypothesis import strategies as st

from configs.hfedmoe import get_config
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelSizes, families
from hfedmoe_jax.models.decoder_sizes import read_sizes
from hfedmoe_jax.models.encoder_sizes import read_encoder_sizes
from hfedmoe_jax.models.switch_t5_sizes import read_switch_sizes
from hfedmoe_jax.models.tensor_files import INDEX, SINGLE, NewTensor, find_tensors, write_tensors
from launch.main import main

DECODERS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2_lite", "deepseek_v2", "llama")


def decoder_config(case):
    return dict(tiny_decoder.EXPECTED[f"{case}/config"])


JUNK = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        10.5,
        float("inf"),
        float("nan"),
        10**30,
        "16",
        "x",
        "",
        [],
        [1],
        {},
        {"a": 1},
    ]
)
"""Values that some field of a config.json may have by mistake."""


@given(st.data(), st.sampled_from(DECODERS), JUNK)
def test_any_field_of_a_decoder_is_read_or_refused(data, case, junk):
    config = decoder_config(case)
    name = data.draw(st.sampled_from(sorted(config)))
    if name == "rope_parameters" and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(config[name])))
        junk = config[name] | {inner: junk}
    try:
        read_sizes(config | {name: junk}, "DIR")
    except InputError as error:
        assert error.field == "model.source" and error.value == "DIR" and "\n" not in str(error)


@given(st.data(), JUNK)
def test_any_field_of_a_switch_transformer_is_read_or_refused(data, junk):
    config = tiny_switch_t5.EXPECTED["roomy/config"]
    name = data.draw(st.sampled_from(sorted(config)))
    try:
        read_switch_sizes(config | {name: junk}, "DIR")
    except InputError as error:
        assert error.field == "model.source" and "\n" not in str(error)


@pytest.mark.parametrize("junk", [None, 0, "x", 10.5, [], True])
def test_any_field_of_a_bert_is_read_or_refused(junk, tmp_path):
    for name in tiny_bert.CONFIG:
        (tmp_path / "config.json").write_text(json.dumps(tiny_bert.CONFIG | {name: junk}))
        try:
            read_encoder_sizes(str(tmp_path))
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)


REFUSED = [
    ("mixtral", {"num_attention_heads": 3}, "num_attention_heads=3, which does not divide hidden_size=16"),
    ("mixtral", {"num_key_value_heads": 3}, "num_key_value_heads=3, which does not divide"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9, more than the experts"),
    ("mixtral", {"sliding_window": 8}, "sliding_window, or layer_types"),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window, or layer_types"),
    ("olmoe", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config 'gptq'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"quantization_config": "fp8"}, "quantization_config 'fp8'"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'; only 'greedy' and"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'; only 'softmax'"),
    ("deepseek_v2", {"n_group": 3}, "n_group=3 and topk_group=2 of 8 experts"),
    ("deepseek_v2", {"first_k_dense_replace": 3}, "first_k_dense_replace=3, which leaves no experts"),
    ("deepseek_v2_lite", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "no factor"),
]


@pytest.mark.parametrize(("case", "fields", "problem"), REFUSED)
def test_what_a_decoder_does_not_compute_is_refused(case, fields, problem):
    config = {name: x for name, x in decoder_config(case).items() if name != "head_dim"}
    with pytest.raises(InputError, match=problem):
        read_sizes(config | fields)


def test_a_window_that_no_text_reaches_is_none():
    config = decoder_config("mixtral")
    config.pop("layer_types", None)
    assert read_sizes(config | {"sliding_window": 64}) == read_sizes(config)


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0]}, {"data_offsets": ["0", "8"]}, {"data_offsets": [-8, 0]}, {"data_offsets": 8},
        {"dtype": ["F32"]}, {"dtype": None}, {"shape": 2}, {"shape": ["2"]}, {"shape": [-2]},
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(change, tmp_path):
    text = json.dumps({"a": HEADER["a"] | change}).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match=rf"{SINGLE}.*has no header of safetensors"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [[], {}, ["a"], {"a": 1}, None, "a"])
def test_an_index_that_is_none_is_refused(weight_map, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="has no weight_map of tensors to files"):
        find_tensors(tmp_path)


def test_an_index_beside_a_whole_file_does_not_count(tmp_path):
    one = np.ones(2, np.float32)
    write_tensors(tmp_path, {"a": NewTensor(one.dtype, one.shape, lambda: one)})
    (tmp_path / INDEX).write_text("{")
    assert list(find_tensors(tmp_path)) == ["a"]


def test_the_head_of_a_model_that_ties_it_is_not_needed_and_not_refused(tmp_path):
    source = tiny_decoder.write_decoder(tmp_path, "llama")
    stored = {name: np.array(tensor.read()) for name, tensor in find_tensors(source).items()}
    assert decoder_config("llama")["tie_word_embeddings"] and "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    write_tensors(source, {n: NewTensor(x.dtype, x.shape, lambda x=x: x) for n, x in stored.items()})
    config = get_config("decoder").model
    config.update(source=str(source), num_layers=1, num_experts=2, upcycling="copy")
    assert "lm_head" not in families["decoder"](config, ModelSizes(0, 22, 8, 1)).read(source)


SPOILED = {
    "is cut off in tensor": lambda source: (source / SINGLE).write_bytes((source / SINGLE).read_bytes()[:-1]),
    "holds neither": lambda source: (source / SINGLE).rename(source / "pytorch_model.bin"),
    "quantization_config": lambda source: rewrite(source, quantization_config={"quant_method": "awq"}),
    "layers.2.* is missing": lambda source: rewrite(source, num_hidden_layers=3),
    "data.seq_len=32: above the checkpoint's 16 positions": lambda source: rewrite(
        source, max_position_embeddings=16
    ),
}


def rewrite(source, **fields):
    """Changes a config.json."""
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("problem", SPOILED)
def test_a_dry_run_refuses_what_a_run_would(problem, tmp_path, capsys):
    source = tiny_decoder.write_decoder(tmp_path / "source")
    SPOILED[problem](source)
    command = ["--config=configs/hfedmoe.py:decoder", f"--config.model.source={source}", "--dry_run"]
    assert main([*command, "--config.data.seq_len=32"]) == 2
    said = capsys.readouterr().err
    assert problem.split(".*")[-1] in said and said.count("\n") == 1
