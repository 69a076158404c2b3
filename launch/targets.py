"""Accelerators that programs can be compiled for without being there, with the public figures of their chips.

JAX compiles for a topology that libtpu or the CUDA plugin describes; no device is needed, and nothing runs.
"""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.experimental import topologies

from hfedmoe_jax.errors import InputError

GIBI, TERA, GIGA = 2**30, 1e12, 1e9


class Chip(NamedTuple):
    """A chip's figures, as its maker publishes them.

    Attributes:
      memory_bytes: of the chip.
      flop_per_s: peak of dense matrix products at JAX's default precision: bfloat16 on a TPU, whatever the
        type of the operands; on an H100 bfloat16, and TF32 for float32.
      bytes_per_s: peak between chip and memory.
      environment: variables that libtpu needs where there is no TPU.
    """

    memory_bytes: float
    flop_per_s: dict[str, float]
    bytes_per_s: float
    environment: dict[str, str]


def _tpu(memory_gib: int, tera_flop: float, giga_bytes: float, kind: str) -> Chip:
    peak = {"bfloat16": tera_flop * TERA, "float32": tera_flop * TERA}
    alone = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": kind,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    return Chip(memory_gib * GIBI, peak, giga_bytes * GIGA, alone)


CHIPS = {
    # Google Cloud's pages of TPU versions.
    "v4": _tpu(32, 275, 1228, "v4-8"),
    "v5e": _tpu(16, 197, 819, "v5litepod-8"),
    "v5p": _tpu(95, 459, 2765, "v5p-8"),
    "v6e": _tpu(32, 918, 1640, "v6e-8"),
    # NVIDIA's data sheet of the H100 SXM: dense figures.
    "h100": Chip(80e9, {"bfloat16": 989.4 * TERA, "float32": 494.7 * TERA}, 3352 * GIGA, {}),
}
"""By the part of a target's name before the colon."""

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of the card, a text proto of its `GpuTargetConfig`."""


def read_target(name: str) -> Chip:
    """Returns the chip of a target.

    Args:
      name: CHIP:SHAPE, for a TPU the shape of its slice, e.g. "v5e:16x16"; for GPUs hosts x cards of a host,
        e.g. "h100:1x8".

    Raises:
      InputError: the name is of another form, or the chip is unknown.
    """
    chip, colon, shape = name.partition(":")
    if chip not in CHIPS:
        raise InputError("--target", name, "unknown chip", f"use one of {', '.join(CHIPS)}, e.g. v5e:2x4")
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise InputError("--target", name, "has no shape", "write e.g. v5e:2x4, v5p:2x2x1 or h100:1x8")
    return CHIPS[chip]


def target_devices(name: str) -> Sequence[Any]:
    """Returns the devices of a target, which programs can be compiled for.

    Raises:
      InputError: see `read_target`; or the library that describes the chip is not installed, or refuses.
    """
    chip, shape = read_target(name), name.partition(":")[2]
    for variable, value in chip.environment.items():
        os.environ.setdefault(variable, value)
    try:
        if chip.environment:
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H100, topology=f"1x{shape}"
        ).devices
    except Exception as error:  # of several types, by what is missing
        extra = "tpu" if chip.environment else "cuda"
        problem = str(error).splitlines()[0]
        remedy = f"pip install -e '.[{extra}]', and give a shape that there is"
        raise InputError("--target", name, problem, remedy) from error
