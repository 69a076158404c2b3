"""Between the parameters of a Flax module and the tensors of a Hugging Face checkpoint, by a table of names.

Axes: L layers of a stack, E experts of a layer.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.tensor_files import NewTensor, StoredTensor, find_tensors, write_tensors
from hfedmoe_jax.pretrained import find_source
from hfedmoe_jax.published import PUBLISHED

CONFIG = "config.json"


class Layout(NamedTuple):
    """How a parameter lies in a tensor.

    Attributes:
      shape: that of a parameter [of one layer and expert] -> that of its tensor.
      view: (tensor, shape of the parameter) -> the part of the tensor that is the parameter, not a copy.
    """

    shape: Callable[[Sequence[int]], tuple[int, ...]]
    view: Callable[[np.ndarray, Sequence[int]], np.ndarray]


class Name(NamedTuple):
    """How a parameter is stored.

    Attributes:
      path: of the parameter in the module, e.g. "blocks/attend/attention/query/kernel".
      tensor: its name, with {layer} and {expert} where a parameter is of so many tensors.
      transposed: PyTorch's matrices are [outputs, inputs], Flax's kernels [inputs, outputs].
      first_layer: the number of the first layer of the stack.
      layers: what {layer} stands for in each layer, where it is more than the next number.
      part: (i, n) if a tensor holds n parameters, one after the other, of which this is the i-th.
      layout: another than `transposed` and `part` describe.
    """

    path: str
    tensor: str
    transposed: bool = False
    first_layer: int = 0
    part: tuple[int, int] = (0, 1)
    layers: tuple[str, ...] = ()
    layout: Layout | None = None

    def layer(self, index: int) -> str:
        """Returns what {layer} stands for in a layer."""
        return self.layers[index] if self.layers else str(self.first_layer + index)


class StoredParam(NamedTuple):
    """A parameter that lies in the files of a checkpoint.

    Attributes:
      shape: of the parameter.
      read: a slice for each axis -> that part of it, a NumPy array.
    """

    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]

    def place(self, sharding: Sharding) -> jax.Array:
        """Returns it on devices; each reads its part and no more."""
        return jax.make_array_from_callback(self.shape, sharding, self.read)

    def rows(self, first: int, end: int) -> "StoredParam":
        """Returns a part of it by its first axis."""

        def read(index: Any) -> np.ndarray:
            inside = range(first, end)[index[0]]
            return self.read((slice(inside.start, inside.stop), *index[1:]))

        return StoredParam((end - first, *self.shape[1:]), read)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all of it."""
        return np.asarray(self.read((slice(None),) * len(self.shape)), dtype)


def is_stored(x: Any) -> bool:
    """Says whether it is a parameter that lies in files."""
    return isinstance(x, StoredParam)


def part_of(param: Any, index: tuple[int, ...]) -> np.ndarray:
    """Returns what an array, or a parameter that lies in files, has at an index of its leading axes."""
    if not isinstance(param, StoredParam):
        return np.asarray(param[index])
    whole = [slice(None)] * (len(param.shape) - len(index))
    part = param.read((*(slice(i, i + 1) for i in index), *whole))
    return part.reshape(param.shape[len(index) :])


