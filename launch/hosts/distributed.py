"""A run over several hosts, one process on each: how they start, and how they exchange small arrays."""

import json
import os
import pathlib
import secrets
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from hfedmoe_jax.errors import InputError
from launch.hosts.joining import Links, accept_processes, connect, listen
from launch.hosts.processes import Processes

_REMEDY = "give --coordinator=HOST:PORT --processes=N --process=I on every host, the same but for I"


class Host(NamedTuple):
    """The process that runs a command, among those of its run; see the flags of `launch.main`.

    Attributes:
      compiled: directory of the compilation cache; None: in the work directory.
      coordinator: HOST:PORT of process 0, or "auto"; None for a single process.
      processes, process: the number of processes and the index of this one, or None.
    """

    compiled: pathlib.Path | None = None
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


SINGLE_PROCESS = Host()


def start_processes(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    checkpoints: str | os.PathLike,
) -> Processes:
    """Connects this process with the others of its run; call it before JAX computes anything.

    Without arguments, SLURM and TPU pods are detected by their environment variables (see `cluster`);
    anything else is a run of one process. CPUs of several processes communicate through gloo.

    Args:
      coordinator: HOST:PORT of process 0, with any free port of its host; "auto", without the other
        arguments, leaves everything to JAX's cluster detection.
      processes: the number of processes.
      process: the index of this process, from 0.
      checkpoints: the directory that a stopped run continues from; it is named in error messages.

    Returns:
      A context to compute in, which ends when every process has left it. If a process dies, the
      others print one line and exit with `EXIT_PROCESS_LOST` within seconds.

    Raises:
      InputError: a value is missing or cannot be used, or the processes do not find each other.
    """
    directory = pathlib.Path(checkpoints)
    given = None
    if coordinator not in (None, "auto") or processes is not None or process is not None:
        given = _checked_flags(coordinator, processes, process)
    if processes == 1 or not (given or coordinator or cluster(os.environ)):
        return Processes({}, 0, 1, directory)
    # The only implementation of collectives between the CPUs of several processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service would swallow SIGTERM, and nothing here asks it for preemptions.
    jax.config.update("jax_enable_preemption_service", False)
    started = _start_at(*given, directory) if given else _start_detected(coordinator, directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("started")  # opens the connections of the collectives
        if is_first_process():
            started.hold_connections()
    return started


def _start_at(coordinator: str, processes: int, process: int, directory: pathlib.Path) -> Processes:
    # Our connections come first, with errors of our own: JAX would abort a process that finds no others.
    links, address = _connect_at(coordinator, processes, process)
    started = Processes(links, process, processes, directory)
    jax.distributed.initialize(coordinator, processes, process, coordinator_bind_address=address)
    _mute_gloo()
    return started


def _start_detected(coordinator: str | None, directory: pathlib.Path) -> Processes:
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        problem = f"JAX detects no cluster here ({error})"
        raise InputError("--coordinator", coordinator or "auto", problem, _REMEDY) from None
    if jax.process_count() == 1:
        return Processes({}, 0, 1, directory)
    _mute_gloo()
    return Processes(_connect_through_jax(), jax.process_index(), jax.process_count(), directory)


def cluster(environment: Mapping[str, str]) -> str | None:
    """Returns the kind of cluster that started this process as one of several, `slurm` or `tpu`, or None.

    Args:
      environment: environment variables. `srun` sets SLURM_* for each task; TPU pods have
        TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, and MEGASCALE_NUM_SLICES if of several slices.

    >>> cluster({"TPU_WORKER_HOSTNAMES": "host-0,host-1"})
    'tpu'
    """
    # JAX's condition for a task of SLURM.
    task = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in task) and environment["SLURM_NTASKS"] != "1":
        return "slurm"
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in workers or environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "tpu"
    return None


def is_first_process() -> bool:
    """Says whether this is process 0, which writes the files and prints."""
    return jax.process_index() == 0


def wait_for_processes() -> None:
    """Returns when every process has called it: a barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("barrier")


def gather_processes(value: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, bit for bit; every process must call it.

    Args:
      value: a host array with the same shape and dtype on every process.

    Returns:
      An array [processes, ...].
    """
    value = np.asarray(value)
    # As bytes, because JAX would round 64-bit values to 32 bits.
    content = np.frombuffer(value.tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(content))
    return np.frombuffer(gathered.tobytes(), value.dtype).reshape(-1, *value.shape)


def _checked_flags(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int]:
    if coordinator is None or processes is None or process is None:
        given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
        missing = next(flag for flag, value in given.items() if value is None)
        raise InputError(missing, None, "missing", _REMEDY)
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        remedy = "give process 0's host and a free port of it, e.g. --coordinator=10.0.0.1:9876"
        raise InputError("--coordinator", coordinator, "is not HOST:PORT", remedy)
    if processes < 1:
        raise InputError("--processes", processes, "must be at least 1", "give the number of processes")
    if not 0 <= process < processes:
        remedy = f"number them from 0 to {processes - 1}"
        raise InputError("--process", process, f"is none of {processes} processes", remedy)
    return coordinator, processes, process


def _connect_at(coordinator: str, processes: int, process: int) -> tuple[Links, str]:
    """Returns the connections to the other processes, and the address that JAX's service listens at."""
    host, port = _host_and_port(coordinator)
    if process > 0:
        return connect((host, port), process, processes), coordinator
    with listen(host, port) as server:
        own, port, *_ = server.getsockname()
        return accept_processes(server, processes), f"[{own}]:{port}" if ":" in own else f"{own}:{port}"


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _connect_through_jax() -> Links:
    """Returns the connections to the other processes, whose address is exchanged through JAX.

    So is a text that only they know: process 0 listens at all addresses here, because a cluster tells no
    process which of its addresses the others use.
    """
    content = np.zeros(256, np.uint8)
    with listen(None, 0) as server:
        if is_first_process():
            text = json.dumps([socket.gethostname(), server.getsockname()[1], secrets.token_hex(16)]).encode()
            content[: len(text)] = np.frombuffer(text, np.uint8)
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
        host, port, run = json.loads(content.tobytes().rstrip(b"\0"))
        if is_first_process():
            return accept_processes(server, jax.process_count(), run)
    return connect((host, port), jax.process_index(), jax.process_count(), run)


def _mute_gloo() -> None:
    """Redirects the stdout of C++, where gloo reports every connection; Python's stdout stays."""
    if jax.default_backend() != "cpu":
        return
    sys.stdout.flush()
    python = os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.close(quiet)
    sys.stdout = os.fdopen(python, "w", buffering=1, encoding=sys.stdout.encoding)
