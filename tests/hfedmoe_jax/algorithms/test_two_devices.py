"""What is kept of every client is the same on one device and on two, up to rounding."""

import pytest
from own_process import run_python

SCRIPT = """
import jax
from loop import algorithm_of, assert_close, config_of, rounds, start
from tiny import run_round
from hfedmoe_jax.mesh import make_mesh

config = config_of(fl__algorithm="scaffold", client__learning_rate=0.1)
states = []
for devices in (jax.devices()[:1], jax.devices()):
    mesh = make_mesh(devices)
    algorithm = algorithm_of(config, mesh)
    state = algorithm.init(start())
    for data, key in rounds(config):
        state, _ = run_round(algorithm, state, data, key, mesh)
    states.append(jax.device_get(state))
assert_close(*states, rtol=1e-4, atol=2e-5)
print(len(state.clients.shared["embed"].sharding.device_set), "devices, the same state")
"""


@pytest.mark.slow
def test_the_state_does_not_depend_on_the_devices():
    printed = run_python(SCRIPT, devices=2, folder="hfedmoe_jax/algorithms")
    assert printed == "2 devices, the same state\n"