def import_params(
    directory: str | os.PathLike,
    names: Sequence[Name],
    shapes: Mapping[str, Any],
    shardings: Mapping[str, Any] | None = None,
    unused: str = "",
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Returns the parameters of a directory, see `open_params`, read.

    Args:
      shardings: of each, the same tree as `shapes`; None: NumPy arrays on the host.
    """
    opened: dict[Any, Any] = dict(
        traverse_util.flatten_dict(open_params(directory, names, shapes, unused, dtype))
    )
    wanted = traverse_util.flatten_dict(dict(shardings or {}))
    read = {
        path: np.asarray(param) if (sharding := wanted.get(path)) is None else param.place(sharding)
        for path, param in opened.items()
    }
    return traverse_util.unflatten_dict(read)


def open_params(
    directory: str | os.PathLike,
    names: Sequence[Name],
    shapes: Mapping[str, Any],
    unused: str = "",
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Returns the parameters of a directory, nested dicts of `StoredParam`.

    Args:
      directory: with safetensors files.
      names: of every parameter; several that share a path are alternatives (see `choose_names`).
      shapes: of the module's parameters, nested dicts of `jax.ShapeDtypeStruct`.
      unused: regular expression of tensors that need no parameter.
      dtype: of the parameters.

    Raises:
      InputError: all tensors that are missing, unknown or of another shape, in one line.
    """
    stored = find_tensors(directory)
    wanted = _flat(shapes)
    chosen = choose_names(names, stored)
    problems = [f"no tensor is known for the parameter {path}" for path in wanted if path not in chosen]
    needed: set[str] = set()
    for path, shape in wanted.items():
        if path in chosen:
            problems += _check(chosen[path], shape.shape, stored, needed)
    problems += [
        f"{name} has no parameter" for name in sorted(stored)
        if name not in needed and not (unused and re.search(unused, name))
    ]  # fmt: skip
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError("model.source", str(directory), shown, "use the family that the checkpoint is of")
    leaves = {
        path: StoredParam(shape.shape, _reader(chosen[path], shape.shape, stored, dtype))
        for path, shape in wanted.items()
    }
    return traverse_util.unflatten_dict(leaves, sep="/")


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of nested dicts by their paths, "blocks/router/kernel"."""
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(dict(tree)).items()}


def choose_names(names: Sequence[Name], stored: Mapping[str, Any]) -> dict[str, Name]:
    """Returns the name of each parameter: of alternatives the first whose first tensor is there."""
    chosen: dict[str, Name] = {}
    for name in names:
        known = chosen.get(name.path)
        if known is None or (_is_stored(name, stored) and not _is_stored(known, stored)):
            chosen[name.path] = name
    return chosen


def _is_stored(name: Name, stored: Mapping[str, Any]) -> bool:
    return name.tensor.format(layer=name.layer(0), expert=0) in stored


def _axes(name: Name) -> list[str]:
    """Returns what the leading axes of a parameter count: "layer", "expert"."""
    return [axis for axis in ("layer", "expert") if f"{{{axis}}}" in name.tensor]


def tensors_of(name: Name, shape: Sequence[int]) -> dict[tuple[int, ...], str]:
    """Returns the tensors of a parameter by their index in its leading axes.

    >>> tensors_of(Name("a", "layer.{layer}", first_layer=3), (2, 5))
    {(0,): 'layer.3', (1,): 'layer.4'}
    >>> tensors_of(Name("a", "{layer}.wi", layers=("encoder.1", "decoder.1")), (2, 5))
    {(0,): 'encoder.1.wi', (1,): 'decoder.1.wi'}
    """
    axes = _axes(name)
    found = {}
    for index in np.ndindex(*shape[: len(axes)]):
        values = dict(zip(axes, index, strict=True))
        layer = name.layer(values.get("layer", 0))
        found[index] = name.tensor.format(layer=layer, expert=values.get("expert", 0))
    return found


def _stored_shape(name: Name, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of a tensor that holds a parameter [of one layer and expert] of `shape`."""
    if name.layout:
        return name.layout.shape(shape)
    if len(shape) == 1:
        return tuple(shape)
    *outer, rows, columns = shape
    if name.transposed:
        rows, columns = columns, rows
    return (*outer, rows * name.part[1], columns)


def _view(name: Name, tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns the part of a tensor that is a parameter [of one layer and expert] of `shape`; no copy."""
    if name.layout:
        return name.layout.view(tensor, shape)
    which, parts = name.part
    if parts > 1:
        rows = tensor.shape[-2] // parts
        tensor = tensor[..., which * rows : (which + 1) * rows, :]
    return tensor.swapaxes(-1, -2) if name.transposed else tensor


def _check(
    name: Name, shape: Sequence[int], stored: Mapping[str, StoredTensor], needed: set[str]
) -> list[str]:
    """Returns what is wrong with the tensors of a parameter, and notes which they are in `needed`."""
    tensors = tensors_of(name, shape)
    expected = _stored_shape(name, shape[len(_axes(name)) :])
    needed.update(tensors.values())
    missing = [tensor for tensor in tensors.values() if tensor not in stored]
    wrong = [tensor for tensor in tensors.values() if tensor in stored and stored[tensor].shape != expected]
    integers = [
        tensor for tensor in tensors.values() if tensor in stored and stored[tensor].dtype == np.int64
    ]
    return (
        [f"{tensor} is missing" for tensor in missing]
        + [f"{tensor} holds integers" for tensor in integers]
        + [f"{tensor} is {list(stored[tensor].shape)}, not {list(expected)}" for tensor in wrong]
    )


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Returns an array at a multiple of 64 bytes, which JAX takes over on a CPU without a copy."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(count + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + count].view(dtype).reshape(shape)


def _reader(
    name: Name, shape: Sequence[int], stored: Mapping[str, StoredTensor], dtype: Any
) -> Callable[[Any], np.ndarray]:
    """Returns a function that reads a part of a parameter, given by a slice for each axis."""
    tensors, lead = tensors_of(name, shape), len(_axes(name))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(size)[part] for size, part in zip(shape, index, strict=True)]
        result = _empty([len(each) for each in ranges], dtype)
        for place in np.ndindex(*result.shape[:lead]):
            at = tuple(ranges[axis][i] for axis, i in enumerate(place))
            result[place] = _view(name, stored[tensors[at]].read(), shape[lead:])[index[lead:]]
        return result

    return read


def export_params(
    directory: str | os.PathLike,
    names: Sequence[Name],
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    dtypes: Mapping[str, np.dtype] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes parameters as a Hugging Face directory, tensor by tensor.

    Args:
      directory: created; its files of these names are replaced.
      names: of every parameter; of alternatives the first is written.
      params: nested dicts of arrays.
      config: the content of config.json.
      dtypes: of tensors by name; the others are float32.
      shard_bytes: of a file at most; None: see `tensor_files`.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Name] = {}
    for name in names:
        chosen.setdefault(name.path, name)
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[tuple[Name, Any, tuple[int, ...]]]] = {}
    for path, leaf in _flat(params).items():
        name = chosen[path]
        for index, tensor in tensors_of(name, leaf.shape).items():
            parts.setdefault(tensor, []).append((name, leaf, index))
            shapes[tensor] = _stored_shape(name, leaf.shape[len(index) :])
    tensors = {}
    for tensor, shape in shapes.items():
        dtype = np.dtype((dtypes or {}).get(tensor, np.float32))

        def join(of=parts[tensor], shape=shape, dtype=dtype):
            joined = np.zeros(shape, dtype)
            for name, leaf, index in of:
                _view(name, joined, leaf.shape[len(index) :])[...] = part_of(leaf, index)
            return joined

        tensors[tensor] = NewTensor(dtype, shape, join)
    options = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    write_tensors(directory, tensors, **options)
    (directory / CONFIG).write_text(json.dumps(dict(config), indent=2), encoding="utf-8")


def source_config(source: str) -> Mapping[str, Any]:
    """Returns the config.json of `model.source`, a directory or a published size.

    Raises:
      InputError: see `find_source` and `read_config`.
    """
    return PUBLISHED[source] if source in PUBLISHED else read_config(find_source(source))


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of a directory's config.json.

    Raises:
      InputError: there is none, or it is no JSON object.
    """
    path = pathlib.Path(directory) / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        problem, remedy = f"{CONFIG} cannot be read ({reason})", "name a directory of a checkpoint"
        raise InputError("model.source", str(directory), problem, remedy) from None
    if not isinstance(content, dict):
        raise InputError(
            "model.source", str(path), "holds no JSON object", "name a directory of a checkpoint"
        )
    return content
