"""Runs a function over a population: devices side by side, chunks one after another, a vmap inside.

The sums of a weighted mean are accumulated client by client, so memory does not grow with the
population; only what the function returns as `output` is kept for every member.

Axes: M members of the population (a multiple of devices * chunk).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from hfedmoe_jax.aggregation import RunningMean, mean_accumulate, mean_init

AXIS = "clients"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the one axis `clients` over the given devices (default: all of this process)."""
    return Mesh(np.array(devices if devices is not None else jax.local_devices()), (AXIS,))


def padded_size(size: int, mesh: Mesh, chunk: int) -> int:
    """Returns the smallest number of members that is at least `size` and fills every device's chunks."""
    step = mesh.size * chunk
    return -(-size // step) * step


def map_population(
    function: Callable[[Any, Any], tuple[Any, Any, Any]], mesh: Mesh, chunk: int
) -> Callable[[Any, Any], tuple[RunningMean, Any]]:
    """Returns `run(broadcast, members) -> (RunningMean of the values, stacked outputs [M, ...])`.

    Args:
      function: (broadcast, member) -> (values, weights, output); `weights` is a prefix tree
        of `values` as in `mean_init`. Either may be an empty tuple.
      mesh: devices, axis `clients`.
      chunk: members computed at once on a device.

    `run` is meant to be called under `jit`; `members` is a tree of arrays [M, ...].
    """

    def run_on_device(broadcast: Any, members: Any) -> tuple[RunningMean, Any]:
        first = jax.tree.map(lambda x: x[0], members)
        values, weights, _ = jax.eval_shape(function, broadcast, first)

        def add(mean, value_and_weight):
            return mean_accumulate(mean, *value_and_weight), None

        def run_one(mean, member):
            value, weight, output = function(broadcast, member)
            return mean_accumulate(mean, value, weight), output

        def run_chunk(mean, group):
            value, weight, output = jax.vmap(lambda member: function(broadcast, member))(group)
            return jax.lax.scan(add, mean, (value, weight))[0], output

        start = mean_init(values, weights)
        if chunk == 1:  # a batch axis of one costs a CPU a slower matrix product
            mean, outputs = jax.lax.scan(run_one, start, members)
        else:
            groups = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), members)
            mean, outputs = jax.lax.scan(run_chunk, start, groups)
            outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        return jax.lax.psum(mean, AXIS), outputs

    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(
        run_on_device, mesh=mesh, in_specs=(everywhere, split), out_specs=(everywhere, split), check_vma=False
    )
