"""The work directory, which holds all files of one run and the config that it was started with."""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxopt", "numpy", "scipy")


def default_workdir(config: ConfigDict, name: str, preset: str = "") -> pathlib.Path:
    """Returns the default work directory of a config; equal configs have the same one.

    >>> default_workdir(ConfigDict({"seed": 0}), "margin", "smoke").as_posix()
    'runs/margin-smoke-seed0-de7d7744'

    Args:
      config: the config of the run.
      name: the name of the config file, without its ending.
      preset: the preset of the config file; without one, the data source is part of the name.
    """
    source = preset or config.get("data", {}).get("source")
    algorithm = config.get("fl", {}).get("algorithm")
    seed = f"seed{config.seed}" if "seed" in config else None
    digest = hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()[:8]
    parts = [name, source, algorithm, seed, digest]
    return pathlib.Path("runs", re.sub(r"[^\w.-]+", "_", "-".join(part for part in parts if part)))


@contextlib.contextmanager
def hold_workdir(path: str | os.PathLike) -> Iterator[None]:
    """Creates the work directory of a run and keeps other runs out of it until the context is left.

    The lock is the kernel's: it ends with the process, however that ends. Its file stays.

    Args:
      path: the directory; it and its parents are created.

    Raises:
      InputError: another process holds the directory, or it cannot be written or has other files.
    """
    _entries(path)
    with _open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"is in use by {file.read().strip() or 'another process'}"
            remedy = "wait for it or stop it, or give another --workdir"
            raise InputError("workdir", str(path), problem, remedy) from None
        except OSError as error:
            print(
                f"warning: {path} cannot be locked ({error.strerror}): start no second run in it",
                file=sys.stderr,
            )
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
        file.flush()
        yield


def _open_lock(path: str | os.PathLike) -> TextIO:
    try:
        descriptor = os.open(pathlib.Path(path, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        problem = f"its {LOCK_FILE} cannot be written ({error.strerror})"
        raise InputError("workdir", str(path), problem, "give another --workdir") from None
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def open_workdir(path: str | os.PathLike, config: Mapping[str, Any]) -> pathlib.Path:
    """Creates the work directory of a run, or opens it again if its run has the same config.

    Args:
      path: the directory; it and its parents are created.
      config: the run's config as nested dicts; written to config.json.

    Raises:
      InputError: the directory cannot be written, has another config, or has files but no config.
    """
    directory = pathlib.Path(path)
    if CONFIG_FILE in _entries(directory):
        _check_same_config(directory, json.loads(_to_json(config)))
    else:
        write_json(directory / CONFIG_FILE, config)
    return directory


def _entries(path: str | os.PathLike) -> set[str]:
    """Creates a directory, checks that a run may use it, and returns the names of what it holds."""
    directory = pathlib.Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(None, "Permission denied")
        present = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        problem = f"is no directory that can be written ({error.strerror})"
        raise InputError("workdir", str(path), problem, "give another --workdir") from None
    # A run killed while writing its config has left only the temporary file.
    own = {CONFIG_FILE, LOCK_FILE, _temporary(directory / CONFIG_FILE).name}
    if CONFIG_FILE not in present and present - own:
        problem = f"holds other files and no {CONFIG_FILE}"
        raise InputError("workdir", str(path), problem, "give a new or empty --workdir")
    return present


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically; NaN and infinities become null.

    Args:
      path: the file.
      value: nested mappings, sequences, arrays, scalars, paths.
    """
    path = pathlib.Path(path)
    temporary = _temporary(path)
    temporary.write_text(_to_json(value) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Returns the versions of Python and the libraries, and the device that JAX computes on."""
    import jax  # imported here: default_workdir needs no JAX

    device = jax.devices()[0]
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return found | {
        "platform": device.platform,
        "device": f"{device.device_kind} x {jax.device_count()}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.tmp")


def _to_json(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _check_same_config(directory: pathlib.Path, config: dict[str, Any]) -> None:
    path = directory / CONFIG_FILE
    try:
        earlier = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        raise InputError(
            "workdir", str(directory), f"{path} cannot be read", "give another --workdir"
        ) from None
    now = _flat(config)
    absent = object()
    differing = sorted(
        field for field in earlier | now if earlier.get(field, absent) != now.get(field, absent)
    )
    if not differing:
        return
    field, *others = differing
    was = repr(earlier[field]) if field in earlier else "no such field"
    more = (
        f" ({len(others)} more {'fields differ' if len(others) > 1 else 'field differs'})" if others else ""
    )
    problem = f"the run in {directory} was started with {was}{more}"
    raise InputError(field, now.get(field), problem, "give that value again, or another --workdir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields = {}
    for name, value in tree.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields
