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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError

CONFIG_FILE = "config.json"
FINGERPRINTS_FILE = "fingerprints.json"
LOCK_FILE = ".lock"
DIRECTORIES = (
    "checkpoints",
    "checkpoints_unusable",
    "compiled",
    "figures",
    "model",
    "model.tmp",
    "tensorboard",
)
FILE_ENDINGS = (".csv", ".html", ".json", ".png", ".tmp")
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
    try:
        with _open_lock(path) as file:
            _take_lock(path, file)
            yield
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is told without one
        raise


def _take_lock(path: str | os.PathLike, file: TextIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = f"is in use by {file.read().strip() or 'another process'}"
        remedy = "wait for it or stop it, or give another --workdir"
        raise InputError("workdir", str(path), problem, remedy) from None
    except OSError as error:
        print(
            f"warning: {path} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr
        )
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
    file.flush()


def _open_lock(path: str | os.PathLike) -> TextIO:
    try:
        descriptor = os.open(pathlib.Path(path, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        problem = f"its {LOCK_FILE} cannot be written ({error.strerror})"
        raise InputError("workdir", str(path), problem, "give another --workdir") from None
    return os.fdopen(descriptor, "r+", encoding="utf-8")


class Fingerprint(NamedTuple):
    """Something beside the config that a run belongs to.

    Attributes:
      field, value: of the config or the command, which names it in errors.
      what: it is, e.g. "the texts or labels".
      digest: equal for equal things.
    """

    field: str
    value: Any
    what: str
    digest: str


def open_workdir(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    fingerprints: Sequence[Fingerprint] = (),
    raisable: Sequence[str] = (),
    saved: Mapping[str, str] = {},
) -> pathlib.Path:
    """Creates the work directory of a run, or opens it again if it belongs to the same run.

    Args:
      path: the directory; it and its parents are created.
      config: the run's config as nested dicts; written to config.json.
      fingerprints: of what else the run belongs to; written to fingerprints.json.
      raisable: fields, by dotted name, whose number may be larger than it was; config.json follows.
      saved: the fingerprints' digests by what they are of, as a checkpoint has them; for a directory whose
        fingerprints.json was removed.

    Raises:
      InputError: the directory cannot be written, has another config or other fingerprints, or has files but
        no config.
    """
    directory = pathlib.Path(path)
    now = json.loads(_to_json(config))
    if CONFIG_FILE in _entries(directory):
        raised = _check_same_config(directory, now, raisable)
        _check_same_fingerprints(directory, fingerprints, saved)
        if raised:
            write_json(directory / CONFIG_FILE, config)
    else:
        _write_fingerprints(directory, fingerprints)
        write_json(directory / CONFIG_FILE, config)  # last: it makes the directory one of a run
    return directory


def check_workdir(directory: pathlib.Path) -> None:
    """Raises a FileNotFoundError if the work directory was removed, though Orbax may have made one again."""
    os.stat(directory / CONFIG_FILE)


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
    _check_kinds(directory)
    # A run killed before its config was written has left only these.
    files = (CONFIG_FILE, FINGERPRINTS_FILE)
    own = {LOCK_FILE, *files, *(_temporary(directory / name).name for name in files)}
    if CONFIG_FILE not in present and present - own:
        problem = f"holds other files and no {CONFIG_FILE}"
        raise InputError("workdir", str(path), problem, "give a new or empty --workdir")
    return present


def _check_kinds(directory: pathlib.Path) -> None:
    """Raises InputError unless all that a run writes is free, or a file or a directory as it should be.

    A link without an end is as good as free where a file should be. A pipe or a device is neither kind.
    """
    for entry in sorted([*directory.iterdir(), *(directory / "figures").glob("*")]):
        wanted, right = None, True
        if entry.name in DIRECTORIES:
            wanted, right = "directory", entry.is_dir()
        elif entry.name == LOCK_FILE or entry.suffix in FILE_ENDINGS:
            wanted, right = "file", entry.is_file() or not entry.exists()
        if not right:
            problem = f"{entry} should be a {wanted} and is none"
            raise InputError("workdir", str(directory), problem, "move it away, or give another --workdir")


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


def _check_same_config(directory: pathlib.Path, config: dict[str, Any], raisable: Sequence[str]) -> bool:
    """Checks that a run's config is that of the directory, and says whether a raisable number was raised."""
    earlier, now = _flat(_read_json(directory, CONFIG_FILE)), _flat(config)
    absent = object()
    differing = sorted(
        field for field in earlier | now if earlier.get(field, absent) != now.get(field, absent)
    )
    refused = [field for field in differing if field not in raisable or not _is_raised(earlier, now, field)]
    if not refused:
        return bool(differing)
    field, *others = refused
    was = repr(earlier[field]) if field in earlier else "no such field"
    more = (
        f" ({len(others)} more {'fields differ' if len(others) > 1 else 'field differs'})" if others else ""
    )
    problem = f"the run in {directory} was started with {was}{more}"
    remedy = "give that value again, or another --workdir"
    if field in raisable:
        remedy = "give that value again or a larger one, or another --workdir"
    raise InputError(field, now.get(field), problem, remedy)


def _is_raised(earlier: dict[str, Any], now: dict[str, Any], field: str) -> bool:
    before, after = earlier.get(field), now.get(field)
    return isinstance(before, int | float) and isinstance(after, int | float) and after > before


def _check_same_fingerprints(
    directory: pathlib.Path, fingerprints: Sequence[Fingerprint], saved: Mapping[str, str]
) -> None:
    missing = not (directory / FINGERPRINTS_FILE).exists()
    earlier = saved if missing else _read_json(directory, FINGERPRINTS_FILE)
    for field, value, what, found in fingerprints:
        if earlier.get(what, found) != found:
            problem = f"{what} changed since the run in {directory} was started"
            raise InputError(field, value, problem, "restore them, or give another --workdir")
    if missing and fingerprints:
        known = (
            "written again"
            if saved
            else ("data and config file are taken to be those that the run was started with")
        )
        print(f"warning: {directory / FINGERPRINTS_FILE} was missing: {known}", file=sys.stderr)
        _write_fingerprints(directory, fingerprints)


def _write_fingerprints(directory: pathlib.Path, fingerprints: Sequence[Fingerprint]) -> None:
    if fingerprints:
        write_json(directory / FINGERPRINTS_FILE, {each.what: each.digest for each in fingerprints})


def _read_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns a JSON object of the directory."""
    path = directory / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError, RecursionError):
        pass
    raise InputError("workdir", str(directory), f"{path} cannot be read", "give another --workdir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields = {}
    for name, value in tree.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields
