"""What the frozen layers below the first trainable one make of each passage, computed once a run.

A module that allows it has `trunk_params`, the names of those parameters at its top, and a method
`features(frozen, tokens)`; it reads batch["features"] where a batch has them. Features lie in an unnamed file
of the cache directory, so the operating system keeps in memory what fits.

Axes: N passages, B batch, T tokens, D model.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax.data import FederatedData, Rows, num_rows
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.mixtures import cache_dir
from hfedmoe_jax.models import MoeModel
from hfedmoe_jax.models.family import FEATURES

SPLITS = ("train", "validation", "test")


def check_trunk(model: MoeModel, frozen: Any) -> None:
    """Raises InputError if a model has no trunk, or part of it is trained."""
    names = getattr(model.module, "trunk_params", ())
    if not names:
        problem, remedy = "this family has no layers without experts", "set it to False"
    elif loose := [name for name in names if not _is_whole(model, frozen, name)]:
        problem, remedy = f"{', '.join(loose)} is trained", "use e.g. model.train=experts_router_head"
    else:
        return
    raise InputError("model.cache_trunk", True, problem, remedy)


def _is_whole(model: MoeModel, frozen: Any, name: str) -> bool:
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    return name in frozen and name not in params.shared


def feature_shape(model: MoeModel, tokens: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape [..., T, D] of the features of tokens [..., T]."""
    return jax.ShapeDtypeStruct((*tokens.shape, model.module.width), model.module.dtype)


def no_features(data: FederatedData, model: MoeModel) -> FederatedData:
    """Returns data with features that take no memory, for programs that are only compiled."""

    def empty(tokens: np.ndarray) -> np.ndarray:
        shape = feature_shape(model, tokens)
        return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)

    return _with_features(data, empty)


def cache_features(data: FederatedData, model: MoeModel, frozen: Any, config: ConfigDict) -> FederatedData:
    """Returns data whose passages have features.

    They are computed in batches of the size that reads them, a step's or an evaluation's: on a CPU they then
    have the same bits as without a cache.

    Args:
      data: of this process.
      frozen: the trunk's parameters among them, on the mesh.
      config: `fl.batch_size` and `eval.batch_size` are read.

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
    own = {name: frozen[name] for name in model.module.trunk_params}
    own = jax.tree.map(lambda x: x.addressable_data(0), own)
    compute = jax.jit(model.module.features)

    def room(tokens: np.ndarray) -> np.ndarray:
        shape = feature_shape(model, tokens)
        if not len(tokens):
            return np.zeros(shape.shape, shape.dtype)
        with tempfile.TemporaryFile(dir=directory) as file:
            return np.memmap(file, shape.dtype, "w+", shape=shape.shape)

    def fill(part: Rows, rows: np.ndarray, size: int) -> None:
        for some in np.array_split(rows, range(size, len(rows), size)):
            padded = np.pad(part["tokens"][some], [(0, size - len(some)), (0, 0)])
            part[FEATURES][some] = np.asarray(compute(own, padded))[: len(some)]

    data = _with_features(data, room)
    trained = np.unique(np.concatenate(data.client_train))
    fill(data.train, trained, config.fl.batch_size)
    fill(data.train, np.setdiff1d(np.arange(num_rows(data.train)), trained), config.eval.batch_size)
    for part in (data.validation, data.test):
        fill(part, np.arange(num_rows(part)), config.eval.batch_size)
    return data


def _with_features(data: FederatedData, features_of: Callable[[np.ndarray], np.ndarray]) -> FederatedData:
    rows = {split: getattr(data, split) for split in SPLITS}
    return replace(
        data, **{name: part | {FEATURES: features_of(part["tokens"])} for name, part in rows.items()}
    )
