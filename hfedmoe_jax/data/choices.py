"""Choices of multiple-choice questions, as data sets of the hub and files hold them.

Axes: D questions, C choices of a question.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfedmoe_jax.data.values import to_string
from hfedmoe_jax.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_choices(
    columns: Sequence[Sequence[Any]], labels: Sequence[str], fields: tuple[str, str], where: str
) -> tuple[list[list[str]], list[str]]:
    """Returns the texts of each question's choices, and the number of the right one, from 0, as a text.

    Args:
      columns: several, each with a choice of every row (missing ones at the end: fewer choices), or one,
        whose values are lists, or have the fields `text` and `label`, as ARC, OpenBookQA and CommonsenseQA.
      labels: of each row: where there is a field `label`, one of its values, else a number from 0 or a
        letter from A.
      fields: the values of data.choices_column and data.label_column, for the messages.
      where: the file or data set, for the messages.

    Raises:
      InputError: a row with fewer than two choices, one that is empty, or a label that names none.
    """
    questions, answers = [], []
    for row, (values, label) in enumerate(zip(zip(*columns, strict=True), labels, strict=True), start=1):
        names: list[str] = []
        if len(columns) == 1:
            values = values[0]
            if isinstance(values, dict) and {"text", "label"} <= set(values):
                names, values = list(map(to_string, values["label"])), values["text"]
            if isinstance(values, np.ndarray):
                values = values.tolist()
            if isinstance(values, str) or not isinstance(values, Sequence):
                problem = f"row {row} of {where} holds a {type(values).__name__}, not a list"
                remedy = "name a column of lists, or several columns with commas between them"
                raise InputError("data.choices_column", fields[0], problem, remedy)
        texts = list(map(to_string, values))
        while texts and not texts[-1].strip():
            texts.pop()
        if len(texts) < 2 or not all(text.strip() for text in texts):
            problem = f"row {row} of {where} has fewer than two choices, or an empty one"
            raise InputError("data.choices_column", fields[0], problem, "leave the row out")
        answer = _answer(label.strip(), names)
        if not 0 <= answer < len(texts):
            problem = f"{label!r} in row {row} of {where} is none of its {len(texts)} choices"
            remedy = "give their numbers from 0, or letters from A"
            if names:
                remedy = f"give one of its labels, {', '.join(names[:20])}"
            raise InputError("data.label_column", fields[1], problem, remedy)
        questions.append(texts)
        answers.append(str(answer))
    return questions, answers


def _answer(label: str, names: Sequence[str]) -> int:
    """Returns the number of the choice that a label names, -1 for none. The names of a row count alone.

    >>> _answer("2", []), _answer("B", []), _answer("2", ["1", "2"]), _answer("0", ["1", "2"])
    (2, 1, 1, -1)
    """
    if names:
        return names.index(label) if names.count(label) == 1 else -1
    if label.isascii() and label.isdigit() and len(label) < 10:
        return int(label)
    return LETTERS.find(label) if len(label) == 1 else -1
