import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from own_process import QUICK_TO_COMPILE

from hfedmoe_jax.errors import InputError
from launch.hosts.distributed import (
    cluster,
    gather_processes,
    start_processes,
)
from launch.hosts.joining import listen
from launch.hosts.processes import EXIT_PROCESS_LOST
from launch.run.checkpoints import Checkpoints

# Shared by the processes and the test: a state of every kind of leaf, as a function of the step. Four
# devices in all, whatever the number of processes.
STATE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec

def values(step):
    return {
        "sharded": np.arange(40, dtype=np.float32).reshape(8, 5) / 4 + step,
        "columns": np.arange(48, dtype=np.int32).reshape(3, 16) - step,
        "replicated": (np.arange(7) / 7 * step).astype(jnp.bfloat16),
        "local": np.uint32(step),
        "numpy": np.array([1 / 3, -0.0, np.nan]) * step,
        "number": step,
    }

def state(step, mesh):
    parts = {"sharded": ("clients",), "columns": (None, "clients"), "replicated": ()}
    arrays = values(step)
    for name, part in parts.items():
        sharding = NamedSharding(mesh, PartitionSpec(*part))
        arrays[name] = jax.make_array_from_callback(
            arrays[name].shape, sharding, lambda at, array=arrays[name]: array[at]
        )
    arrays["local"] = jnp.asarray(arrays["local"])
    for name, part in (("keys", ("clients",)), ("key", ())):
        sharding = NamedSharding(mesh, PartitionSpec(*part))
        make = lambda: jax.random.split(jax.random.key(step), 8 if part else ())
        arrays[name] = jax.jit(make, out_shardings=sharding)()
    return arrays
"""

PROCESS = (
    STATE
    + """
import os, sys, time
from jax.experimental.multihost_utils import process_allgather
from launch.run.checkpoints import Checkpoints
from launch.hosts.distributed import gather_processes, is_first_process, start_processes
from launch.hosts.processes import end_process
port, processes, process, directory, restore, end = sys.argv[1:]
joined = start_processes(f"127.0.0.1:{port}", int(processes), int(process), directory)
with joined, Checkpoints(directory, keep=2) as checkpoints:
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    total = jax.jit(jax.shard_map(
        lambda array: jax.lax.psum(array.sum(0), "clients"),
        mesh=mesh, in_specs=PartitionSpec("clients"), out_specs=PartitionSpec(),
    ))
    assert np.array_equal(total(state(1, mesh)["sharded"]), values(1)["sharded"].sum(0))
    assert gather_processes(np.array([[1 / 3, -0.0, int(process)]])).tolist() == [
        [[1 / 3, -0.0, other]] for other in range(int(processes))
    ]
    step = 0
    if restore != "0":
        step, found = checkpoints.restore(state(0, mesh))
        assert step == int(restore), step
        for name, array in state(step, mesh).items():
            if isinstance(array, jax.Array):
                assert found[name].sharding == array.sharding, name
                if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                    array, found[name] = jax.random.key_data(array), jax.random.key_data(found[name])
                if not array.is_fully_addressable:
                    array, found[name] = process_allgather((array, found[name]), tiled=True)
            assert type(found[name]) is type(array), name
            assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name
    for number in (1, 2):
        checkpoints.save(step + number, state(step + number, mesh))
    checkpoints.wait()
    print("saved", flush=True)
    if end == "fail" and process == "1":
        raise ValueError("one of its own")
    while end not in ("well", "leave"):
        jax.block_until_ready(total(state(1, mesh)["sharded"]))
print("over" if is_first_process() else "gone")
if end == "leave" and process == "1":
    os.kill(os.getpid(), 9)
time.sleep(8 if process == "1" else 0)  # late
end_process(0)
"""
)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Group:
    """Real processes on this machine, four devices in all."""

    def __init__(self, directory, count, restore, end):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(4 // count)}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        environment["XLA_FLAGS"] = QUICK_TO_COMPILE
        port = free_port()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, *map(str, (port, count, index, directory, restore, end))],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def kill(self, index):
        for process in self.processes:
            assert process.stdout.readline() == "saved\n", process.communicate(timeout=180)
        self.processes[index].kill()

    def ends(self):
        """Returns the exit code, stdout and stderr of each; all must end by themselves."""
        try:
            texts = [process.communicate(timeout=180) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *text) for process, text in zip(self.processes, texts, strict=True)]


def damage_largest_file(directory):
    path = max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """What became of four groups, each of which continues from the checkpoints of the one before."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    ends = {}
    ends["well"] = Group(directory, 2, 0, "well").ends()
    assert [end[0] for end in ends["well"]] == [0, 0], ends["well"]
    damage_largest_file(directory / "2")
    four = Group(directory, 4, 1, "never")
    four.kill(2)
    ends["member killed"] = four.ends()
    two = Group(directory, 2, 3, "never")
    two.kill(0)
    ends["first killed"] = two.ends()
    ends["failed"] = Group(directory, 2, 5, "fail").ends()
    ends["killed at its end"] = Group(directory, 2, 7, "leave").ends()
    return directory, ends


