"""Tensors in safetensors files, one or several with an index: read by memory map, written shard by shard.

The format (huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header with type,
shape and place of each tensor, then the bytes. The package safetensors reads bfloat16 for NumPy in no
version, and writes a file from memory only.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hfedmoe_jax.errors import InputError

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {**FLOATS, "I64": np.dtype(np.int64)}
"""By the name in a header; older BERTs hold their positions as integers, which no parameter is read from."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTERS, ADAPTERS_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHARD_BYTES = 5 * 10**9
REMEDY = "download or copy the directory again"


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
      path: of the file.
      dtype, shape: as stored.
      offset: of its first byte in the file.
    """

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Returns the tensor as a memory map: only what is indexed is read."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def find_tensors(directory: str | os.PathLike) -> dict[str, StoredTensor]:
    """Returns the tensors of a directory by name.

    Raises:
      InputError: no safetensors, a shard that is missing or cut off, a header that is none, or a type that
        is not among `DTYPES`.
    """
    directory = pathlib.Path(directory)
    index, adapted = directory / INDEX, (directory / ADAPTERS_CONFIG).exists()
    single = directory / (ADAPTERS if adapted else SINGLE)
    if single.exists():  # as transformers has it: an index beside it does not count
        return _read_header(single)
    if not index.exists():
        problem = f"holds no {ADAPTERS}" if adapted else f"holds neither {SINGLE} nor {INDEX}"
        raise InputError("model.source", str(directory), problem, "name a directory with safetensors files")
    where = _json(index).get("weight_map")
    if not (isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())):
        raise InputError("model.source", str(index), "has no weight_map of tensors to files", REMEDY)
    files = sorted(set(where.values()))
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        problem = f"{INDEX} names files that are missing: {', '.join(missing)}"
        raise InputError("model.source", str(directory), problem, REMEDY)
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors |= _read_header(directory / name)
    return tensors


def _read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise InputError("model.source", str(path), "is cut off or no safetensors file", REMEDY)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {name: _entry(each) for name, each in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError("model.source", str(path), "has no header of safetensors", REMEDY) from None
    tensors = {}
    for name, (kind, shape, begin, end) in found.items():
        if kind not in DTYPES:
            problem = f"tensor {name} is of type {kind}"
            raise InputError(
                "model.source", str(path), problem, "use weights in float32, float16 or bfloat16"
            )
        dtype = DTYPES[kind]
        if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise InputError("model.source", str(path), f"is cut off in tensor {name}", REMEDY)
        tensors[name] = StoredTensor(path, dtype, shape, 8 + length + begin)
    return tensors


def _entry(each: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Returns type, shape, and first and last byte of a header's entry.

    Raises:
      ValueError, KeyError or TypeError: it is none.
    """
    kind, shape, (begin, end) = each["dtype"], tuple(each["shape"]), each["data_offsets"]
    numbers = (*shape, begin, end)
    if not isinstance(kind, str) or not all(type(x) is int and 0 <= x < 2**63 for x in numbers):
        raise ValueError
    return kind, shape, begin, end


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("model.source", str(path), f"cannot be read ({error})", REMEDY) from None
    if not isinstance(content, dict):
        raise InputError("model.source", str(path), "holds no JSON object", REMEDY)
    return content


class NewTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      dtype, shape: as stored.
      read: returns it; called once, when it is written.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: str | os.PathLike, tensors: Mapping[str, NewTensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors, one at a time in memory, into files of at most `shard_bytes` (or one tensor)."""
    directory = pathlib.Path(directory)
    shards: list[dict[str, NewTensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.num_bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.num_bytes
    if len(shards) == 1:
        _write_shard(directory / SINGLE, shards[0].items())
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, shard.items())
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _write_shard(path: pathlib.Path, tensors: Iterable[tuple[str, NewTensor]]) -> None:
    header, begin, order = {"__metadata__": {"format": "pt"}}, 0, list(tensors)
    for name, tensor in order:
        end = begin + tensor.num_bytes
        place = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name], begin = place, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            array = np.ascontiguousarray(tensor.read(), tensor.dtype)
            assert array.shape == tensor.shape
            file.write(array.tobytes())
    os.replace(temporary, path)
