"""Checkpoints that a killed run continues from, bit for bit."""

import contextlib
import hashlib
import io
import logging
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

PyTree = Any


class Checkpoints:
    """The newest states of a run on disk, saved while the run goes on.

    A state is any pytree of arrays (JAX, NumPy), typed PRNG keys and Python numbers. Each process
    writes its own part of what is spread over several, and the first one all that is not; every
    process must call every method. A state may be restored onto other devices, or by another number
    of processes, than it was saved from.

    Args:
      directory: where the checkpoints lie; created.
      keep: how many of the newest ones remain.

    >>> import tempfile
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     checkpoints.save(3, {"weight": np.float64(0.1)})
    ...     checkpoints.wait()
    ...     checkpoints.restore({"weight": np.float64(0)})
    (3, {'weight': np.float64(0.1)})
    """

    def __init__(self, directory: str | os.PathLike, keep: int):
        self._directory = pathlib.Path(directory).absolute()
        with _silence():
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,  # what a killed process left
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: PyTree) -> None:
        """Saves `state` in the background; first waits for an earlier save to end."""
        leaves = {name: _stored(leaf) for name, leaf in _named_leaves(state)}
        # Orbax does not notice a changed byte inside an array's data, so the digest travels along.
        saved = {"digest": fingerprint(leaves), "leaves": {k: v for k, v in leaves.items() if v.size}}
        self._checkpointer.save_async(step, saved, force=True, overwrite=True)

    def restore(self, template: PyTree) -> tuple[int, PyTree] | None:
        """Returns the newest usable checkpoint as (step, state), or None if there is none.

        A checkpoint that is damaged or does not fit is named on stderr and moved out of the way.

        Args:
          template: a state whose structure, shapes, types and devices the result takes.
        """
        self.wait()
        unusable = []
        result = None
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        while result is None and (step := _of_first(steps.pop() if steps else -1)) >= 0:
            try:
                result = step, self._load(step, template)
            except _UnusableError as error:
                unusable.append(f"checkpoint {step} {error}")
                self._set_aside(step)
        if unusable:
            self._checkpointer.reload()
            use = "starting afresh" if result is None else f"continuing from checkpoint {result[0]}"
            if jax.process_index() == 0:
                print(f"warning: {'; '.join(unusable)}: moved to {self._aside}; {use}", file=sys.stderr)
        return result

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits and releases the directory."""
        self._checkpointer.close()

    @property
    def _aside(self) -> pathlib.Path:
        return self._directory.with_name(f"{self._directory.name}_unusable")

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._aside / str(step)
            shutil.rmtree(target, ignore_errors=True)
            self._aside.mkdir(exist_ok=True)
            shutil.move(self._directory / str(step), target)
        _agree("")  # the others wait for it

    def _load(self, step: int, template: PyTree) -> PyTree:
        wanted = dict(_named_leaves(template))
        found, problem = {}, ""
        try:
            with _silence():
                found, digest = self._read(step, wanted)
        except _UnusableError as error:
            problem = str(error)
        except Exception:
            problem = "is damaged (it cannot be read)"
        # All must have loaded before any may compute: a computation on shared arrays takes all.
        _agree(problem)
        _agree("" if np.array_equal(digest, fingerprint(found)) else "is damaged (its contents have changed)")
        return jax.tree.unflatten(
            jax.tree.structure(template), [_like(leaf, found[name]) for name, leaf in wanted.items()]
        )

    def _read(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        path = self._directory / str(step)
        abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
        empty = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in abstract.items() if not leaf.size}
        index = jax.process_index()
        # Every process reads for itself: where one fails, the others must not wait for it.
        alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
        with ocp.Context(multiprocessing_options=alone):
            metadata = ocp.metadata(path).metadata
            difference = _difference(metadata["leaves"] | empty, abstract)
            if difference:
                raise _UnusableError(f"does not fit this run ({difference})")
            leaves = {name: leaf for name, leaf in abstract.items() if leaf.size}
            saved = ocp.load(path, {"digest": np.empty(32, np.uint8), "leaves": leaves})
        return saved["leaves"] | empty, saved["digest"]


class _UnusableError(Exception):
    pass


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps stderr clean while Orbax reads what may be damaged."""
    # The tasks that it leaves unfinished after a failure are reported when they are collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except Exception:
                time.sleep(0.2)  # its reading threads fail, with tracebacks, a little later
                raise
    finally:
        logging.disable(logging.NOTSET)


def _named_leaves(state: PyTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _of_first(value: int) -> int:
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _agree(problem: str) -> None:
    """Raises an error on every process if there is a problem on any."""
    problems = np.atleast_1d(multihost_utils.process_allgather(np.bool_(problem)))
    if problems.any():
        raise _UnusableError(problem or f"is damaged (host {problems.argmax()} cannot read it)")


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_shared(leaf: Any) -> bool:
    """Says whether Orbax is to handle a leaf as an array on devices that all processes know."""
    return isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable)


def _stored(leaf: Any) -> jax.Array | np.ndarray:
    """Returns a leaf as it is saved: as it is now, even if the caller then changes or donates it."""
    leaf = _raw(leaf)
    return leaf if _is_shared(leaf) else np.array(leaf)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Returns the shape and type of a leaf, and the devices that it is to be loaded onto, if any."""
    leaf = _raw(leaf)
    if _is_shared(leaf) and leaf.committed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty_like(leaf)


def fingerprint(leaves: dict[str, Any]) -> np.ndarray:
    """Returns 32 bytes that depend on every bit of the leaves, not on where they lie.

    Args:
      leaves: NumPy arrays and JAX arrays (no typed keys) by name; those that are spread over several
        processes are not brought together.
    """
    sums = {name: _device_checksum(leaf) if isinstance(leaf, jax.Array) else _checksum(leaf, np)
            for name, leaf in leaves.items()}  # fmt: skip
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {int(sums[name])}".encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _checksum(array: Any, numeric: ModuleType) -> Any:
    """Returns a sum, modulo 2^32, over mixed words of an array: exact, so in any order the same.

    A changed word always changes it; other damage goes unnoticed once in 2^32.

    Args:
      array: of any shape and type.
      numeric: numpy or jax.numpy, whichever the array is of.
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
    """Returns the bits of an array as 32-bit words, at least one an element."""
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
    """Returns the first way in which two sets of leaves differ in name, shape or type, or ''."""
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
    """Returns `value` as the kind of object, and on the devices, that `template` is."""
    if isinstance(template, jax.Array):
        array = jnp.asarray(value)
        if _is_key(template):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(template))
        # An array bound to a device would not mix with the unbound ones it is used with.
        return jax.device_put(array, template.sharding) if template.committed else array
    if isinstance(template, np.ndarray):
        return value
    if isinstance(template, np.generic):
        return value[()]
    return type(template)(value.item())
