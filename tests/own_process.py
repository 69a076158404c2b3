"""Python code of a test in a process of its own, which has other devices than this one."""

import os
import pathlib
import subprocess
import sys

import jax

TESTS = pathlib.Path(__file__).parent

# Shortens compilation, the most of a test's time, to about two thirds. Later versions do not know the flag.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""


def device_flags(devices: int) -> str:
    """XLA's flags for so many devices of the CPU, set up as `configure_devices` does."""
    count = f"--xla_force_host_platform_device_count={devices}"
    return f"{count} --xla_cpu_multi_thread_eigen=false {QUICK_TO_COMPILE}"


def run_python(code: str, devices: int, folder: str = "hfedmoe_jax") -> str:
    """Returns what the code prints, on so many devices of the CPU.

    Args:
      folder: in tests/, whose modules the code may import, beside those of tests/ itself.
    """
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in tests/conftest.py
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS / folder, TESTS, TESTS.parent))),
        "XLA_FLAGS": device_flags(devices),
    }
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    return child.stdout
