import os
import subprocess
import sys

from launch.run.compiled_cache import remove_damaged

COMPILED = """
import sys
import jax, jax.numpy as jnp
from launch.hosts.devices import use_compilation_cache
from launch.run.program import quiet_libraries
quiet_libraries()
use_compilation_cache(sys.argv[1])
jax.jit(lambda array: array * 3 + 1)(jnp.ones(2))
"""


def compile_in(directory):
    command = [sys.executable, "-c", COMPILED, str(directory)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert (child.returncode, child.stderr) == (0, "")
    return {path.name: path.stat().st_size for path in directory.glob("*-cache")}


def test_programs_that_a_kill_left_incomplete_are_compiled_and_kept_again(tmp_path):
    whole = compile_in(tmp_path)
    half = {path: path.stat().st_size // 2 for path in tmp_path.glob("*-cache")}
    for path, size in half.items():
        os.truncate(path, size)
    assert compile_in(tmp_path).keys() == whole.keys()
    assert all(path.stat().st_size > size for path, size in half.items())


def test_only_damaged_programs_are_removed(tmp_path):
    compile_in(tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    for name, content in (("empty", b""), ("zeroed", bytes(100))):
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "other").write_bytes(b"")
    remove_damaged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "other"])
