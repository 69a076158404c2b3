"""What is kept of every client is the same on one device and on two."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]
SCRIPT = """
import jax
from loop import algorithm_of, assert_same, config_of, rounds, start
from tiny import run_round
from hfedmoe_jax.mesh import make_mesh

config = config_of(fl__algorithm="topk", fl__base="hfedmoe")
states = []
for devices in (jax.devices()[:1], jax.devices()):
    mesh = make_mesh(devices)
    algorithm = algorithm_of(config, mesh)
    state = algorithm.init(start())
    for data, key in rounds(config):
        state, _ = run_round(algorithm, state, data, key, mesh)
    states.append(jax.device_get(state))
assert_same(*states)
print(len(jax.devices()), "devices, the same state")
"""


def test_the_state_does_not_depend_on_the_devices():
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", pathlib.Path(__file__).parent))),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false",
    }
    child = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "2 devices, the same state\n"
