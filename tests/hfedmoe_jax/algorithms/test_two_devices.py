"""Clients' states, and what is added to frozen parameters, are the same on one device and on two."""

import pytest
from own_process import run_python

SCRIPT = """
import jax
from loop import MODEL, algorithm_of, assert_close, config_of, rounds
from tiny import run_round, tiny_params
from hfedmoe_jax.mesh import make_mesh

config = config_of(client__learning_rate=0.1, **FIELDS)
adapters = {name: value for name, value in FIELDS.items() if name.startswith("model")}
states = []
for devices in (jax.devices()[:1], jax.devices()):
    mesh = make_mesh(devices)
    algorithm = algorithm_of(config, mesh)
    state = algorithm.init(tiny_params(**MODEL, **adapters))
    for data, key in rounds(config):
        state, _ = run_round(algorithm, state, data, key, mesh)
    states.append(jax.device_get((state, algorithm.snapshot(state))))
assert_close(*states, rtol=1e-4, atol=2e-5)
print(len(jax.tree.leaves(state.KEPT)[0].sharding.device_set), "devices, the same state")
"""
CASES = {
    "clients": {"fl__algorithm": "scaffold"},
    "extra": {"fl__algorithm": "flora", "fl__base": "fedavg", "model__train": "lora", "model__lora_rank": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "fields"), CASES.items(), ids=CASES)
def test_the_state_does_not_depend_on_the_devices(kept, fields):
    script = SCRIPT.replace("KEPT", kept).replace("FIELDS", repr(fields))
    printed = run_python(script, devices=2, folder="hfedmoe_jax/algorithms")
    assert printed == "2 devices, the same state\n"
