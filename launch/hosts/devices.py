"""JAX's devices and compilation cache: set up before JAX computes anything."""

import contextlib
import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from hfedmoe_jax.errors import InputError


def configure_devices(most: int, experts: int = 1) -> None:
    """Sets JAX up for a population of clients; without effect once JAX has computed something.

    On a CPU a client runs fastest alone on one core, so each core becomes a device and the
    clients are spread over them (about three times the client steps of one device with as many
    threads). Accelerators are left as they are, and so is a setting that the user made.

    Args:
      most: devices that there is work for.
      experts: see `num_devices`.
    """
    chosen = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if "xla_cpu_multi_thread_eigen" not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} --xla_cpu_multi_thread_eigen=false".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has started: in a notebook, say
        jax.config.update("jax_num_cpu_devices", num_devices(cores, most, experts))


def num_devices(cores: int, most: int, experts: int) -> int:
    """Returns how many devices to make of a CPU: a multiple of `experts`, if possible at most one a core.

    Args:
      cores: that this process may use; fewer than `experts` take turns.
      most: devices that there is work for.
      experts: devices that the experts of one client's model are spread over.

    >>> num_devices(cores=3, most=16, experts=2), num_devices(cores=1, most=16, experts=2)
    (2, 2)
    """
    return max(experts, min(cores, most) // experts * experts)


def use_compilation_cache(directory: str | os.PathLike) -> None:
    """Keeps what is compiled from now on in a directory, so that the next run need not compile it again.

    Of several processes only the first one keeps its programs.

    Args:
      directory: created; several runs may share it.

    Raises:
      InputError: it cannot be created.
    """
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        problem = f"cannot be used for compiled programs ({error.strerror})"
        raise InputError("--compiled", str(directory), problem, "name one that can be written to") from None
    compilation_cache.reset_cache()  # JAX settles on a directory, or none, when it first compiles
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # A run compiles dozens of small programs, whose milliseconds add up to seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
