"""What the frozen layers below the first trainable one make of each passage, computed once a run.

A module that allows it has `trunk_cuts`, pairs (name, paths of parameters), the deepest first, and a method
`features(frozen, tokens, name)` that computes what these parameters make of tokens; where a batch has an
array of that name the module reads it instead. Features lie in an unnamed file of the cache directory, so
the operating system keeps in memory what fits.

Axes: N passages, B batch, T tokens, D model.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from hfedmoe_jax.data import FederatedData, Rows, num_rows
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.mixtures import cache_dir
from hfedmoe_jax.models import MoeModel

SPLITS = ("train", "validation", "test")


class Cut(NamedTuple):
    """Where the trunk ends.

    Attributes:
      name: of the features in a batch.
      paths: of the parameters that they are computed from, all of them frozen.
    """

    name: str
    paths: tuple[str, ...]


def find_cut(model: MoeModel) -> Cut:
    """Returns the deepest cut of a model's trunk below which everything is frozen.

    Raises:
      InputError: the model has no trunk, or part of it is trained.
    """
    cuts = [Cut(*cut) for cut in getattr(model.module, "trunk_cuts", ())]
    if not cuts:
        problem = "there are no layers below those with experts that can be cached"
        raise InputError("model.cache_trunk", True, problem, "set it to False")
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    trained = traverse_util.flatten_dict(params.shared, sep="/")
    for cut in cuts:
        loose = [path for path in cut.paths if any(is_below(name, path) for name in trained)]
        if not loose:
            return cut
    problem, remedy = f"{', '.join(loose)} is trained", "use e.g. model.train=experts_router_head"
    raise InputError("model.cache_trunk", True, problem, remedy)


def feature_shape(model: MoeModel, tokens: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape [..., T, D] of the features of tokens [..., T]."""
    return jax.ShapeDtypeStruct((*tokens.shape, model.module.width), model.module.dtype)


def no_features(data: FederatedData, model: MoeModel, cut: Cut) -> FederatedData:
    """Returns data with features that take no memory, for programs that are only compiled."""

    def empty(tokens: np.ndarray) -> np.ndarray:
        shape = feature_shape(model, tokens)
        return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)

    return _with_features(data, cut, empty)


def cache_features(
    data: FederatedData, model: MoeModel, frozen: Any, config: ConfigDict, cut: Cut
) -> FederatedData:
    """Returns data whose passages have features.

    They are computed in batches of the size that reads them, a step's or an evaluation's: on a CPU, with JAX
    0.12, they then have the same bits as without a cache; older compilers may change the last one.

    Args:
      data: of this process.
      frozen: the trunk's parameters among them, on the mesh.
      config: `fl.batch_size` and `eval.batch_size` are read.
      cut: see `find_cut`.

    Raises:
      InputError: the disk has no room.
    """
    shapes = [feature_shape(model, getattr(data, split)["tokens"]) for split in SPLITS]
    needed = sum(shape.size * shape.dtype.itemsize for shape in shapes)
    directory = cache_dir().parent
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        problem = f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
        remedy = "set HFEDMOE_CACHE to a folder of a larger disk, or this to False"
        raise InputError("model.cache_trunk", True, problem, remedy)
    own = jax.tree.map(lambda x: x.addressable_data(0), below(frozen, cut))
    compute = jax.jit(functools.partial(model.module.features, cut=cut.name))

    def room(tokens: np.ndarray) -> np.ndarray:
        shape = feature_shape(model, tokens)
        if not len(tokens):
            return np.zeros(shape.shape, shape.dtype)
        with tempfile.TemporaryFile(dir=directory) as file:
            return np.memmap(file, shape.dtype, "w+", shape=shape.shape)

    def fill(part: Rows, rows: np.ndarray, size: int) -> None:
        for some in np.array_split(rows, range(size, len(rows), size)):
            padded = np.pad(part["tokens"][some], [(0, size - len(some)), (0, 0)])
            part[cut.name][some] = np.asarray(compute(own, padded))[: len(some)]

    data = _with_features(data, cut, room)
    trained = np.unique(np.concatenate(data.client_train))
    fill(data.train, trained, config.fl.batch_size)
    fill(data.train, np.setdiff1d(np.arange(num_rows(data.train)), trained), config.eval.batch_size)
    for part in (data.validation, data.test):
        fill(part, np.arange(num_rows(part)), config.eval.batch_size)
    return data


def below(frozen: dict, cut: Cut) -> dict:
    """Returns the frozen parameters below a cut, as nested dicts."""
    leaves = traverse_util.flatten_dict(frozen, sep="/")
    own = {name: leaf for name, leaf in leaves.items() if any(is_below(name, path) for path in cut.paths)}
    return traverse_util.unflatten_dict(own, sep="/")


def is_below(name: str, path: str) -> bool:
    """Says whether a parameter is one of a path's."""
    return f"{name}/".startswith(f"{path}/")


def _with_features(
    data: FederatedData, cut: Cut, features_of: Callable[[np.ndarray], np.ndarray]
) -> FederatedData:
    rows = {split: getattr(data, split) for split in SPLITS}
    return replace(
        data, **{name: part | {cut.name: features_of(part["tokens"])} for name, part in rows.items()}
    )
