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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

PyTree = Any


class Checkpoints:
    """The newest states of a run on disk, saved while the run goes on.

    A state is any pytree of arrays (JAX, NumPy), typed PRNG keys and Python numbers. It is saved as
    host arrays, so the number or kind of devices may differ when it is restored. Every array must
    be addressable or replicated.

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
        leaves = _host_leaves(state)
        # Orbax does not notice a changed byte inside an array's data, so the digest travels along.
        saved = {"digest": _digest(leaves), "leaves": {k: v for k, v in leaves.items() if v.size}}
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
        for checkpoint in reversed(self._checkpointer.checkpoints):
            try:
                result = checkpoint.step, self._load(checkpoint.step, template)
                break
            except _UnusableError as error:
                unusable.append(f"checkpoint {checkpoint.step} {error}")
                self._set_aside(checkpoint.step)
        if unusable:
            self._checkpointer.reload()
            use = "starting afresh" if result is None else f"continuing from checkpoint {result[0]}"
            problem = "; ".join(unusable)
            print(f"warning: {problem}: moved to {self._aside}; {use}", file=sys.stderr)
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
        target = self._aside / str(step)
        shutil.rmtree(target, ignore_errors=True)
        self._aside.mkdir(exist_ok=True)
        shutil.move(self._directory / str(step), target)

    def _load(self, step: int, template: PyTree) -> PyTree:
        wanted = _host_leaves(template)
        try:
            with _silence():
                saved = self._checkpointer.load(step)
            leaves, digest = saved["leaves"], saved["digest"]
        except Exception:
            raise _UnusableError("is damaged (it cannot be read)") from None
        leaves |= {name: leaf for name, leaf in wanted.items() if not leaf.size}
        difference = _difference(leaves, wanted)
        if difference:
            raise _UnusableError(f"does not fit this run ({difference})")
        if not np.array_equal(digest, _digest(leaves)):
            raise _UnusableError("is damaged (its contents have changed)")
        return jax.tree.unflatten(
            jax.tree.structure(template),
            [_like(leaf, leaves[name]) for name, leaf in _named_leaves(template)],
        )


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


def _host_leaves(state: PyTree) -> dict[str, np.ndarray]:
    # Copies: the caller may change or donate its arrays while the save goes on.
    return {
        name: np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for name, leaf in _named_leaves(state)
    }


def _digest(leaves: dict[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return np.frombuffer(digest.digest(), np.uint8)


def _difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> str:
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


def _like(template: Any, value: np.ndarray) -> Any:
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
