"""Devices: one JAX device a CPU core where there is no accelerator."""

import contextlib
import os

import jax


def start_devices(most: int) -> None:
    """Sets JAX up for a population of clients; without effect once JAX has computed something.

    On a CPU a client runs fastest alone on one core, so each core becomes a device and the
    clients are spread over them (about three times the client steps of one device with as many
    threads). Accelerators are left as they are, and so is a setting that the user made.

    Args:
      most: devices that there is work for.
    """
    chosen = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in chosen:
        return
    if "xla_cpu_multi_thread_eigen" not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} --xla_cpu_multi_thread_eigen=false".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has started: in a notebook, say
        jax.config.update("jax_num_cpu_devices", min(cores, most))
