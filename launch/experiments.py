"""The experiments that a config can name, and the call that runs one of them."""

import importlib
import pathlib

from ml_collections import ConfigDict

from hfedmoe_jax.registry import unknown_name
from launch.hosts.distributed import SINGLE_PROCESS, Host

EXPERIMENTS = {"hfedmoe": "launch.hfedmoe.experiment", "slide": "launch.slide.experiment"}
"""Modules with a function `run_experiment(config, workdir, host)`, by the config's field `experiment`."""


def run_experiment(config: ConfigDict, workdir: pathlib.Path, host: Host = SINGLE_PROCESS) -> None:
    """Runs or continues the experiment of `config` and writes its results into `workdir`.

    Args:
      config: locked; its field `experiment` is one of `EXPERIMENTS`.
      workdir: created; see `launch.run.workdir.open_workdir`.
      host: this process among those of the run.

    Raises:
      InputError: the config, the data or the directory cannot be used; nothing was written.
    """
    name = config.get("experiment")
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, list(EXPERIMENTS))
    # Imported here: only the packages that this experiment needs are loaded.
    importlib.import_module(EXPERIMENTS[name]).run_experiment(config, workdir, host)
