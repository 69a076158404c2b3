"""Devices that are not here, for programs that are compiled ahead of time for them."""

import functools
import importlib.util
import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
"""What libtpu asks a cloud's metadata server for, if it is not told; and two test workers may load it."""


@functools.cache
def tpu_devices(topology: str = "v5e:2x4") -> list[Any]:
    """Returns the devices of a TPU topology, or skips the test where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.update({name: value for name, value in TPU_ENVIRONMENT.items() if name not in os.environ})
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def placed(shapes: Any, sharding: jax.sharding.Sharding) -> Any:
    """Returns the shapes of a pytree of arrays, as arguments that live on these devices."""

    def shape_of(array):
        array = array if hasattr(array, "dtype") else np.asarray(array)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(shape_of, shapes)


def on_one_device(shapes: Any, device: Any) -> Any:
    """Returns `placed` on a single device."""
    return placed(shapes, jax.sharding.SingleDeviceSharding(device))
