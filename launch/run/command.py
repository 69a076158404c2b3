"""Reads a command line: the config of a file and preset, its overrides, the work directory and the host.

`load_config` and `apply_overrides` also serve a program that runs several configs.
"""

import difflib
import importlib.util
import itertools
import os
import pathlib
import re
import shlex
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from hfedmoe_jax.errors import InputError
from launch.hosts.distributed import Host
from launch.run.program import is_input_error
from launch.run.source import source_digest
from launch.run.workdir import Fingerprint, default_workdir

PROGRAM = "launch.main"
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


class Command(NamedTuple):
    """What a command line asks for.

    Attributes:
      config: locked, with its overrides applied.
      workdir: the work directory.
      host: this process among those of the run.
      source: the text of the config file and of its own modules.
      dry_run: say what the run would cost, and run nothing.
      target: compile for it, see `launch.targets.read_target`; with `dry_run` only.
    """

    config: ConfigDict
    workdir: pathlib.Path
    host: Host
    source: Fingerprint
    dry_run: bool
    target: str | None


def read_command(arguments: list[str]) -> Command:
    """Returns what a command line asks for.

    Args:
      arguments: the command line without the program's name.

    Raises:
      InputError: a flag, a file, a preset, a field or a value is wrong.
    """
    for argument in arguments:
        check_text("command", argument)
    given = define_flags()
    try:
        _, *overrides = given([PROGRAM, *arguments], known_only=True)
    except flags.Error as error:
        raise InputError("command", shlex.join(arguments), str(error), "see --help") from None
    if not given.config:
        raise InputError("config", given.config, "missing", "give e.g. --config=configs/hfedmoe.py")
    config = load_config(given.config)
    apply_overrides(config, overrides)
    for field, value in field_values(config).items():
        for text in value if isinstance(value, list | tuple) else [value]:
            check_text(field, text)
    file, _, preset = given.config.partition(":")
    workdir = pathlib.Path(given.workdir or default_workdir(config, pathlib.Path(file).stem, preset))
    compiled = given.compiled or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    compiled = pathlib.Path(compiled) if compiled else None
    if given.target and not given.dry_run:
        raise InputError("--target", given.target, "is only compiled for", "add --dry_run")
    host = Host(compiled, given.coordinator, given.processes, given.process)
    what = "the config file or a module that it imports"
    source = Fingerprint("config", given.config, what, source_digest(file))
    return Command(config, workdir, host, source, given.dry_run, given.target)


def check_text(field: str, value: Any) -> None:
    """Raises InputError for a name or text that no file in UTF-8 can hold, as half a surrogate pair."""
    for text in (field, value):
        if isinstance(text, str) and SURROGATE.search(text):
            name = field.encode("ascii", "backslashreplace").decode()
            raise InputError(name, value, "is not UTF-8 text", "give names and paths in UTF-8")


def define_flags() -> flags.FlagValues:
    """Returns the flags of the command, not yet parsed; the config's fields are not among them."""
    flag_values = flags.FlagValues()
    flags.DEFINE_string("config", None, "config file, and :preset", flag_values=flag_values)
    flags.DEFINE_string("workdir", None, "work directory", flag_values=flag_values)
    flags.DEFINE_string("compiled", None, "directory of compiled programs", flag_values=flag_values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=flag_values)
    flags.DEFINE_integer("processes", None, "number of processes", flag_values=flag_values)
    flags.DEFINE_bool("dry_run", False, "run nothing", flag_values=flag_values)
    flags.DEFINE_string("target", None, "accelerator to compile for", flag_values=flag_values)
    flags.DEFINE_integer("process", None, "index of this process", flag_values=flag_values)
    return flag_values


def load_config(file_and_preset: str) -> ConfigDict:
    """Returns what `get_config` of a config file gives for `FILE` or `FILE:PRESET`.

    Raises:
      InputError: there is no such file or preset, or the file cannot be executed.
    """
    file, _, preset = file_and_preset.partition(":")
    if not os.path.isfile(file):
        raise InputError("config", file_and_preset, f"no file {file}", "give the path of a config file")
    try:
        config = _get_config(file, preset)
    except Exception as error:
        if is_input_error(error):
            raise
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        remedy = "name another preset or correct the file"
        raise InputError("config", file_and_preset, problem, remedy) from error
    if not isinstance(config, ConfigDict):
        problem = "get_config returned no ConfigDict"
        raise InputError("config", file_and_preset, problem, "correct the file")
    return config


def _get_config(file: str, preset: str) -> Any:
    spec = importlib.util.spec_from_file_location("launch_config", file)
    if spec is None or spec.loader is None:
        raise ValueError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset) if preset else module.get_config()


def apply_overrides(config: ConfigDict, arguments: list[str]) -> None:
    """Sets fields of `config` from `--config.FIELD=VALUE` arguments and locks it.

    Raises:
      InputError: another argument, an unknown field or a value of the wrong type.
    """
    fields = field_values(config)
    overrides = read_overrides(arguments)
    for field, value in overrides:
        if field not in fields:
            raise unknown_field(field, value, list(fields))
    flag_values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=arguments)
        _, *unexpected = flag_values([PROGRAM, *arguments])
    except flags.UnrecognizedFlagError as error:
        raise unknown_flag(error.flagname, list(fields)) from None
    except (flags.Error, TypeError) as error:
        raise unusable_value(str(error), overrides, fields) from None
    if unexpected:
        raise InputError("argument", unexpected[0], "is no flag", "write --config.FIELD=VALUE; see --help")


def read_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """Returns the fields that arguments set, with the values as they are written.

    >>> read_overrides(["--config.seed=1", "--config.data.alpha", "0.5"])
    [('seed', '1'), ('data.alpha', '0.5')]
    """
    return [
        (match[1], match[2] if match[2] is not None else following)
        for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="")
        if (match := OVERRIDE.fullmatch(argument))
    ]


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
    near_flags = difflib.get_close_matches(name, [*define_flags(), "help"], n=1)
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
