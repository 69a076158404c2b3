import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_process import device_flags

from launch.run.checkpoints import Checkpoints, fingerprint, saved_digests


class Moments(NamedTuple):
    first: jax.Array
    second: np.ndarray


@flax.struct.dataclass
class State:
    params: dict
    moments: Moments
    key: jax.Array
    counts: tuple
    label: str = flax.struct.field(pytree_node=False, default="a label")


def make_state(seed: int) -> State:
    key = jax.random.key(seed)
    return State(
        params={
            "layer.0/weight": jax.random.normal(key, (64, 33)),
            "half": jax.random.normal(key, (7,), jnp.bfloat16),
            "empty": jnp.zeros((0, 3)),
            "nothing": None,
        },
        moments=Moments(jnp.array([True, False]), np.random.RandomState(seed).randn(5)),
        key=jax.random.split(key, 3),
        counts=(
            jnp.uint32(2**32 - 1 - seed),
            np.arange(4, dtype=np.uint32) + np.uint32(seed),
            np.array([np.nan, -0.0, np.inf]) * (seed + 1),
            np.float64(1 / 3 + seed),
            2**40 + seed,
            0.1 * seed,
            seed % 2 == 0,
        ),
    )


def raw_leaves(state) -> list[tuple]:
    """What must be equal: kind, type, shape and bits of every leaf."""
    leaves = []
    for leaf in jax.tree.leaves(state):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        bits = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        leaves.append((type(leaf), str(getattr(leaf, "dtype", "")), bits.shape, bits.tobytes()))
    return leaves


def assert_same(state, expected) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert raw_leaves(state) == raw_leaves(expected)


