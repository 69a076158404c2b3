"""A llama in a GGUF file as a directory of the Hugging Face hub, dequantised tensor by tensor.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Its writer permutes the rows of queries and
keys so that the pairs of rotary positions are neighbours; here they are put back into the halves of a head.

Axes: R rows (outputs), I inputs.
"""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.tensor_files import NewTensor, write_tensors

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of the hub by those of GGUF, of the model or of a layer."""
SPLITTERS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
"""What cuts a text into words before byte-level BPE, by `tokenizer.ggml.pre`."""
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that no text is cut into


def convert_gguf(file: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes config.json, float32 weights and tokenizer.json of a GGUF file; whole, or not at all.

    Args:
      directory: created; if another process is faster, its directory stays.

    Raises:
      InputError: the package gguf is missing, or the file is none of a llama with byte-level BPE.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError("model.source", str(file), "the package gguf is missing",
                         "run `make pretrained`") from None  # fmt: skip
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:  # the package checks nothing
        raise _unusable(file, f"cannot be read: {error}") from None
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(facts, {tensor.name for tensor in reader.tensors}, file)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))

        def read(tensor=tensor, shape=shape) -> np.ndarray:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
            for part, count in heads.items():
                if f".{part}." in tensor.name:
                    values = unpermute(values, config[count])
            return values

        tensors[_name(tensor.name, file)] = NewTensor(np.dtype(np.float32), shape, read)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix="making-"))
    try:
        write_tensors(fresh, tensors)
        (fresh / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        build_tokenizer(facts, file).save(str(fresh / "tokenizer.json"))
        if not directory.exists():
            os.replace(fresh, directory)
    except OSError:
        if not directory.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def unpermute(matrix: Shaped[np.ndarray, "R I"], heads: int) -> Shaped[np.ndarray, "R I"]:
    """Returns a projection whose pairs of rotary positions are the halves of a head, not neighbours.

    >>> unpermute(np.array([[0], [2], [1], [3]]), 1).tolist()
    [[0], [1], [2], [3]]
    """
    rows, inputs = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def _name(tensor: str, file: pathlib.Path) -> str:
    """Returns a tensor's name on the hub: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    *block, part, kind = tensor.split(".")
    if part not in TENSORS or kind != "weight":
        raise _unusable(file, f"the tensor {tensor} is none of a llama")
    return f"model.layers.{block[1]}.{TENSORS[part]}.weight" if block else f"{TENSORS[part]}.weight"


def _config(facts: Mapping[str, Any], tensors: set[str], file: pathlib.Path) -> dict[str, Any]:
    """Returns the content of config.json."""
    family = facts.get("general.architecture")
    if family != "llama":
        raise _unusable(file, f"is of the architecture {family!r}, not 'llama'")
    fields = {
        "hidden_size": ("embedding_length", int),
        "intermediate_size": ("feed_forward_length", int),
        "num_hidden_layers": ("block_count", int),
        "num_attention_heads": ("attention.head_count", int),
        "num_key_value_heads": ("attention.head_count_kv", int),
        "max_position_embeddings": ("context_length", int),
        "rms_norm_eps": ("attention.layer_norm_rms_epsilon", float),
        "rope_theta": ("rope.freq_base", float),
    }
    missing = [name for name, _ in fields.values() if f"llama.{name}" not in facts]
    if missing or "tokenizer.ggml.tokens" not in facts:
        raise _unusable(file, f"has no {', '.join(missing) or 'tokenizer'}")
    sizes: dict[str, Any] = {field: kind(facts[f"llama.{name}"]) for field, (name, kind) in fields.items()}
    # The file holds float32, of which 1e-5 has more digits than the hub writes.
    sizes["rms_norm_eps"] = float(f"{sizes['rms_norm_eps']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        **sizes,
    }


def build_tokenizer(facts: Mapping[str, Any], file: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer that the metadata of a GGUF file describe."""
    kind, splitter = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or splitter not in SPLITTERS:
        known = ", ".join(SPLITTERS)
        raise _unusable(file, f"has the tokenizer {kind}/{splitter}, not byte-level BPE of {known}")
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges: list[Any] = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[splitter])
    tokenizer.decoder = decoders.ByteLevel()
    apart = zip(tokens, kinds, strict=True)
    tokenizer.add_special_tokens([token for token, kind in apart if kind in (CONTROL, USER_DEFINED)])
    return tokenizer


def _unusable(file: pathlib.Path, problem: str) -> InputError:
    return InputError("model.source", str(file), problem, "use a GGUF file of a llama, e.g. of SmolLM2")
