"""Random bad values in random config fields: each ends in a dry run or in one line, never in a traceback.

    python tests/fuzz_configs.py 300 [FIRST_SEED]    # prints the commands that end otherwise

A case is a seed: the same number is the same command.
"""

import contextlib
import io
import pathlib
import random
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import tiny_run  # noqa: E402

from launch.main import main  # noqa: E402
from launch.run.command import field_values, load_config  # noqa: E402

SECONDS = 60  # a case that takes longer hangs
BYTES = 12 * 2**30  # a case that asks for more fails
INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 17, 1000, 10**6, 2**20, 2**31, 2**63, 10**20)
FLOATS = ("nan", "inf", "-inf", "-1", "0", "1e-320", "1e-9", "0.5", "1", "2", "1e9", "1e308")
TEXTS = (
    "",
    "none",
    "sgd",
    "topk",
    "é",
    "\ud800",
    "$x_{$",
    "a" * 5000,
    "../..",
    "/",
    "(",
    ".*",
    "\x00",
    "hub:x/y",
)


def command_of(seed: int, workdir: pathlib.Path, train_path: pathlib.Path) -> list[str]:
    """Returns the command of a case: a tiny run with one to three of its fields set anew."""
    rng = random.Random(seed)
    fields = field_values(load_config(f"{ROOT}/configs/hfedmoe.py:smoke"))
    changed = {}
    for name in rng.sample(sorted(fields), rng.choice((1, 1, 2, 3))):
        kind = type(fields[name])
        if kind is bool:
            value = rng.choice(("true", "false"))
        elif kind is int:
            value = str(rng.choice(INTEGERS))
        else:
            value = rng.choice(FLOATS if kind is float else TEXTS)
        changed[name.replace(".", "__")] = value
    return [*tiny_run.arguments(workdir, train_path, **changed), "--dry_run"]


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raises TimeoutError in what takes longer than `SECONDS`."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault_of(command: list[str]) -> str | None:
    """Returns what is wrong with how a command ends, if anything."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    lines = err.getvalue().splitlines()
    if code == 2 and len(lines) == 1 and re.match(r"error: .+", lines[0]):
        return None
    return None if code == 0 else f"exit code {code}, {lines[-3:]}"


def faults(seeds: range, folder: pathlib.Path) -> Iterator[tuple[list[str], str]]:
    """Yields the commands that end in another way, with what is wrong."""
    train_path = tiny_run.write_jsonl(folder / "train.jsonl", tiny_run.texts(60))
    for seed in seeds:
        command = command_of(seed, folder / "run", train_path)
        if (fault := fault_of(command)) or (folder / "run").exists():
            yield command, fault or "a dry run wrote into the work directory"
        if seed % 20 == 19:
            jax.clear_caches()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as name:
        found = 0
        for command, fault in faults(range(first, first + count), pathlib.Path(name)):
            found += 1
            changed = [argument for argument in command if argument.startswith("--config.")]
            print(ascii(" ".join(changed)), "\n   ", ascii(fault), flush=True)
    print(f"{found} of {count} cases failed")
    sys.exit(found > 0)
