"""The parameters before the first round: those that a start has are read, the others are drawn at random.

Nothing is drawn in place of what is read, so that beside the parameters little memory is needed: on a CPU
none, for its devices take over what is read; elsewhere, and for bases of few bits, `PART_BYTES` at a time.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from hfedmoe_jax.mesh import BY_EXPERT, REPLICATED
from hfedmoe_jax.mixtures import Start
from hfedmoe_jax.models import MoeModel, Params, merge_params
from hfedmoe_jax.models.frozen import QUANTISED, keep_leaf
from hfedmoe_jax.models.names import is_stored

PART_BYTES = 2**24
"""Of a parameter that is read at once, at least a row of its first axis."""


def initial_params(model: MoeModel, key: jax.Array, start: Start | None, mesh: Mesh) -> Params:
    """Returns the parameters that learn, on a mesh.

    Args:
      start: what the run starts from, its adapters included; None: everything is drawn.
    """

    def draw(key: jax.Array) -> dict:
        params, _ = model.init(key)
        return merge_params(params.router, params.shared, {"experts": params.experts})

    parts = (start.params, start.adapters) if start else ()
    given = {path: leaf for part in parts for path, leaf in traverse_util.flatten_dict(part).items()}
    leaves = traverse_util.flatten_dict(fill(draw, key, given, mesh))

    def group(tree: dict) -> dict:
        return traverse_util.unflatten_dict({path: leaves[path] for path in traverse_util.flatten_dict(tree)})

    shapes, _ = jax.eval_shape(model.init, key)
    return Params(group({"experts": shapes.experts})["experts"], group(shapes.router), group(shapes.shared))


def initial_frozen(model: MoeModel, key: jax.Array, start: Start | None, mesh: Mesh, base: str) -> dict:
    """Returns the parameters that nobody trains, on a mesh, as `base` keeps them (see `models.frozen`)."""
    given = traverse_util.flatten_dict(start.params if start else {})
    return fill(lambda key: model.init(key)[1], key, given, mesh, base)


def fill(
    init: Callable[[jax.Array], dict],
    key: jax.Array,
    given: Mapping[tuple[str, ...], Any],
    mesh: Mesh,
    base: str = "float32",
) -> dict:
    """Returns nested dicts like those of `init(key)` on a mesh: experts spread over it, the rest everywhere.

    Args:
      init: draws parameters.
      given: arrays and `StoredParam` by path, which are not drawn.
      base: how these are kept.
    """
    shapes = traverse_util.flatten_dict(jax.eval_shape(init, key))
    places = {path: NamedSharding(mesh, BY_EXPERT if path[0] == "experts" else REPLICATED) for path in shapes}
    missing = [path for path in shapes if path not in given]

    def draw(key: jax.Array) -> list:
        drawn = traverse_util.flatten_dict(init(key))
        return [drawn[path] for path in missing]

    drawn = jax.jit(draw, out_shardings=[places[path] for path in missing])(key) if missing else []
    leaves = dict(zip(missing, drawn, strict=True))
    for path, shape in shapes.items():
        if path in given:
            leaves[path] = place(path, given[path], shape, places[path], base)
    return traverse_util.unflatten_dict({path: leaves[path] for path in shapes})


def place(path: tuple[str, ...], value: Any, shape: Any, sharding: NamedSharding, base: str) -> Any:
    """Returns what a start has for a parameter, as it is kept, on a mesh.

    Args:
      value: an array or a `StoredParam`.
      shape: of what is kept, which may be a tree.
    """
    on_cpu = all(device.platform == "cpu" for device in sharding.device_set)
    if base == "float32" and (on_cpu or not is_stored(value)):
        return value.place(sharding) if is_stored(value) else jax.device_put(value, sharding)

    def nothing() -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def put(whole, part, first):
        kept = keep_each(path, part, base)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, 0), whole, kept)

    whole, count = jax.jit(nothing, out_shardings=sharding)(), value.shape[0]
    step = max(1, PART_BYTES * count // max(1, 4 * int(np.prod(value.shape))))
    for first in range(0, count, step):
        rows = (slice(first, min(first + step, count)), *[slice(None)] * (len(value.shape) - 1))
        part = value.read(rows) if is_stored(value) else value[rows]
        whole = put(whole, np.asarray(part), first)
    return whole


def keep_each(path: tuple[str, ...], part: jax.Array, base: str) -> Any:
    """Returns `keep_leaf` of a parameter; of experts [L, E, D, F] one by one, which takes less memory."""
    if path[0] != "experts" or base not in QUANTISED or part.ndim != 4:
        return keep_leaf(path, part, base)
    each = part.reshape(-1, 1, 1, *part.shape[2:])
    kept = jax.lax.map(lambda matrix: keep_leaf(path, matrix, base), each)
    return jax.tree.map(lambda x: x.reshape(*part.shape[:2], *x.shape[3:]), kept)
