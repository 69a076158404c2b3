"""JAX's devices and compilation cache: set up before JAX computes anything."""

import contextlib
import os
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from hfedmoe_jax.errors import InputError
from launch.run.compiled_cache import remove_damaged


def configure_devices(most: int, experts: int = 1) -> None:
    """Makes every CPU core a JAX device; without effect once JAX has started.

    A client runs fastest alone on one core: clients spread over single-core devices do about three times
    the steps a second of one device with as many threads. Accelerators are not changed, nor are devices
    that the user has set by XLA_FLAGS or JAX_NUM_CPU_DEVICES.

    Args:
      most: devices that can be used at the same time.
      experts: devices that the experts of one model are spread over.
    """
    chosen = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if "xla_cpu_multi_thread_eigen" not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} --xla_cpu_multi_thread_eigen=false".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has started, for example in a notebook
        jax.config.update("jax_num_cpu_devices", num_devices(cores, most, experts))


def num_devices(cores: int, most: int, experts: int) -> int:
    """Returns the number of devices for a CPU: a multiple of `experts`, and at most one a core if possible.

    Args:
      cores: CPU cores that this process may use; with fewer than `experts`, devices share a core.
      most: devices that can be used at the same time.
      experts: devices that the experts of one model are spread over.

    >>> num_devices(cores=3, most=16, experts=2), num_devices(cores=1, most=16, experts=2)
    (2, 2)
    """
    return max(experts, min(cores, most) // experts * experts)


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Compiles anew in its context: a program for a device that is not here cannot be read back."""
    flag = "jax_enable_compilation_cache"
    enabled = jax.config.values[flag]
    jax.config.update(flag, False)
    try:
        yield
    finally:
        jax.config.update(flag, enabled)


def use_compilation_cache(directory: str | os.PathLike) -> None:
    """Sets the directory of JAX's persistent compilation cache, where later runs find their programs.

    Of several processes only the first one writes to it. Programs that are incomplete are removed.

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
    remove_damaged(directory)
    compilation_cache.reset_cache()  # or a directory set after the first compilation has no effect
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # By default programs that compile within a second are not kept; a run has dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
