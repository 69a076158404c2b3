"""Measures speed and memory. Compared calls take turns in one run; results are medians with quartiles.

    python -m launch.bench --suite=slide
    python -m launch.bench --suite=slide --workdir=DIR --repeats=3
    python -m launch.bench --suite=population --peers
    python -m launch.bench --suite=checkouts --against=DIR --repeats=3

  --suite=NAME     what is measured:
                     slide       solvers and latency kernels, compared with NumPy and HiGHS
                     population  a federated round by chunk, cohort, budget and device
                     pretrained  SmolLM2 beside PyTorch, cached trunks, reading (`make pretrained`)
                     checkouts   speed and memory of whole jobs, compared with another commit
  --workdir=DIR    directory of bench.json; by default runs/bench-NAME
  --repeats=N      repeats of each measurement, at least 3 (default 9)
  --peers          population: also compare with PyTorch, pfl-research and Flower (the extra `peers`)
  --against=DIR    checkouts: directory of the other commit, e.g. made by `git worktree add DIR COMMIT`

Exit codes: 0 done, 2 a mistake in the command (one line says which), 130 interrupted.
"""

import datetime
import importlib
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

from launch.run.starting import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # while the following imports load JAX

from absl import flags

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import unknown_name
from launch.hosts.devices import configure_devices
from launch.run.program import run_program
from launch.run.progress import print_table
from launch.run.workdir import versions, write_json
from launch.suites.timing import as_json, cell


class Suite(NamedTuple):
    """A value of `--suite`.

    Attributes:
      module: has `measure(repeats, **options) -> Iterator[Table]`.
      options: flags of its own that may be given, which `measure` then takes by name.
      required: those of them that must be.
      devices: the most JAX devices that it uses; on a CPU each is a core. None: as JAX starts.
    """

    module: str
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    devices: int | None = None


SUITES = {
    "slide": Suite("launch.suites.slide.suite"),
    "population": Suite("launch.suites.population.suite", options=("peers",), devices=16),
    "pretrained": Suite("launch.suites.pretrained"),
    "checkouts": Suite("launch.suites.checkouts", options=("against",), required=("against",)),
}
OPTIONS = ("peers", "against")
LEAST_REPEATS = 3


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments` (without the program's name) and returns the exit code."""
    return run_program(
        arguments,
        usage=__doc__ or "",
        work=lambda: run_suite(*read_arguments(arguments), f"python -m launch.bench {shlex.join(arguments)}"),
        when_interrupted="interrupted: the tables measured so far are in bench.json",
    )


def read_arguments(arguments: list[str]) -> tuple[str, pathlib.Path, int, dict[str, Any]]:
    """Returns the suite, the work directory, the repeats and the suite's further options.

    Raises:
      InputError: a flag or a value is wrong.
    """
    given = flags.FlagValues()
    flags.DEFINE_string("suite", None, "what is measured", flag_values=given)
    flags.DEFINE_string("workdir", None, "work directory", flag_values=given)
    flags.DEFINE_integer("repeats", 9, "repeats of each", flag_values=given)
    flags.DEFINE_bool("peers", False, "also other packages", flag_values=given)
    flags.DEFINE_string("against", None, "another checkout", flag_values=given)
    try:
        _, *unexpected = given(["launch.bench", *arguments])
    except flags.Error as error:
        raise InputError("command", shlex.join(arguments), str(error), "see --help") from None
    if unexpected:
        raise InputError("argument", unexpected[0], "is no flag", "see --help")
    options = {name: given[name].value for name in OPTIONS if given[name].value}
    check_flags(given, options)
    workdir = pathlib.Path(given.workdir or pathlib.Path("runs", f"bench-{given.suite}"))
    return given.suite, workdir, given.repeats, options


def check_flags(given: flags.FlagValues, options: dict[str, Any]) -> None:
    """Raises an `InputError` for values that no suite, or not this one, can use."""
    if given.suite not in SUITES:
        raise unknown_name("suite", given.suite, list(SUITES))
    if given.repeats < LEAST_REPEATS:
        problem = f"a median needs at least {LEAST_REPEATS}"
        raise InputError("repeats", given.repeats, problem, "give e.g. --repeats=9")
    suite = SUITES[given.suite]
    for name in options.keys() - set(suite.options):
        raise InputError(
            name, options[name], f"is no option of the suite {given.suite}", f"leave out --{name}"
        )
    for name in set(suite.required) - options.keys():
        raise InputError(name, "", f"the suite {given.suite} needs it", f"give --{name}, see --help")


def run_suite(name: str, workdir: pathlib.Path, repeats: int, options: dict[str, Any], command: str) -> None:
    """Measures a suite, prints each table as it is measured and writes all of them to bench.json."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be created ({error.strerror})"
        raise InputError("workdir", str(workdir), problem, "give another --workdir") from None
    if devices := SUITES[name].devices:
        configure_devices(devices)
    suite = importlib.import_module(SUITES[name].module)
    record: dict[str, Any] = {"suite": name, "command": command, "date": datetime.date.today().isoformat()}
    record |= {"repeats": repeats, "versions": versions(), "tables": []}
    print(f"{name}, {record['date']}: medians of {repeats} repeats; ", end="")
    print(", ".join(map(" ".join, record["versions"].items())))
    for table in suite.measure(repeats, **options):
        print_table(table.title, table.columns, [list(map(cell, row)) for row in table.rows])
        print(f"  {table.note}" if table.note else "")
        record["tables"].append(as_json(table))
        write_json(workdir / "bench.json", record)
    print(f"written to {workdir / 'bench.json'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
