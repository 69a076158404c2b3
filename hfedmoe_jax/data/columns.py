"""Columns of raw values to documents: the checks that every source shares."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax.data.choices import read_choices
from hfedmoe_jax.data.values import to_string
from hfedmoe_jax.errors import InputError

UNLABELLED = "text"
"""The label of every document where `data.label_column` is empty."""
PLACE = re.compile(r"\{([^{}]*)\}")
"""A column in the text of `data.text_column`."""


class Documents(NamedTuple):
    """Labelled texts.

    Attributes:
      texts, labels: of each; of a multiple-choice question the label is the number of the right choice.
      clients: who owns each; None if the source does not say.
      choices: the texts of each question's choices; None if they are no questions.
    """

    texts: list[str]
    labels: list[str]
    clients: list[str] | None
    choices: list[list[str]] | None = None

    def take(self, index: Sequence[int] | np.ndarray) -> "Documents":
        """Returns documents by index."""
        return Documents(*(values and [values[place] for place in index] for values in self))  # pyright: ignore[reportArgumentType]


class Corpus(NamedTuple):
    """Training documents and, where the source has them, validation and test sets of its own.

    Attributes:
      notes: what the user should know about how the source was read.
    """

    train: Documents
    test: Documents | None = None
    validation: Documents | None = None
    notes: tuple[str, ...] = ()


Roles = dict[str, list[str]]
"""Names of columns by their role: text (one or several), and perhaps label, client and choices."""


def wanted_columns(names: Iterable[str], data_config: ConfigDict, with_clients: bool, where: str) -> Roles:
    """Returns the columns to read by their role: text and, if asked for, label, client and choices.

    Args:
      names: the columns there are.
      data_config: `text_column`, `label_column`, `client_column` and `choices_column` name the columns. If
        that of texts or choices is not the name of one, it is several with commas between them; that of texts
        may be a text with columns in braces, too.
      with_clients: whether a client column is read (a validation or test set needs none).
      where: the file or data set, for the message.

    Raises:
      InputError: a column is not among `names` or is there twice, or the text column is the label column.
    """
    names = list(names)
    text = data_config.text_column

    def several(given: str) -> list[str]:
        return [given] if given in names else [part.strip() for part in given.split(",")]

    places = [] if text in names else list(dict.fromkeys(PLACE.findall(text)))
    roles = {"text": places or several(text)}
    if data_config.label_column:
        roles["label"] = [data_config.label_column]
    if with_clients and data_config.client_column:
        roles["client"] = [data_config.client_column]
    if data_config.choices_column:
        roles["choices"] = several(data_config.choices_column)
    for role, columns in roles.items():
        for column in columns:
            _check_column(column, names, f"data.{role}_column", where)
    if data_config.label_column in roles["text"]:
        problem = "it is data.label_column too, so the texts would be the answers"
        raise InputError("data.text_column", text, problem, f"name another: it has {_listed(names)}")
    return roles


def named(roles: Roles) -> list[str]:
    """Returns the columns of all roles, each once."""
    return list(dict.fromkeys(column for columns in roles.values() for column in columns))


def _check_column(column: str, names: list[str], field: str, where: str) -> None:
    if column not in names:
        nearest = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(field, column, f"no such column in {where}", f"{hint}it has {_listed(names)}")
    if names.count(column) > 1:
        problem = f"{names.count(column)} columns of {where} have that name"
        raise InputError(field, column, problem, "rename all but one")


def to_documents(
    columns: Mapping[str, Sequence[Any]], roles: Roles, data_config: ConfigDict, where: str
) -> Documents:
    """Returns raw values as strings (`to_string`): a missing label or client is an error.

    Several texts of a row become one: a line each, or as `data.text_column` says. Choices and their labels
    are read by `read_choices`.

    Args:
      columns: by name, all of one length.
      roles: of `wanted_columns`.
      data_config: names the columns, for the messages.
      where: the file or data set, for the messages.

    Raises:
      InputError: a row without a label or client, or a value that is no text or number.
    """
    strings = {
        role: [_to_strings(columns[name], role, name, where) for name in names]
        for role, names in roles.items()
        if role != "choices"
    }
    texts, (clients,) = strings["text"], strings.get("client", [None])
    (labels,) = strings.get("label", [[UNLABELLED] * len(texts[0])])
    labels = [label if has_label(label, data_config) else "" for label in labels]
    for role, values in (("label", labels), ("client", clients or [])):
        missing = [row for row, value in enumerate(values, start=1) if not value]
        if missing:
            raise InputError(
                f"data.{role}_column",
                data_config[f"{role}_column"],
                f"row {missing[0]} of {where} has no {role} ({len(missing)} such rows, counted from 1)",
                "fill it in or leave the row out",
            )
    joined = [_joined(row, roles["text"], data_config.text_column) for row in zip(*texts, strict=True)]
    if "choices" not in roles:
        return Documents(joined, labels, clients)
    fields = data_config.choices_column, data_config.label_column
    choices, answers = read_choices([columns[name] for name in roles["choices"]], labels, fields, where)
    return Documents(joined, answers, clients, choices)


def has_label(label: str, data_config: ConfigDict) -> bool:
    """Returns whether a label is one: it is not empty, nor of a question -1, as in unlabelled test sets."""
    return bool(label) and not (data_config.choices_column and label == "-1")


def _joined(values: Sequence[str], columns: list[str], text_column: str) -> str:
    """Returns the texts of a row as one.

    >>> _joined(["a", "b"], ["x", "y"], "x,y"), _joined(["a", "b"], ["x", "y"], "{x}: {y}")
    ('a\\nb', 'a: b')
    """
    if columns != [text_column] and PLACE.search(text_column):
        value_of = dict(zip(columns, values, strict=True))
        pattern = text_column.replace(r"\n", "\n")  # as it is written on a command line
        return PLACE.sub(lambda place: value_of[place[1]], pattern)
    return "\n".join(value for value in values if value)


def no_rows(field: str, value: str) -> InputError:
    """Returns the error for a source without documents."""
    return InputError(field, value, "there are no rows", "give one with documents")


def ordered_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct names in order: by value if all are whole numbers, else alphabetically.

    >>> ordered_names(["10", "2", "2"]), ordered_names(["tech", "10", "2"])
    (('2', '10'), ('10', '2', 'tech'))
    """
    distinct = set(names)
    return tuple(sorted(distinct, key=int if all(map(_is_whole, distinct)) else None))


def _is_whole(name: str) -> bool:
    digits = name.removeprefix("-")
    # Python converts no more than 4,300 digits, and no label needs as many.
    return digits.isascii() and digits.isdigit() and len(digits) < 100 and str(int(name)) == name


def _to_strings(values: Sequence[Any], role: str, column: str, where: str) -> list[str]:
    strings = []
    for row, value in enumerate(values, start=1):
        if isinstance(value, (list, tuple, dict, set, np.ndarray)):
            raise InputError(
                f"data.{role}_column",
                column,
                f"row {row} of {where} holds a {type(value).__name__}",
                "choose a column of texts or numbers",
            )
        strings.append(to_string(value))
    return strings


def _listed(names: list[str], limit: int = 20) -> str:
    # The first line of a file without a header passes for column names, however long.
    shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
