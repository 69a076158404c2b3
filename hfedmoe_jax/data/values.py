"""Raw values of files and data sets to strings."""

from typing import Any

import numpy as np


def to_string(value: Any) -> str:
    """Returns a value as every source reads it: a missing one is empty, bytes are UTF-8.

    Whole numbers lose their fraction, and halves of surrogate pairs, which JSON can hold, are replaced: no
    tokenizer accepts them.

    >>> to_string(None), to_string(float("nan")), to_string(1.0), to_string(b"x")
    ('', '', '1', 'x')
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).encode("utf-8", "replace").decode("utf-8")
