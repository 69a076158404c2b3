"""The device mesh: which axis holds what, and the collectives over the shards of a layer's experts.

Axes: L layers, E experts of a layer, H experts of a layer on this device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from hfedmoe_jax.errors import InputError

CLIENTS, EXPERTS = "clients", "experts"
REPLICATED, BY_CLIENT = PartitionSpec(), PartitionSpec(CLIENTS)
BY_EXPERT = PartitionSpec(None, EXPERTS)
"""Of arrays [L, E, ...]."""


class Place(NamedTuple):
    """The named axes that a client's computation runs under.

    Attributes:
      chunk: of the `vmap` over the clients of a chunk, or None where a client runs alone.
      shard: of the mesh, if a layer's experts are spread over it, or None.
    """

    chunk: str | None = None
    shard: str | None = None


ALONE = Place()


def make_mesh(devices: Sequence[Any] | None = None, experts: int = 1) -> Mesh:
    """Returns a mesh with the axes `clients` and `experts`.

    Args:
      devices: JAX devices, default all of all processes.
      experts: over how many devices the experts of one client's model are spread.

    Raises:
      InputError: `experts` does not divide the number of devices of a process.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if experts < 1 or len(devices) % experts:
        problem = f"does not divide the {len(devices)} devices"
        raise InputError("mesh.experts", experts, problem, "use a divisor of their number, e.g. 1")
    grid = np.array(devices).reshape(-1, experts)
    if any(len({device.process_index for device in row}) > 1 for row in grid):
        problem = "would spread the experts of one client over several processes"
        raise InputError("mesh.experts", experts, problem, "use a divisor of a process's devices")
    return Mesh(grid, (CLIENTS, EXPERTS), axis_types=(AxisType.Auto, AxisType.Auto))


def is_described(mesh: Mesh) -> bool:
    """Says whether the devices are those of a topology: programs compile for them, and nothing runs there."""
    return mesh.devices.flat[0] not in jax.devices()


def shapes_on_mesh(mesh: Mesh, specs: Any, shapes: Any) -> Any:
    """Returns shapes with where they lie on a mesh.

    Args:
      specs: partition specs, a prefix tree of `shapes`.
    """

    def placed(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    return map_specs(placed, specs, shapes)


def place_of(mesh: Mesh, chunk: int) -> Place:
    """Returns the axes that clients of this mesh and chunk run under."""
    return Place(None if chunk == 1 else "chunk", EXPERTS if mesh.shape[EXPERTS] > 1 else None)


def psum_experts(values: Array, place: Place) -> Array:
    """Returns the sum over the shards of the experts."""
    return values if place.shard is None else jax.lax.psum(values, place.shard)


def shard_of(num_experts: int, place: Place) -> tuple[int, Array | int]:
    """Returns H, and the index of this device's first expert in a layer of `num_experts`."""
    if place.shard is None:
        return num_experts, 0
    held = num_experts // jax.lax.axis_size(place.shard)
    return held, jax.lax.axis_index(place.shard) * held


def local_experts(of_all: Array | None, place: Place) -> Array | None:
    """Returns this device's part [L, H] of an array over all experts [L, E]."""
    if of_all is None or place.shard is None:
        return of_all
    held, first = shard_of(of_all.shape[1], place)
    return jax.lax.dynamic_slice_in_dim(of_all, first, held, axis=1)


def all_gather_experts(of_local: Array, place: Place) -> Array:
    """Returns an array over all experts [L, E] from each device's part [L, H]."""
    return of_local if place.shard is None else jax.lax.all_gather(of_local, place.shard, axis=1, tiled=True)


def chunk_max(count: Array, place: Place) -> Array:
    """Returns the largest count of a chunk's clients: a loop bound that they share stays a scalar."""
    return count if place.chunk is None else jax.lax.pmax(count, place.chunk)


def map_specs(function: Any, specs: Any, *trees: Any) -> Any:
    """Maps over a tree of partition specs, and over trees that it is a prefix of."""
    return jax.tree.map(function, specs, *trees, is_leaf=lambda x: isinstance(x, PartitionSpec))
