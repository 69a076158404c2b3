import os
import subprocess
import sys

from launch.run.compiled_cache import remove_damaged

COMPILED = """
import sys
import jax, jax.numpy as jnp
from launch.hosts.devices import use_compilation_cache
from launch.run.compiled_cache import remove_damaged
from launch.run.program import quiet_libraries
quiet_libraries()
use_compilation_cache(sys.argv[1])
if sys.argv[2] == "checked":
    remove_damaged(sys.argv[1])
jax.jit(lambda array: array * 3 + 1)(jnp.ones(2))
"""


def compile_in(directory, how="checked"):
    command = [sys.executable, "-c", COMPILED, str(directory), how]
    child = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert (child.returncode, child.stderr) == (0, "")
    return {path.name: path.stat().st_size for path in directory.glob("*-cache")}


def test_programs_that_a_kill_left_incomplete_are_compiled_and_kept_again(tmp_path):
    whole = compile_in(tmp_path)
    for path in tmp_path.glob("*-cache"):
        os.truncate(path, path.stat().st_size // 2)
    half = compile_in(tmp_path, "unchecked")
    assert half.keys() == whole.keys()
    assert all(half[name] < size for name, size in whole.items()), "JAX now mends them itself"
    assert compile_in(tmp_path).keys() == whole.keys()
    assert all(path.stat().st_size > half[path.name] for path in tmp_path.glob("*-cache"))


def test_only_damaged_programs_are_removed(tmp_path):
    compile_in(tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    for name, content in (("empty", b""), ("zeroed", bytes(100))):
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "other").write_bytes(b"")
    remove_damaged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "other"])
