"""Checkpoints, from which a killed run continues with the same bits as one that was not killed."""

import contextlib
import errno
import hashlib
import io
import logging
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from launch.run.program import REMEDIES

PyTree = Any
STATUS = {"NOT_FOUND": errno.ENOENT, "PERMISSION_DENIED": errno.EACCES}
"""How a message of TensorStore begins that has no words of the operating system."""


class Checkpoints:
    """The latest checkpoints of a run, written asynchronously.

    A state is any pytree of arrays (JAX, NumPy), typed PRNG keys, Python numbers and texts of any length.
    Each process writes its shards of arrays that several processes share; the first process writes everything
    else, of texts its own.
    Every process must call every method. A state may be restored onto other devices and by another
    number of processes than it was saved from.

    Args:
      directory: of the checkpoints; created.
      keep: the number of latest checkpoints to keep.
      belongs_to: digests, by what they are of, that each checkpoint keeps for `saved_digests`.

    >>> import tempfile
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     checkpoints.save(3, {"weight": np.float64(0.1)})
    ...     checkpoints.wait()
    ...     checkpoints.restore({"weight": np.float64(0)})
    (3, {'weight': np.float64(0.1)})
    """

    def __init__(self, directory: str | os.PathLike, keep: int, belongs_to: Mapping[str, str] | None = None):
        self._directory = pathlib.Path(directory).absolute()
        self._belongs_to: dict[str, Any] = dict(belongs_to or {})
        self._saving: ocp.AsyncResponse[bool] | None = None
        self._saving_step, self._last = 0, 0
        with _suppress_output():
            self._checkpointer = ocp.training.Checkpointer(
                str(self._directory),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,  # left by a killed process
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes; an error of the operating system, or an interrupt, then says where the run continues."""
        failed = None
        try:
            self.close()
        except OSError as closing:
            failed = closing if error is None else None
        told = failed or error
        if isinstance(told, OSError | KeyboardInterrupt):
            told.add_note(f"it continues after round {self._last}" if self._last else "no round is saved yet")
        if failed:
            raise failed

    def save(self, step: int, state: PyTree) -> None:
        """Saves `state` in the background, after an earlier save has ended."""
        self.wait()
        leaves = {name: _stored(leaf) for name, leaf in _named_leaves(state)}
        # Orbax does not detect a changed byte within an array, so a digest of all arrays is saved too.
        saved = {"digest": fingerprint(leaves), "leaves": {k: v for k, v in leaves.items() if v.size}}
        saved["step"] = np.array([step])  # tells a directory that was copied under another number
        self._saving_step = step
        with _storage_errors(self._directory):
            self._saving = self._checkpointer.save_async(
                step, saved, force=True, overwrite=True, custom_metadata=self._belongs_to
            )

    def restore(self, template: PyTree) -> tuple[int, PyTree] | None:
        """Returns the latest usable checkpoint as (step, state), or None if there is none.

        A checkpoint that is damaged or does not fit is reported on stderr and moved to another directory.

        Args:
          template: a state with the structure, shapes, dtypes and devices of the result.
        """
        self.wait()
        unusable = []
        result = None
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        while result is None and (step := _from_first(steps.pop() if steps else -1)) >= 0:
            try:
                result = step, self._load(step, template)
            except _UnusableError as error:
                unusable.append(f"checkpoint {step} {error}")
                self._move_away(step)
        if result is not None:
            self._last = result[0]
        if unusable:
            self._checkpointer.reload()
            use = "starting afresh" if result is None else f"continuing from checkpoint {result[0]}"
            if jax.process_index() == 0:
                print(f"warning: {'; '.join(unusable)}: moved to {self._unusable}; {use}", file=sys.stderr)
        return result

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with _storage_errors(self._directory), _suppress_output():
                saving.result()  # nothing else ends its thread and closes its event loop
            self._last = self._saving_step

    def close(self) -> None:
        """Waits until all saves are on disk and releases the directory."""
        try:
            self.wait()
        finally:
            with _storage_errors(self._directory), _suppress_output():
                self._checkpointer.close()

    @property
    def _unusable(self) -> pathlib.Path:
        return self._directory.with_name(f"{self._directory.name}_unusable")

    def _move_away(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._unusable / str(step)
            shutil.rmtree(target, ignore_errors=True)
            self._unusable.mkdir(exist_ok=True)
            shutil.move(self._directory / str(step), target)
        _raise_on_all("")  # the other processes wait until it is moved

    def _load(self, step: int, template: PyTree) -> PyTree:
        wanted = dict(_named_leaves(template))
        found, problem = {}, ""
        try:
            with _suppress_output():
                found, digest = self._read(step, wanted)
        except _UnusableError as error:
            problem = str(error)
        except Exception:
            problem = "is damaged (it cannot be read)"
        # A computation on shared arrays needs every process, so all must have loaded before the digest.
        _raise_on_all(problem)
        unchanged = np.array_equal(digest, fingerprint(found))
        _raise_on_all("" if unchanged else "is damaged (its contents have changed)")
        return jax.tree.unflatten(
            jax.tree.structure(template), [_like(leaf, found[name]) for name, leaf in wanted.items()]
        )

    def _read(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        path = str(self._directory / str(step))
        with _alone():
            metadata = ocp.metadata(path).metadata
            abstract = {name: _abstract(leaf, metadata["leaves"].get(name)) for name, leaf in wanted.items()}
            empty = {
                name: np.empty(leaf.shape, leaf.dtype) for name, leaf in abstract.items() if not leaf.size
            }
            difference = _difference(metadata["leaves"] | empty, abstract)
            if difference:
                raise _UnusableError(f"does not fit this run ({difference})")
            leaves = {name: leaf for name, leaf in abstract.items() if leaf.size}
            templates = {"digest": np.empty(32, np.uint8), "leaves": leaves, "step": np.empty(1, np.int64)}
            saved = ocp.load(path, templates)
        if saved["step"][0] != step:
            raise _UnusableError(f"is a copy of checkpoint {saved['step'][0]}")
        return saved["leaves"] | empty, saved["digest"]


class _UnusableError(Exception):
    pass


def saved_digests(directory: str | os.PathLike) -> dict[str, str]:
    """Returns what the newest readable checkpoint of a directory belongs to; {} without any.

    One process reads, without the others.
    """
    paths = [path for path in pathlib.Path(directory).absolute().glob("*") if path.name.isdigit()]
    for path in sorted(paths, key=lambda path: int(path.name), reverse=True):
        with contextlib.suppress(Exception), _suppress_output(), _alone():
            found = ocp.metadata(str(path)).custom_metadata
            if isinstance(found, dict) and found:
                return {str(what): str(digest) for what, digest in found.items()}
    return {}


def _alone() -> ocp.Context:
    """Returns a context in which a process reads by itself, so that none waits for one that fails."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    return ocp.Context(multiprocessing_options=alone)


@contextlib.contextmanager
def _storage_errors(directory: pathlib.Path) -> Iterator[None]:
    """Raises an `OSError` with the directory for one that Orbax or TensorStore only tells in words."""
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        numbers = [each.errno for each in chain if isinstance(each, OSError) and each.errno]
        numbers += [n for n in REMEDIES if any(os.strerror(n) in str(each) for each in chain)]
        numbers += [n for word, n in STATUS.items() if any(str(each).startswith(word) for each in chain)]
        if not numbers:
            raise
        raise OSError(numbers[0], os.strerror(numbers[0]), str(directory)) from error


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    """Suppresses logs and stderr while Orbax reads a checkpoint that may be damaged, or ends a save."""
    # asyncio reports the tasks that Orbax leaves unfinished after a failure.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except Exception:
                time.sleep(0.2)  # tracebacks of its reading threads come a little later
                raise
    finally:
        logging.disable(logging.NOTSET)


def _named_leaves(state: PyTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _from_first(value: int) -> int:
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _raise_on_all(problem: str) -> None:
    """Raises an error on every process if any process has a problem."""
    problems = np.atleast_1d(multihost_utils.process_allgather(np.bool_(problem)))
    if problems.any():
        raise _UnusableError(problem or f"is damaged (host {problems.argmax()} cannot read it)")


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_orbax_array(leaf: Any) -> bool:
    """Says whether Orbax handles a leaf as a JAX array, rather than as an array of the first process."""
    return isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable)


def _stored(leaf: Any) -> jax.Array | np.ndarray:
    """Returns a leaf as it is saved; later changes or donation of the original have no effect."""
    if isinstance(leaf, str):
        return _text_of_first(leaf)
    leaf = _raw(leaf)
    return leaf if _is_orbax_array(leaf) else np.array(leaf)


def _text_of_first(text: str) -> np.ndarray:
    """Returns the text of the first process as bytes, on every process."""
    content = np.frombuffer(text.encode(), np.uint8)
    # Arrays that processes write together have one shape.
    content = np.resize(content, _from_first(len(content)))
    return np.asarray(multihost_utils.broadcast_one_to_all(content)) if content.size else content


def _abstract(leaf: Any, saved: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Returns the shape and dtype of a leaf, with its sharding if it is committed to devices.

    Args:
      saved: what a checkpoint says of it, from which a text has its length; None: it holds none.
    """
    if isinstance(leaf, str):
        return np.empty(saved.shape if saved is not None else 0, np.uint8)
    leaf = _raw(leaf)
    if _is_orbax_array(leaf) and leaf.committed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty_like(leaf)


def fingerprint(leaves: dict[str, Any]) -> np.ndarray:
    """Returns a digest of 32 bytes of all bits of the leaves, independent of their sharding.

    Args:
      leaves: NumPy arrays and JAX arrays (no typed keys) by name; arrays that several processes share
        are not gathered.
    """
    sums = {name: _device_checksum(leaf) if isinstance(leaf, jax.Array) else _checksum(leaf, np)
            for name, leaf in leaves.items()}  # fmt: skip
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {int(sums[name])}".encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _checksum(array: Any, numeric: ModuleType) -> Any:
    """Returns the sum modulo 2^32 of the hashed words of an array, which is the same in any order.

    A single changed word always changes it; any other damage does with probability 1 - 2^-32.

    Args:
      array: of any shape and dtype.
      numeric: numpy or jax.numpy, the module of the array.
    """
    words = _words(array, numeric)
    position = numeric.arange(words.size, dtype=np.uint32).reshape(words.shape)
    # The finalizer of MurmurHash3 (Austin Appleby, public domain): a bijection of 32 bits.
    mixed = words + position * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return numeric.sum(mixed ^ (mixed >> np.uint32(16)), dtype=np.uint32)


_device_checksum = jax.jit(lambda array: _checksum(array, jnp))


def _words(array: Any, numeric: ModuleType) -> Any:
    """Returns the bits of an array as 32-bit words, at least one per element."""
    array = numeric.atleast_1d(array)
    if array.dtype == bool:
        return array.astype(np.uint32)
    if numeric is np:
        array = np.ascontiguousarray(array)
        return array.view(f"u{min(array.dtype.itemsize, 4)}").astype(np.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Returns the first difference of two sets of leaves in name, shape or dtype, or ''."""
    for name in sorted(wanted | found):
        if name not in found:
            return f"it lacks {name}"
        if name not in wanted:
            return f"it holds an unknown {name}"
        was, now = (f"{leaves[name].dtype}{list(leaves[name].shape)}" for leaves in (found, wanted))
        if was != now:
            return f"{name} is {was}, here {now}"
    return ""


def _like(template: Any, value: jax.Array | np.ndarray) -> Any:
    """Returns `value` with the type of `template`, and on its devices."""
    if isinstance(template, str):
        return value.tobytes().decode()
    if isinstance(template, jax.Array):
        array = jnp.asarray(value)
        if _is_key(template):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(template))
        # A committed array could not be combined with arrays on other devices.
        return jax.device_put(array, template.sharding) if template.committed else array
    if isinstance(template, np.ndarray):
        return value
    if isinstance(template, np.generic):
        return value[()]
    return type(template)(value.item())
