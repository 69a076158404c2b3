"""Metrics by round, or by the points of a sweep: metrics.csv and TensorBoard events."""

import csv
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

Number = int | float | None


class MetricWriter:
    """Writes one row per round to DIRECTORY/metrics.csv and DIRECTORY/tensorboard.

    Numbers are written so that reading them returns the same bits; a missing number is an empty cell.
    Write a round's row before its checkpoint, so that a resumed run finds all rows up to it.

    Args:
      directory: an existing directory.
      columns: names of the columns after the first.
      resume_after: the last round that a resumed run keeps; None starts the file anew.
      index: name of the first column, which numbers the rows.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        columns: Sequence[str],
        resume_after: int | None,
        index: str = "round",
    ):
        self._path = pathlib.Path(directory, "metrics.csv")
        self._index, self._columns = index, [index, *columns]
        kept = []
        if resume_after is not None:
            kept = [row for row in _whole_rows(self._path) if int(row[index]) <= resume_after]
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self._columns, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(kept)
        os.replace(temporary, self._path)
        first_round = 0 if resume_after is None else resume_after + 1
        self._events = SummaryWriter(
            str(pathlib.Path(directory, "tensorboard")),
            purge_step=first_round,
            # TensorBoard names event files by the second; a restart may come within one.
            filename_suffix=f".{os.getpid()}.{first_round}",
        )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, number: int, row: Mapping[str, Any]) -> None:
        """Appends a row; readers of the file see it when this returns.

        Args:
          number: the number of the round, or of the point.
          row: numbers by column; a column that is absent or None stays empty.

        Raises:
          ValueError: a name that is not a column.
        """
        numbers = {name: _number(value) for name, value in row.items()}
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(
                {**numbers, self._index: int(number)}
            )
        for name, value in numbers.items():
            if name != self._index and value is not None and math.isfinite(value):
                self._events.add_scalar(name, value, int(number))
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._events.close()


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV file of rows that have the same columns, at least one, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    os.replace(temporary, path)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Number]]:
    """Returns the rows of a metrics.csv: numbers as they were written, None for an empty cell."""
    return [{name: _parse(text) for name, text in row.items()} for row in _whole_rows(pathlib.Path(path))]


def _whole_rows(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A killed process may leave an incomplete line, whose last number may have lost digits.
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def _number(value: Any) -> Number:
    return value.item() if hasattr(value, "item") else value


def _parse(text: str) -> Number:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
