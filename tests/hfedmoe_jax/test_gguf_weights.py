"""A llama in a GGUF file becomes a directory of the hub: weights bit for bit, sizes and tokenizer."""

import json
import sys

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from hfedmoe_jax import pretrained
from hfedmoe_jax.data.tokenizers import load_tokenizer
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.gguf_weights import convert_gguf
from hfedmoe_jax.models.names import read_config
from hfedmoe_jax.models.tensor_files import find_tensors

WIDTH, HIDDEN, HEADS, KEY_HEADS, LAYERS = 32, 64, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "th", "he", "12"]
MERGES = ["Ġ t", "t h", "h e", "1 2"]


def four_bits(rng, *shape):
    """Returns values that 4 bits a value hold exactly: m + d q in blocks of 32, with q from 0 to 15."""
    q = rng.integers(0, 16, (*shape[:-1], shape[-1] // 32, 32))
    q[..., :2] = 0, 15
    step, least = (2.0 ** rng.integers(-6, -3, (*q.shape[:-1], 1)) for _ in range(2))
    return (q * step - least).reshape(shape).astype(np.float32)


def neighbours(matrix, heads):
    """Returns rows in GGUF's order: of each head, row i and row i + half are neighbours."""
    size = len(matrix) // heads
    order = [head * size + i + part for head in range(heads) for i in range(size // 2)
             for part in (0, size // 2)]  # fmt: skip
    return matrix[order]


def drawn():
    """Returns tensors by their names on the hub."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        keys = KEY_HEADS * WIDTH // HEADS
        for part, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (keys, WIDTH),
            "self_attn.v_proj": (keys, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }.items():  # fmt: skip
            tensors[f"{name}{part}.weight"] = four_bits(rng, *shape)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{part}.weight"] = rng.normal(size=WIDTH).astype(np.float32)
    tensors["model.norm.weight"] = rng.normal(size=WIDTH).astype(np.float32)
    tensors["model.embed_tokens.weight"] = four_bits(rng, len(TOKENS), WIDTH)
    return tensors


PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path, architecture="llama", splitter="smollm"):
    gguf = pytest.importorskip("gguf", reason="the package gguf writes the file")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    for name, values in drawn().items():
        *layer, part = name.removesuffix(".weight").replace("model.layers.", "").split(".", 1)
        if not name.startswith("model.layers."):
            layer, part = [], name.removesuffix(".weight")
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_HEADS}.get(part)
        values = neighbours(values, heads) if heads else values
        stored = f"blk.{layer[0]}.{PARTS[part]}.weight" if layer else f"{PARTS[part]}.weight"
        if values.ndim == 1:
            writer.add_tensor(stored, values)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_and_sizes_are_those_that_were_written(tmp_path):
    convert_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "directory")
    found, wanted = find_tensors(tmp_path / "directory"), drawn()
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name].read(), values, err_msg=name)
    config = read_config(tmp_path / "directory")
    assert config["model_type"] == "llama" and config["tie_word_embeddings"]
    assert config["num_key_value_heads"] == KEY_HEADS and config["vocab_size"] == len(TOKENS)
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 100_000.0
    assert json.dumps(config) and sorted(path.name for path in tmp_path.iterdir()) == [
        "directory",
        "tiny.gguf",
    ]


def test_the_tokenizer_merges_bytes_and_splits_digits(tmp_path):
    convert_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "directory")
    tokenizer = load_tokenizer(tmp_path / "directory")
    assert tokenizer.encode("the 12").tokens == ["th", "e", "Ġ", "1", "2"]
    assert tokenizer.encode(" the").tokens == ["Ġt", "he"]
    assert SPECIAL[0] not in tokenizer.encode(SPECIAL[0]).tokens
    assert tokenizer.decode(tokenizer.encode("naïve 漢").ids) == "naïve 漢"
    assert tokenizer.token_to_id(SPECIAL[1]) == 1 and tokenizer.get_vocab_size() == len(TOKENS)


def test_a_packaged_file_is_converted_once(tmp_path, monkeypatch):
    package = tmp_path / "tiny_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    write_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(pretrained.PACKAGED, "tiny", pretrained.Packaged("tiny_weights", "tiny.gguf"))
    directory = pretrained.find_source("tiny")
    before = (directory / "model.safetensors").stat()
    assert pretrained.find_source("tiny") == directory and directory.is_relative_to(tmp_path / "cache")
    assert (directory / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"architecture": "gemma"}, "'gemma', not 'llama'"),
        ({"splitter": "qwen2"}, "the tokenizer gpt2/qwen2"),
    ],
)
def test_another_model_or_tokenizer_is_refused(fields, problem, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", **fields)
    with pytest.raises(InputError, match=problem) as error:
        convert_gguf(file, tmp_path / "directory")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_what_is_no_gguf_or_cut_off_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    for content in (
        b"",
        b"no such format, but some bytes",
        whole[:200],
        whole[: len(whole) // 2],
        whole[:-100],
    ):
        (tmp_path / "spoilt.gguf").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            convert_gguf(tmp_path / "spoilt.gguf", tmp_path / "directory")
        assert not (tmp_path / "directory").exists()


def test_without_the_packages_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGED, "none", pretrained.Packaged("no_such_package", "a.gguf"))
    with pytest.raises(InputError, match="run `make pretrained`"):
        pretrained.find_source("none")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="run `make pretrained`"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "directory")
