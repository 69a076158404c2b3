"""Python code of a test in a process of its own, which has other devices than this one."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def run_python(code: str, devices: int, folder: str = "hfedmoe_jax") -> str:
    """Returns what the code prints, on so many devices of the CPU.

    Args:
      folder: in tests/, whose modules the code may import, beside those of tests/ itself.
    """
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in tests/conftest.py
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS / folder, TESTS, TESTS.parent))),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false",
    }
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    return child.stdout
