"""JAX is set up once, as the machine allows and unless the user did; programs are kept."""

import os
import subprocess
import sys

import jax
import pytest

from hfedmoe_jax.errors import InputError
from launch.hosts.devices import configure_devices, num_devices, use_compilation_cache


@pytest.mark.parametrize("cores", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("most", [1, 2, 3, 16])
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_the_devices_of_a_cpu_are_as_many_as_useful(cores, most, experts):
    # The most that the experts divide, and no more than there is work or cores for: found one by one.
    useful = [number for number in range(experts, 17, experts) if number <= min(cores, most)]
    assert num_devices(cores, most, experts) == (useful[-1] if useful else experts)


def test_devices_are_set_up_unless_the_user_did(monkeypatch):
    made = {}
    monkeypatch.setattr(jax.config, "update", made.__setitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    configure_devices(most=16, experts=2)
    assert (made, os.environ["XLA_FLAGS"]) == ({}, "--xla_force_host_platform_device_count=3")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    configure_devices(most=16, experts=2)
    assert made == {"jax_num_cpu_devices": 2}
    assert os.environ["XLA_FLAGS"] == "--xla_of_the_user=1 --xla_cpu_multi_thread_eigen=false"
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    made.clear()
    configure_devices(most=16)
    assert made == {}


COMPILED = """
import sys
import jax, jax.numpy as jnp
from launch.hosts.devices import use_compilation_cache
use_compilation_cache(sys.argv[1])
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
spec = jax.sharding.PartitionSpec("clients")
program = lambda array: jax.lax.psum(array, "clients")
for _ in range(2):
    print(sum("cache_hits" in event for event in events))
    jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(jnp.ones(2))
    jax.clear_caches()
print(sum("cache_hits" in event for event in events) > 0)
"""


def test_compiled_programs_are_kept(tmp_path):
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "a" / "compiled")]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert (child.stdout.split(), child.stderr) == (["0", "0", "True"], "")


def test_a_directory_for_compiled_programs_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used for compiled programs"):
        use_compilation_cache(tmp_path / "file" / "compiled")