def save_steps(directory, *steps: int, keep: int = 3) -> None:
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def files_of(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def test_restores_every_kind_of_leaf_bit_for_bit(tmp_path):
    save_steps(tmp_path / "c", 5)
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        step, state = checkpoints.restore(make_state(0))
    assert step == 5
    assert_same(state, make_state(5))


def test_empty_directory_has_nothing_to_restore(tmp_path, capsys):
    with Checkpoints(tmp_path / "new" / "c", 3) as checkpoints:
        assert checkpoints.restore(make_state(0)) is None
    assert capsys.readouterr().err == ""


def test_keeps_the_newest(tmp_path):
    save_steps(tmp_path / "c", 1, 2, 3, 10, keep=2)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["10", "3"]


def test_the_newest_readable_checkpoint_says_what_it_belongs_to(tmp_path):
    assert saved_digests(tmp_path / "c") == {}
    for step, digests in ((2, {"the texts": "aa"}), (10, {"the texts": "bb"})):
        with Checkpoints(tmp_path / "c", 3, digests) as checkpoints:
            checkpoints.save(step, make_state(step))
    assert saved_digests(tmp_path / "c") == {"the texts": "bb"}
    (tmp_path / "c" / "10" / "_CHECKPOINT_METADATA").write_text("{")
    assert saved_digests(tmp_path / "c") == {"the texts": "aa"}


def test_an_interrupt_says_after_which_step_the_run_continues(tmp_path):
    for saves, note in ((0, "no round is saved yet"), (2, "it continues after round 2")):
        with pytest.raises(KeyboardInterrupt) as stopped, Checkpoints(tmp_path / "c", 3) as checkpoints:
            for step in range(1, saves + 1):
                checkpoints.save(step, {"weight": np.ones(2)})
            raise KeyboardInterrupt
        assert stopped.value.__notes__ == [note]


def held() -> tuple[int, int]:
    """Returns how many file descriptors and threads this process has."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_descriptors_and_threads_do_not_grow_with_the_checkpoints(tmp_path):
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        counts = []
        for step in range(1, 31):
            checkpoints.save(step, {"jax": jnp.full(5, step), "numpy": np.full(3, step)})
            checkpoints.wait()
            counts.append(held())
    early, late = np.array(counts[9]), np.array(counts[-1])
    # Thread pools fill up to the number of cores; a leak takes at least one a checkpoint.
    assert (late - early < 10).all(), counts


def test_saves_what_the_state_was_when_save_was_called(tmp_path):
    numbers = np.arange(3_000_000, dtype=np.float32)
    state = {"numpy": numbers.copy(), "jax": jnp.array(numbers)}
    overwrite = jax.jit(lambda array: array * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path / "c", 1) as checkpoints:
        checkpoints.save(1, state)
        state["numpy"][:] = -1
        jax.block_until_ready(overwrite(state["jax"]))
        _, restored = checkpoints.restore({"numpy": numbers, "jax": jnp.array(numbers)})
    np.testing.assert_array_equal(restored["numpy"], numbers)
    np.testing.assert_array_equal(restored["jax"], numbers)


def test_takes_the_devices_of_the_template(tmp_path):
    device = jax.devices()[0]
    bound = {"bound": jax.device_put(jnp.arange(3), device), "key": jax.device_put(jax.random.key(0), device)}
    free = {"free": jnp.arange(3)}
    with Checkpoints(tmp_path / "c", 1) as checkpoints:
        checkpoints.save(1, bound | free)
        _, restored = checkpoints.restore(bound | free)
    assert restored["bound"].committed and restored["key"].committed and not restored["free"].committed


EVERY_TYPE = {
    str(np.dtype(kind)): np.arange(-3, 3).astype(kind).reshape(2, 3)
    for kind in (bool, "int8", "uint16", "int32", "float16", jnp.bfloat16, "float32", "complex64")
}


def test_a_leaf_may_move_between_host_and_device(tmp_path):
    on_device = jax.tree.map(lambda array: jax.device_put(array, jax.devices()[0]), EVERY_TYPE)
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        for state, other in ((on_device, EVERY_TYPE), (EVERY_TYPE, on_device)):
            checkpoints.save(1, state)
            _, restored = checkpoints.restore(other)
            assert_same(restored, other)


@given(st.sampled_from(sorted(EVERY_TYPE)), st.integers(0, 2**16), st.integers(0, 7))
def test_every_bit_tells_in_the_fingerprint(kind, byte, bit):
    array = EVERY_TYPE[kind]
    content = bytearray(array.tobytes())
    content[byte % len(content)] ^= 1 if kind == "bool" else 1 << bit
    changed = np.frombuffer(content, array.dtype).reshape(array.shape)
    assert fingerprint({"a": changed}).tobytes() != fingerprint({"a": array}).tobytes()
    assert fingerprint({"a": jnp.asarray(changed)}).tobytes() == fingerprint({"a": changed}).tobytes()


def test_order_tells_in_the_fingerprint():
    array = np.arange(6.0)
    assert fingerprint({"a": array[::-1]}).tobytes() != fingerprint({"a": array}).tobytes()


def flip_a_bit(directory):
    path = files_of(directory)[-1]  # the largest file holds the arrays
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(directory):
    path = files_of(directory)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_a_file(directory):
    files_of(directory)[-1].unlink()


def garble_every_file(directory):
    for path in files_of(directory):
        path.write_bytes(os.urandom(path.stat().st_size))


def empty(directory):
    for path in files_of(directory):
        path.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove_a_file, garble_every_file, empty])
def test_damaged_newest_is_reported_and_the_previous_used(tmp_path, capfd, damage):
    save_steps(tmp_path / "c", 1, 2, 3)
    damage(tmp_path / "c" / "3")
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        step, state = checkpoints.restore(make_state(0))
        lines = capfd.readouterr().err.splitlines()
        assert step == 2
        assert_same(state, make_state(2))
        assert len(lines) == 1
        assert "checkpoint 3 is damaged" in lines[0] and "continuing from checkpoint 2" in lines[0]
        checkpoints.save(3, make_state(3))
        step, state = checkpoints.restore(make_state(0))
    assert step == 3
    assert_same(state, make_state(3))


def test_all_damaged_starts_afresh(tmp_path, capsys):
    save_steps(tmp_path / "c", 1, 2)
    truncate(tmp_path / "c" / "1")
    remove_a_file(tmp_path / "c" / "2")
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        assert checkpoints.restore(make_state(0)) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint 2" in line and "checkpoint 1" in line and "starting afresh" in line


def test_texts_of_any_length_come_back(tmp_path):
    with Checkpoints(tmp_path / "c", 1) as checkpoints:
        for step, text in enumerate(("", "round,loss\n1,0.5\n", "ü" * 1000), 1):
            checkpoints.save(step, {"text": text, "array": np.ones(2)})
            found = checkpoints.restore({"text": "another", "array": np.zeros(2)})
            assert found and (found[0], found[1]["text"]) == (step, text)


def test_a_copy_under_another_number_is_not_used(tmp_path, capsys):
    save_steps(tmp_path / "c", 1, 2)
    shutil.copytree(tmp_path / "c" / "1", tmp_path / "c" / "7")
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        step, state = checkpoints.restore(make_state(0))
    assert step == 2
    assert_same(state, make_state(2))
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint 7 is a copy of checkpoint 1" in line and "continuing from checkpoint 2" in line


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ({"a": jnp.zeros(3), "b": jnp.zeros(2)}, "it lacks ['b']"),
        ({}, "it holds an unknown ['a']"),
        ({"a": jnp.zeros(4)}, "['a'] is float32[3], here float32[4]"),
        ({"a": jnp.zeros(3, jnp.int32)}, "['a'] is float32[3], here int32[3]"),
    ],
)
def test_state_of_another_program_is_not_used(tmp_path, capsys, template, reason):
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(3)})
        assert checkpoints.restore(template) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"checkpoint 1 does not fit this run ({reason})" in line


# Every child has two devices and a replicated state; it verifies what it restores, saves a step for
# good, and is killed while a later one is being written.
KILLED = """
import os, pathlib, signal, sys
import jax, jax.numpy as jnp, numpy as np
from launch.run.checkpoints import Checkpoints
directory = pathlib.Path(sys.argv[1])
mesh = jax.make_mesh((2,), ("clients",))
replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def state(step):
    array = jax.device_put(jnp.full(8_000_000, step, jnp.float32), replicated)
    return {"jax": array, "numpy": np.full(9, step)}
checkpoints = Checkpoints(directory, keep=2)
restored = checkpoints.restore(state(0))
done = 0
if restored:
    done, found = restored
    assert float(found["jax"].min()) == float(found["jax"].max()) == done
    assert found["numpy"].tolist() == [done] * 9
    assert found["jax"].sharding == replicated
checkpoints.save(done + 1, state(done + 1))
checkpoints.wait()
checkpoints.save(done + 2, state(done + 2))
print(done, flush=True)
while sys.argv[2] == "writing" and not list(directory.glob("*tmp*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving_continues_from_the_last_whole_checkpoint(tmp_path, capfd):
    environment = os.environ | {"XLA_FLAGS": device_flags(2)}
    at_least = 0
    for moment in ("writing", "at once", "writing"):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "c"), moment]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert child.stderr == ""
        if moment == "writing":
            assert list((tmp_path / "c").glob("*tmp*")), "the kill came too late to test anything"
        done = int(child.stdout)
        assert done >= at_least
        at_least = done + 1
    template = {"jax": jnp.zeros(8_000_000), "numpy": np.zeros(9, int)}
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        step, state = checkpoints.restore(template)
    assert step >= at_least
    assert state["jax"].min() == state["jax"].max() == step
    assert capfd.readouterr().err == ""


LIMITED = """
import os, resource, signal, sys
from launch.run.starting import end_at_interrupt
end_at_interrupt()
import numpy as np
from launch.run.checkpoints import Checkpoints
from launch.run.program import run_program
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {"numbers": np.random.default_rng(0).random(30_000)}
def work():
    with Checkpoints(sys.argv[1], keep=2) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        kind, most = getattr(resource, f"RLIMIT_{sys.argv[2]}"), int(sys.argv[3])
        if sys.argv[2] == "NOFILE":
            most += len(os.listdir("/proc/self/fd"))
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
        checkpoints.save(2, state)
        checkpoints.wait()
sys.exit(run_program([], "", work, ""))
"""
SIZE = "File too large; raise the limit of file sizes (ulimit -f)"
FILES = "Too many open files; raise the limit of open files (ulimit -n)"


@pytest.mark.parametrize(
    ("limit", "most", "problem"),
    [("FSIZE", 20_000, SIZE), ("NOFILE", 0, FILES), ("NOFILE", 2, FILES), ("NOFILE", 4, FILES)],
)
def test_a_save_that_storage_refuses_is_one_line_and_the_one_before_is_whole(
    tmp_path, capfd, limit, most, problem
):
    """And the process ends: threads that Orbax leaves would wait for ten minutes."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "c"), limit, str(most)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    rest = "and give the same command again; it continues after round 1"
    assert child.stderr == f"error: {tmp_path / 'c'}: {problem} {rest}\n"
    assert child.returncode == 1
    template = {"numbers": np.zeros(30_000)}
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        assert checkpoints.restore(template)[0] == 1
    assert capfd.readouterr().err == ""


REMOVED = """
import pathlib, shutil, sys, time
from launch.run.starting import end_at_interrupt
end_at_interrupt()
import numpy as np
from launch.run.checkpoints import Checkpoints
from launch.run.program import run_program
directory = pathlib.Path(sys.argv[1])
state = {str(number): np.random.default_rng(0).random(30_000) for number in range(60)}
def work():
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(1, state)
        while not list(directory.glob("1.*tmp*/state*/*")):
            time.sleep(0.001)
        time.sleep(float(sys.argv[2]))
        while directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
        checkpoints.wait()
sys.exit(run_program([], "", work, ""))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.01, 0.03])
def test_a_directory_removed_during_a_save_is_one_line(tmp_path, seconds):
    """Whatever TensorStore and Orbax say of it then."""
    command = [sys.executable, "-c", REMOVED, str(tmp_path / "c"), str(seconds)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    rest = "put back what was removed and give the same command again; no round is saved yet"
    assert child.stderr in ("", f"error: {tmp_path / 'c'}: No such file or directory; {rest}\n")
    assert child.returncode == bool(child.stderr)
