"""Runs the experiment of a config, or continues it from its last checkpoint.

    python -m launch.main --config=configs/hfedmoe.py
    python -m launch.main --config=configs/hfedmoe.py:smoke --workdir=DIR --config.seed=1
    python -m launch.main --config=configs/slide.py --config.scenario.path=cell.json

  --config=FILE[:PRESET]   config file, and one of its presets
  --config.FIELD=VALUE     another value for a field of the config
  --workdir=DIR            directory of all results; by default runs/NAME with a name made from the
                           config, so that the same command continues the same run
  --compiled=DIR           directory of compiled programs, which several runs may share; by default
                           that of JAX_COMPILATION_CACHE_DIR, else in the work directory
  --dry_run                say what a run would need and cost, from shapes alone; run and write nothing
  --target=CHIP:SHAPE      with --dry_run: compile every program for accelerators that need not be
                           there, e.g. v5e:16x16, v5p:4x4x4 or h100:1x8 (docs/devices.md)

One run on several hosts (SLURM and TPU pods are detected without these flags):

  --coordinator=HOST:PORT  address of process 0; "auto" leaves the detection to JAX
  --processes=N            number of processes
  --process=I              index of this process, from 0

Exit codes: 0 done, 1 storage or another failure in the midst of the run, 2 a mistake in the command or the
data (one line says which), 3 another process of the run stopped, 4 no round trained anything, 130
interrupted by Ctrl-C or SIGTERM.
"""

import sys

from launch.run.starting import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # while the following imports load JAX

from launch.experiments import run_command
from launch.hosts.processes import end_process
from launch.run.command import read_command
from launch.run.program import run_program


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments` (without the program's name) and returns the exit code."""
    return run_program(
        arguments,
        usage=__doc__ or "",
        work=lambda: run_command(read_command(arguments)),
        when_interrupted="interrupted: give the same command again",
    )


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
