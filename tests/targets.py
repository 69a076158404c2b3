"""Devices that are not here, for programs that are compiled ahead of time for them."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from launch.targets import target_devices

PLUGINS = {"v5e:2x2": "libtpu", "h100:1x2": "jax_cuda12_plugin"}
"""By target: the module that describes it."""


def devices(target: str) -> Sequence[Any]:
    """Returns the devices of a target, or skips the test where what describes them is not installed."""
    if importlib.util.find_spec(PLUGINS[target]) is None:
        pytest.skip(f"{PLUGINS[target]} is not installed; see make test-targets")
    return target_devices(target)


def on_one_device(shapes: Any, device: Any) -> Any:
    """Returns the shapes of a pytree of arrays, as arguments that live on a device."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape_of(array):
        array = array if hasattr(array, "dtype") else np.asarray(array)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(shape_of, shapes)
