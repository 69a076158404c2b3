"""Runs the experiment that a config describes.

    python -m launch.main --config=configs/hfedmoe.py
    python -m launch.main --config=configs/hfedmoe.py:smoke --workdir=DIR --config.seed=1
    python -m launch.main --config=configs/slide.py --config.scenario.path=cell.json

  --config=FILE[:PRESET]   the config file, and a preset of it
  --config.FIELD=VALUE     another value for a field of the config
  --workdir=DIR            where everything is written; by default a name made from the config,
                           so that the same command again continues the same run
  --compiled=DIR           where compiled programs are kept for other runs; by default in the work directory

One run over several hosts (SLURM and TPU pods are recognised by themselves):

  --coordinator=HOST:PORT  where process 0 is reached; "auto" leaves all to JAX's own detection
  --processes=N            how many processes there are
  --process=I              which of them this one is, from 0

Exit codes: 0 done, 2 a mistake in the command or the data (one line says which), 3 another host stopped,
130 interrupted.
"""

import difflib
import importlib
import importlib.util
import itertools
import logging
import os
import pathlib
import re
import shlex
import sys
from types import ModuleType
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import unknown_name
from launch.hosts.distributed import Host
from launch.run.workdir import default_workdir

EXPERIMENTS = {"hfedmoe": "launch.hfedmoe.experiment", "slide": "launch.slide.experiment"}

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments` (without the program's name) and returns the exit code."""
    if {"--help", "-help", "-h"} & set(arguments):
        print(__doc__.strip())
        return 0
    quiet_libraries()
    workdir = None
    try:
        config, workdir, host = read_command(arguments)
        experiment(config).run(config, workdir, host)
    except ValueError as error:
        if not is_input_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f" in {workdir}" if workdir else ""
        print(
            f"interrupted: the same command goes on{where}, from a checkpoint if there is one",
            file=sys.stderr,
        )
        return 130
    return 0


def quiet_libraries() -> None:
    """Keeps the logs of third-party libraries, errors excepted, off the user's screen."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("jax", "orbax", "tensorboardX", "datasets", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def is_input_error(error: Exception) -> bool:
    """Says whether an error is an `InputError` of any of the packages."""
    # The packages do not import each other, so each has a class of that name of its own.
    return type(error).__name__ == "InputError"


def experiment(config: ConfigDict) -> ModuleType:
    """Returns the module whose `run(config, workdir, host)` runs `config.experiment`."""
    name = config.get("experiment")
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, list(EXPERIMENTS))
    # Imported here and not above: an experiment sets JAX's devices up before JAX starts.
    return importlib.import_module(EXPERIMENTS[name])


def read_command(arguments: list[str]) -> tuple[ConfigDict, pathlib.Path, Host]:
    """Returns the config, locked and with its overrides applied, the work directory, and the place.

    Args:
      arguments: the command line without the program's name.

    Raises:
      InputError: a flag, a file, a preset, a field or a value is wrong.
    """
    flag_values = flags.FlagValues()
    flags.DEFINE_string("config", None, "config file, and :preset", flag_values=flag_values)
    flags.DEFINE_string("workdir", None, "work directory", flag_values=flag_values)
    flags.DEFINE_string("compiled", None, "directory of compiled programs", flag_values=flag_values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=flag_values)
    flags.DEFINE_integer("processes", None, "number of processes", flag_values=flag_values)
    flags.DEFINE_integer("process", None, "index of this process", flag_values=flag_values)
    try:
        _, *overrides = flag_values(["launch.main", *arguments], known_only=True)
    except flags.Error as error:
        raise InputError("command", shlex.join(arguments), str(error), "see --help") from None
    if not flag_values.config:
        raise InputError("config", flag_values.config, "missing", "give e.g. --config=configs/hfedmoe.py")
    config = load_config(flag_values.config)
    apply_overrides(config, overrides)
    preset = flag_values.config.partition(":")[2]
    name = pathlib.Path(flag_values.config.partition(":")[0]).stem
    host = Host(
        pathlib.Path(flag_values.compiled) if flag_values.compiled else None,
        flag_values.coordinator,
        flag_values.processes,
        flag_values.process,
    )
    return config, pathlib.Path(flag_values.workdir or default_workdir(config, name, preset)), host


def load_config(file_and_preset: str) -> ConfigDict:
    """Returns what `get_config` of a config file gives for `FILE` or `FILE:PRESET`."""
    file, _, preset = file_and_preset.partition(":")
    if not os.path.isfile(file):
        raise InputError("config", file_and_preset, f"no file {file}", "give the path of a config file")
    spec = importlib.util.spec_from_file_location("launch_config", file)
    if spec is None:
        raise InputError("config", file_and_preset, "not a Python file", "give the path of a config file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(preset) if preset else module.get_config()
    except Exception as error:
        if is_input_error(error):
            raise
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise InputError(
            "config", file_and_preset, problem, "name another preset or mend the file"
        ) from error
    if not isinstance(config, ConfigDict):
        raise InputError("config", file_and_preset, "get_config returned no ConfigDict", "mend the file")
    return config


def apply_overrides(config: ConfigDict, arguments: list[str]) -> None:
    """Sets fields of `config` from `--config.FIELD=VALUE` arguments and locks it.

    Raises:
      InputError: another argument, an unknown field or a value of the wrong type.
    """
    fields = field_values(config)
    overrides = [
        (match[1], match[2] if match[2] is not None else following)
        for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="")
        if (match := OVERRIDE.fullmatch(argument))
    ]
    for field, value in overrides:
        if field not in fields:
            raise unknown_field(field, value, list(fields))
    flag_values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=arguments)
        _, *unexpected = flag_values(["launch.main", *arguments])
    except flags.UnrecognizedFlagError as error:
        raise unknown_flag(error.flagname, list(fields)) from None
    except (flags.Error, TypeError) as error:
        raise unusable_value(str(error), overrides, fields) from None
    if unexpected:
        raise InputError("argument", unexpected[0], "is no flag", "write --config.FIELD=VALUE; see --help")


def field_values(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns every field of a config by its dotted name.

    >>> field_values(ConfigDict({"seed": 0, "data": {"source": "file"}}))
    {'data.source': 'file', 'seed': 0}
    """
    fields = {}
    for name, value in sorted(config.items()):
        if isinstance(value, ConfigDict):
            fields |= field_values(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def nearest_field(given: str, fields: list[str]) -> str | None:
    """Returns the field that a mistyped or incomplete name most likely means, if any.

    >>> nearest_field("alpha", ["partition.alpha", "seed"])
    'partition.alpha'
    """

    def likeness(field: str) -> float:
        # Half for the whole name, half for its last part: a forgotten group is a common mistake.
        pairs = [(given, field), (given.rpartition(".")[2], field.rpartition(".")[2])]
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs) / 2

    best = max(fields, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def unknown_field(field: str, value: str, fields: list[str]) -> InputError:
    """Returns the error for a config field that does not exist."""
    members = [name for name in fields if name.startswith(f"{field}.")]
    if members:
        problem, remedy = "is a group of fields", f"set its fields, e.g. --config.{members[0]}=..."
        return InputError(field, value, problem, remedy)
    nearest = nearest_field(field, fields)
    hint = f"did you mean {nearest}?" if nearest else "the config file lists the fields"
    return InputError(field, value, "unknown config field", hint)


def unknown_flag(name: str, fields: list[str]) -> InputError:
    """Returns the error for a flag that does not exist."""
    known = ["config", "workdir", "compiled", "coordinator", "processes", "process", "help"]
    near_flags = difflib.get_close_matches(name, known, n=1)
    nearest = near_flags[0] if near_flags else nearest_field(name, fields)
    if nearest in fields:
        nearest = f"config.{nearest}"
    hint = f"did you mean --{nearest}?" if nearest else "see --help"
    return InputError("flag", f"--{name}", "unknown", hint)


def unusable_value(message: str, overrides: list[tuple[str, str]], fields: dict[str, Any]) -> InputError:
    """Returns the error for a value that a field cannot hold."""
    for field, value in overrides:
        if f"--config.{field}={value}" in message and type(fields[field]) in EXPECTED:
            expected = EXPECTED[type(fields[field])]
            return InputError(
                field, value, f"is not {expected}", f"give e.g. --config.{field}={fields[field]}"
            )
    field, value = next((pair for pair in overrides if pair[0] in message), ("command", ""))
    return InputError(field, value, message, "see --help, or set the field in the config file")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
