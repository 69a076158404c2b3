"""Measures speed: every comparison side by side in one run, as medians with their spread.

    python -m launch.bench --suite=slide
    python -m launch.bench --suite=slide --workdir=DIR --repeats=3
    python -m launch.bench --suite=population --peers

  --suite=NAME     what is measured: slide | population
  --workdir=DIR    where bench.json is written; by default runs/bench-SUITE
  --repeats=N      repeats of each measurement, at least 3 (default 9)
  --peers          population: also PyTorch, pfl-research and Flower, the extra `peers`

Exit codes: 0 done, 2 a mistake in the command (one line says which), 130 interrupted.
"""

import datetime
import importlib
import pathlib
import shlex
import sys
from typing import NamedTuple

from absl import flags

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import unknown_name
from launch.hosts.distributed import start_devices
from launch.main import is_input_error, quiet_libraries
from launch.run.progress import print_table
from launch.run.workdir import versions, write_json
from launch.suites.timing import as_json, cell


class Suite(NamedTuple):
    """What `--suite` names.

    Attributes:
      module: has `measure(repeats) -> Iterator[Table]`.
      peers: its peers are packages that need not be there: `measure(repeats, peers=True)`.
      devices: JAX devices that it uses at most; on a CPU they are cores.
    """

    module: str
    peers: bool = False
    devices: int | None = None


SUITES = {
    "slide": Suite("launch.suites.slide.suite"),
    "population": Suite("launch.suites.population.suite", peers=True, devices=16),
}
LEAST_REPEATS = 3


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments` (without the program's name) and returns the exit code."""
    if {"--help", "-help", "-h"} & set(arguments):
        print(__doc__.strip())
        return 0
    quiet_libraries()
    try:
        suite, workdir, repeats, options = read_command(arguments)
        run(suite, workdir, repeats, options, f"python -m launch.bench {shlex.join(arguments)}")
    except ValueError as error:
        if not is_input_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was measured so far stands in bench.json", file=sys.stderr)
        return 130
    return 0


def read_command(arguments: list[str]) -> tuple[str, pathlib.Path, int, dict[str, bool]]:
    """Returns suite, work directory, repeats, and what else the suite is told.

    Raises:
      InputError: a flag or a value is wrong.
    """
    flag_values = flags.FlagValues()
    flags.DEFINE_string("suite", None, "what is measured", flag_values=flag_values)
    flags.DEFINE_string("workdir", None, "work directory", flag_values=flag_values)
    flags.DEFINE_integer("repeats", 9, "repeats of each", flag_values=flag_values)
    flags.DEFINE_bool("peers", False, "also other packages", flag_values=flag_values)
    try:
        _, *unexpected = flag_values(["launch.bench", *arguments])
    except flags.Error as error:
        raise InputError("command", shlex.join(arguments), str(error), "see --help") from None
    if unexpected:
        raise InputError("argument", unexpected[0], "is no flag", "see --help")
    if flag_values.suite not in SUITES:
        raise unknown_name("suite", flag_values.suite, list(SUITES))
    if flag_values.repeats < LEAST_REPEATS:
        problem = f"a median needs at least {LEAST_REPEATS}"
        raise InputError("repeats", flag_values.repeats, problem, "give e.g. --repeats=9")
    if flag_values.peers and not SUITES[flag_values.suite].peers:
        problem = f"the suite {flag_values.suite} always measures its peers"
        raise InputError("peers", True, problem, "leave --peers away")
    workdir = pathlib.Path(flag_values.workdir or pathlib.Path("runs", f"bench-{flag_values.suite}"))
    options = {"peers": True} if flag_values.peers else {}
    return flag_values.suite, workdir, flag_values.repeats, options


def run(suite: str, workdir: pathlib.Path, repeats: int, options: dict[str, bool], command: str) -> None:
    """Runs a suite, prints each table when it is there and writes all of them to bench.json."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be created ({error.strerror})"
        raise InputError("workdir", str(workdir), problem, "give another --workdir") from None
    if SUITES[suite].devices:
        start_devices(SUITES[suite].devices)
    module = importlib.import_module(SUITES[suite].module)
    record = {"suite": suite, "command": command, "date": datetime.date.today().isoformat()}
    record |= {"repeats": repeats, "versions": versions(), "tables": []}
    print(f"{suite}, {record['date']}: medians of {repeats} repeats; ", end="")
    print(", ".join(map(" ".join, record["versions"].items())))
    for table in module.measure(repeats, **options):
        print_table(table.title, table.columns, [list(map(cell, row)) for row in table.rows])
        print(f"  {table.note}" if table.note else "")
        record["tables"].append(as_json(table))
        write_json(workdir / "bench.json", record)
    print(f"written to {workdir / 'bench.json'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
