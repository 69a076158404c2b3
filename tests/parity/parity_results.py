"""What the scripts here compute, in files of few kilobytes: one text and one array of numbers."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from parity_weights import draw


def sketch(array: np.ndarray) -> np.ndarray:
    """Returns the products of rows with two drawn vectors, [..., 2] of [..., N].

    Arrays that differ have others, and they are few numbers.
    """
    return array @ draw("sketch", (array.shape[-1], 2))


def check_sketch(array: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Raises an AssertionError unless an array has this sketch, to 1e-4 of its largest number."""
    largest = np.max(np.abs(expected))
    np.testing.assert_allclose(sketch(array), expected, rtol=0, atol=1e-4 * largest + 1e-9, err_msg=name)


def save(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes float32 arrays, and what JSON can hold or lists of integers, by their keys."""
    floats = {key: x for key, x in results.items() if isinstance(x, np.ndarray) and x.dtype == np.float32}
    others = {key: np.asarray(x).tolist() if isinstance(x, np.ndarray) else x
              for key, x in results.items() if key not in floats}  # fmt: skip
    text = json.dumps([{key: x.shape for key, x in floats.items()}, others], separators=(",", ":"))
    numbers = np.concatenate([x.ravel() for x in floats.values()])
    np.savez_compressed(path, floats=numbers, text=np.frombuffer(text.encode(), np.uint8))


def load(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `save` was given."""
    with np.load(path) as file:
        shapes, others = json.loads(file["text"].tobytes())
        numbers = np.split(file["floats"], np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1])
    results = {key: np.array(x, np.int32) if isinstance(x, list) else x for key, x in others.items()}
    return results | {
        key: each.reshape(shape) for (key, shape), each in zip(shapes.items(), numbers, strict=True)
    }
