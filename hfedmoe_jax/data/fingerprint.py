"""What tells the data of one run from those of another."""

import hashlib
from collections.abc import Iterable

import numpy as np

from hfedmoe_jax.data.federated import FederatedData, Rows


def fingerprint(data: FederatedData) -> dict[str, str]:
    """Returns a SHA-256 of each part of the data that results depend on, by what it is."""
    return {
        "the texts or labels": _digest(
            data.label_names,
            *(*_arrays(data.train), *_arrays(data.validation), *_arrays(data.test)),
            *(data.validation_document, data.test_document),
        ),
        "the split or the partition of the texts": _digest(
            data.client_names, *data.client_train, *data.client_holdout
        ),
        "the tokenizer": _digest([data.tokenizer_json]),
    }


def _arrays(rows: Rows) -> list[np.ndarray]:
    return [rows[name] for name in sorted(rows)]


def _digest(names: Iterable[str], *arrays: np.ndarray) -> str:
    hashed = hashlib.sha256()
    for name in names:
        text = name.encode("utf-8", "surrogatepass")
        hashed.update(f"{len(text)} ".encode() + text)
    for array in arrays:
        hashed.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()