def test_processes_compute_save_and_end_together_though_one_is_late(groups):
    assert groups[1]["well"] == [(0, "saved\nover\n", ""), (0, "saved\ngone\n", "")]


def test_others_stop_with_one_line_when_a_process_is_killed(groups):
    directory, ends = groups
    line = (
        "error: host {} of {} stopped responding; this one stops. The same command on every host continues "
        f"from the last checkpoint (round {{}}) in {directory}\n"
    )
    # The newest checkpoint was damaged on purpose: only the first process says so.
    (first, *others), expected = ends["member killed"], line.format(2, 4, 3)
    assert first[0] == EXIT_PROCESS_LOST
    warning, rest = first[2].split("\n", 1)
    assert warning.startswith("warning: checkpoint 2 is damaged") and "from checkpoint 1" in warning
    assert rest == expected
    assert others == [(EXIT_PROCESS_LOST, "", expected), (-9, "", ""), (EXIT_PROCESS_LOST, "", expected)]
    assert ends["first killed"] == [(-9, "", ""), (EXIT_PROCESS_LOST, "", line.format(0, 2, 5))]


def test_a_process_that_is_killed_when_all_is_done_changes_nothing(groups):
    assert groups[1]["killed at its end"] == [(0, "saved\nover\n", ""), (-9, "saved\ngone\n", "")]


def test_a_process_that_fails_says_why_and_the_others_stop(groups):
    (first, failed) = groups[1]["failed"]
    assert first[0] == EXIT_PROCESS_LOST
    assert first[2].startswith("error: host 1 of 2 stopped with an error; this one stops.")
    assert first[2].count("\n") == 1
    assert failed[0] == 1
    assert failed[2].endswith("ValueError: one of its own\n")


def test_one_process_restores_what_several_saved(groups):
    made = {}
    exec(STATE, made)
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    with Checkpoints(groups[0], keep=2) as checkpoints:
        step, found = checkpoints.restore(made["state"](0, mesh))
    assert step == 9
    expected = made["state"](9, mesh)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        was = found[name]
        if name in ("key", "keys"):
            array, was = jax.random.key_data(array), jax.random.key_data(was)
        assert type(was) is type(array)
        assert np.asarray(was).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize(
    ("place", "flag"),
    [
        ((None, 2, 0), "--coordinator"),
        (("localhost:1234", None, 0), "--processes"),
        (("localhost:1234", 2, None), "--process"),
        (("localhost", 2, 0), "--coordinator"),
        ((":1234", 2, 0), "--coordinator"),
        (("localhost:port", 2, 0), "--coordinator"),
        (("localhost:65536", 2, 0), "--coordinator"),
        (("auto", 2, 0), "--coordinator"),
        (("localhost:1234", 0, 0), "--processes"),
        (("localhost:1234", 2, 2), "--process"),
        (("localhost:1234", 2, -1), "--process"),
    ],
)
def test_a_wrong_place_is_named(tmp_path, place, flag):
    with pytest.raises(InputError) as caught:
        start_processes(*place, tmp_path)
    values = dict(zip(("--coordinator", "--processes", "--process"), place, strict=True))
    assert caught.value.field == flag
    assert caught.value.value == values[flag]


def test_a_port_in_use_is_named(tmp_path):
    with listen("localhost", 0) as server:
        place = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=r"cannot listen there .*in use") as caught:
            start_processes(place, 2, 0, tmp_path)
    assert caught.value.field == "--coordinator"


@pytest.mark.parametrize("place", [(None, None, None), ("localhost:1234", 1, 0)])
def test_one_process_is_alone(tmp_path, place):
    with start_processes(*place, tmp_path):
        assert gather_processes(np.arange(3.0)).tolist() == [[0.0, 1.0, 2.0]]


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"} | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        # A batch script outside srun: one process, whatever the job was given.
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
    ],
)
def test_clusters_are_known_by_their_environment(environment, kind):
    assert cluster(environment) == kind


SLURM_TASK = """
import sys
import jax
from launch.hosts.distributed import gather_processes, start_processes
from launch.hosts.processes import end_process
with start_processes(None, None, None, sys.argv[1]):
    print(gather_processes(jax.process_index()).tolist())
end_process(0)
"""


def test_tasks_of_slurm_meet_by_their_environment(tmp_path):
    """Two processes with what `srun` sets for the tasks of a step on one host; SLURM itself is not here."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    environment = os.environ | job | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_TO_COMPILE}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM_TASK, str(tmp_path)],
            env=environment | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [(*task.communicate(timeout=120), task.returncode) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert ends == 2 * [("[0, 1]\n", "", 0)]
