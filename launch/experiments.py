"""The experiments that a config can name, and the call that runs one of them."""

import importlib
import pathlib
from types import ModuleType

from ml_collections import ConfigDict

from hfedmoe_jax.registry import unknown_name
from launch.hosts.distributed import SINGLE_PROCESS, Host
from launch.run.command import Command
from launch.run.source import told_errors
from launch.run.workdir import Fingerprint

EXPERIMENTS = {"hfedmoe": "launch.hfedmoe", "slide": "launch.slide"}
"""Packages by the config's field `experiment`: each has `experiment.run_experiment`, with the
arguments of the function below, and `dry_run.dry_run(config, target)`."""


def run_experiment(
    config: ConfigDict,
    workdir: pathlib.Path,
    host: Host = SINGLE_PROCESS,
    source: Fingerprint | None = None,
) -> None:
    """Runs or continues the experiment of `config` and writes its results into `workdir`.

    Args:
      config: locked; its field `experiment` is one of `EXPERIMENTS`.
      workdir: created; see `launch.run.workdir.open_workdir`.
      host: this process among those of the run.
      source: the text of the config's file, which may hold parts of the program; if there is a file.

    Raises:
      InputError: the config, the data or the directory cannot be used; nothing was written.
    """
    experiment_module(config, "experiment").run_experiment(config, workdir, host, source)


def run_command(command: Command) -> None:
    """Runs the experiment of a command line, or says what it would cost.

    Raises:
      InputError: see `run_experiment`.
    """
    with told_errors(command.source.value):
        if command.dry_run:
            experiment_module(command.config, "dry_run").dry_run(command.config, command.target)
        else:
            run_experiment(command.config, command.workdir, command.host, command.source)


def experiment_module(config: ConfigDict, module: str) -> ModuleType:
    """Returns a module of the package of a config's experiment.

    Imported here: only the packages that this experiment needs are loaded.
    """
    name = config.get("experiment")
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, list(EXPERIMENTS))
    return importlib.import_module(f"{EXPERIMENTS[name]}.{module}")
