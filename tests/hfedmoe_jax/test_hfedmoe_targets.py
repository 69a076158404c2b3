"""Every program of a federated run compiles for a TPU and an H100, where what describes them is installed.

Neither is needed. `make test-targets` installs libtpu.
"""

import pytest
import targets
from test_experiment import FIELDS, tiny_data

from configs import hfedmoe
from hfedmoe_jax import Experiment, make_mesh
from launch.hosts.devices import no_compilation_cache
from launch.targets import read_target

MARKS = {"v5e:2x2": ":T(", "h100:1x2": "fusion_backend_config"}
"""By target: what the text of a program for it has and for a CPU has not."""

COMMON = FIELDS | {"data__seq_len": 8, "model__width": 8, "model__num_heads": 2, "model__hidden": 6}
PRESETS = {
    "default": ("bbc", {"budget__fraction": 0.25, "model__num_layers": 2}),
    "bfloat16": ("bbc", {"budget__fraction": 0.25, "model__precision": "bfloat16"}),
    "active": ("active", {}),
    "pod": ("pod", {"model__num_layers": 2}),  # experts over two chips, remat, bfloat16, several hosts
}


@pytest.mark.parametrize("target", targets.PLUGINS)
@pytest.mark.parametrize(("preset", "fields"), PRESETS.values(), ids=PRESETS)
def test_every_program_of_a_preset_compiles(preset, fields, target):
    devices = targets.devices(target)
    config = hfedmoe.get_config(preset)
    for name, value in (COMMON | fields).items():
        section, _, field = name.partition("__")
        config[section][field] = value
    config.fl.update(batch_size=4, local_steps=2)
    mesh = make_mesh(devices, config.mesh.experts)
    experiment = Experiment(config, mesh, tiny_data(), read_target(target).memory_bytes)
    with no_compilation_cache():
        compiled = {name: lower().compile() for name, lower in experiment.lower()}
    assert {"open", "settle", "finish", "evaluate", "usage"} < set(compiled)
    assert any(name.startswith("tier") for name in compiled)
    memory = [program.memory_analysis().temp_size_in_bytes for program in compiled.values()]
    assert 0 < max(memory) < read_target(target).memory_bytes
    assert MARKS[target] in "".join(program.as_text() for program in compiled.values())
