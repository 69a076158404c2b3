"""A run over several hosts, one process on each: how they start, and how they exchange small arrays."""

import json
import os
import pathlib
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from hfedmoe_jax.errors import InputError
from launch.hosts.processes import Links, Processes, join, listen, welcome

_TOGETHER = "give --coordinator=HOST:PORT --processes=N --process=I on every host, alike but for I"


class Host(NamedTuple):
    """Where a command runs; see the flags of `launch.main`.

    Attributes:
      compiled: directory of compiled programs; None: in the work directory.
      coordinator, processes, process: of a run over several processes, else None.
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
    """Joins this process to the others of its run; call it before JAX computes anything.

    With nothing given, SLURM and TPU pods are recognised by their environment (see `cluster`), and
    anything else runs alone. CPUs of different processes talk through gloo.

    Args:
      coordinator: HOST:PORT where process 0 is reached, any free port of its host; "auto", alone,
        leaves all to JAX's own detection, for clusters whose environment says nothing.
      processes: how many there are.
      process: which of them this one is, from 0.
      checkpoints: the directory that a stopped run continues from, for the message that says so.

    Returns:
      a context to run in, which ends when every process has left it. When one of them dies, the
      others print one line and exit with `EXIT_PROCESS_LOST` within seconds.

    Raises:
      InputError: a value is missing or cannot be used, or the processes do not find each other.
    """
    directory = pathlib.Path(checkpoints)
    given = coordinator not in (None, "auto") or processes is not None or process is not None
    if given:
        _check_place(coordinator, processes, process)
    if processes == 1 or not (given or coordinator or cluster(os.environ)):
        return Processes({}, 0, 1, directory)
    # CPUs of several processes compute together through gloo alone.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service would swallow SIGTERM, and nothing here asks it for preemptions.
    jax.config.update("jax_enable_preemption_service", False)
    if given:
        # Our own connections first: JAX aborts a process that finds no others, or that they leave meanwhile.
        links, address = _meet(coordinator, processes, process)
        joined = Processes(links, process, processes, directory)
        jax.distributed.initialize(address, processes, process)
        _mute_gloo()
    else:
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            problem = f"JAX recognises no cluster here ({error})"
            raise InputError("--coordinator", coordinator or "auto", problem, _TOGETHER) from None
        if jax.process_count() == 1:
            return Processes({}, 0, 1, directory)
        _mute_gloo()
        joined = Processes(_meet_by_jax(), jax.process_index(), jax.process_count(), directory)
    multihost_utils.sync_global_devices("started")  # connects all of them
    if is_first_process():
        joined.outlive()
    return joined


def cluster(environment: Mapping[str, str]) -> str | None:
    """Returns the kind of cluster that started this process as one of several, or None.

    Args:
      environment: environment variables. `srun` sets SLURM_* for each task; TPU pods have
        TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, and MEGASCALE_NUM_SLICES if of several slices.

    >>> cluster({"TPU_WORKER_HOSTNAMES": "host-0,host-1"})
    'tpu'
    """
    # JAX takes a process for one of SLURM's tasks when all of these are set.
    task = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in task) and environment["SLURM_NTASKS"] != "1":
        return "slurm"
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in workers or environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "tpu"
    return None


def is_first_process() -> bool:
    """Says whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def wait_for_processes() -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("here")


def gather_processes(value: np.ndarray) -> np.ndarray:
    """Returns the host array of every process, bit for bit, on each of them; all must call.

    Args:
      value: of the same shape and type everywhere.

    Returns:
      an array with one more axis in front, of one entry a process.
    """
    value = np.asarray(value)
    # As bytes: JAX would round what has 64 bits.
    content = np.frombuffer(value.tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(content))
    return np.frombuffer(gathered.tobytes(), value.dtype).reshape(-1, *value.shape)


def _check_place(coordinator: str | None, processes: int | None, process: int | None) -> None:
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    for flag, value in given.items():
        if value is None:
            raise InputError(flag, value, "missing", _TOGETHER)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        remedy = "give process 0's host and a free port of it, e.g. --coordinator=10.0.0.1:9876"
        raise InputError("--coordinator", coordinator, "is not HOST:PORT", remedy)
    if processes < 1:
        raise InputError("--processes", processes, "must be at least 1", "give the number of processes")
    if not 0 <= process < processes:
        remedy = f"number them from 0 to {processes - 1}"
        raise InputError("--process", process, f"is none of {processes} processes", remedy)


def _meet(coordinator: str, processes: int, process: int) -> tuple[Links, str]:
    """Returns the connections to the others, and the address of JAX's coordinator."""
    host, _, port = coordinator.rpartition(":")
    if process > 0:
        links, answer = join((host.strip("[]"), int(port)), process, processes)
        return links, answer["address"]
    try:
        server = listen(int(port))
    except OSError as error:
        problem, remedy = f"port {port} cannot be used ({error.strerror})", "give a free port"
        raise InputError("--coordinator", coordinator, problem, remedy) from None
    with server, listen(0) as free:
        address = f"{host}:{free.getsockname()[1]}"
        free.close()
        return welcome(server, processes, {"address": address}), address


def _meet_by_jax() -> Links:
    """Returns the connections to the others once JAX has connected them."""
    content = np.zeros(256, np.uint8)
    with listen(0) as server:
        if is_first_process():
            text = json.dumps([socket.gethostname(), server.getsockname()[1]]).encode()
            content[: len(text)] = np.frombuffer(text, np.uint8)
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
        if is_first_process():
            return welcome(server, jax.process_count(), {})
    address = json.loads(content.tobytes().rstrip(b"\0"))
    return join(tuple(address), jax.process_index(), jax.process_count())[0]


def _mute_gloo() -> None:
    """Keeps gloo, which reports every connection on stdout from C++, off the user's screen."""
    if jax.default_backend() != "cpu":
        return
    sys.stdout.flush()
    python = os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.close(quiet)
    sys.stdout = os.fdopen(python, "w", buffering=1, encoding=sys.stdout.encoding)
