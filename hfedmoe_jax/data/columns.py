"""Columns of raw values to documents: the checks that every source shares."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError


class Documents(NamedTuple):
    """Labelled texts, and the client that owns each where the source says so."""

    texts: list[str]
    labels: list[str]
    clients: list[str] | None

    def take(self, index: Sequence[int] | np.ndarray) -> "Documents":
        """Returns documents by index."""
        return Documents(*(None if part is None else [part[i] for i in index] for part in self))


def wanted_columns(
    names: Iterable[str], data_config: ConfigDict, with_clients: bool, where: str
) -> dict[str, str]:
    """Returns the columns to read by their role: text, label and, if asked for, client.

    Args:
      names: the columns there are.
      data_config: `text_column`, `label_column` and `client_column` name the columns.
      with_clients: whether a client column is read (a test set needs none).
      where: the file or data set, for the message.

    Raises:
      InputError: a column is not among `names`.
    """
    names = list(names)
    wanted = {"text": data_config.text_column, "label": data_config.label_column}
    if with_clients and data_config.client_column:
        wanted["client"] = data_config.client_column
    for role, column in wanted.items():
        if column not in names:
            nearest = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise InputError(
                f"data.{role}_column",
                column,
                f"no such column in {where}",
                f"{hint}it has {_listed(names)}",
            )
    return wanted


def to_documents(columns: Mapping[str, Sequence[Any]], data_config: ConfigDict, where: str) -> Documents:
    """Returns raw values as strings: a missing text is empty, a missing label or client is an error.

    Whole numbers lose their fraction (a label 1.0 is `'1'`), bytes are read as UTF-8.

    Args:
      columns: by role (`text`, `label`, perhaps `client`), all of one length.
      data_config: names the columns, for the messages.
      where: the file or data set, for the messages.

    Raises:
      InputError: no rows, a row without a label or client, or a value that is no text or number.
    """
    strings = {
        role: _to_strings(values, role, data_config[f"{role}_column"], where)
        for role, values in columns.items()
    }
    if not strings["text"]:
        raise no_rows(data_config, where)
    for role in ("label", "client"):
        missing = [row for row, value in enumerate(strings.get(role, []), start=1) if not value]
        if missing:
            raise InputError(
                f"data.{role}_column",
                data_config[f"{role}_column"],
                f"row {missing[0]} of {where} has no {role} ({len(missing)} such rows, counted from 1)",
                "fill it in or leave the row out",
            )
    return Documents(strings["text"], strings["label"], strings.get("client"))


def no_rows(data_config: ConfigDict, where: str) -> InputError:
    """Returns the error for a source without documents."""
    if data_config.source != "file":
        return InputError("data.source", data_config.source, f"{where} has no rows", "choose another")
    field = "train_path" if where == data_config.train_path else "test_path"
    return InputError(f"data.{field}", where, "the file has no rows", "give a file with documents")


def ordered_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct names in order: by value if all are whole numbers, else alphabetically.

    >>> ordered_names(["10", "2", "2"]), ordered_names(["tech", "10", "2"])
    (('2', '10'), ('10', '2', 'tech'))
    """
    distinct = set(names)
    return tuple(sorted(distinct, key=int if all(map(_is_whole, distinct)) else None))


def _is_whole(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(name)) == name


def _to_strings(values: Sequence[Any], role: str, column: str, where: str) -> list[str]:
    strings = []
    for row, value in enumerate(values, start=1):
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, (list, tuple, dict, set, np.ndarray)):
            raise InputError(
                f"data.{role}_column",
                column,
                f"row {row} of {where} holds a {type(value).__name__}",
                "choose a column of texts or numbers",
            )
        strings.append(_to_string(value))
    return strings


def _to_string(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    # JSON can smuggle in half a surrogate pair, which no tokenizer accepts.
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _listed(names: list[str], limit: int = 20) -> str:
    # The first line of a file without a header passes for column names, however long.
    shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
