"""Metrics by round, or by the points of a sweep: metrics.csv and TensorBoard events."""

import csv
import io
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

from hfedmoe_jax.metrics import without_evaluation

Number = int | float | None


class MetricWriter:
    """Writes one row per round to DIRECTORY/metrics.csv and DIRECTORY/tensorboard.

    Numbers are written so that reading them returns the same bits; a missing number is an empty cell. The
    rows belong to the run and not to the file: `text`, kept in a checkpoint, gives them back to a resumed
    run. A file that says something else is put aside, and one that is gone is written again; each time a line
    on stderr tells.

    Args:
      directory: an existing directory.
      columns: names of the columns after the first.
      kept: `text` as it was after the last row that a resumed run keeps; empty starts the file anew.
      index: name of the first column, which numbers the rows.
    """

    def __init__(
        self, directory: str | os.PathLike, columns: Sequence[str], kept: str = "", index: str = "round"
    ):
        self._path = pathlib.Path(directory, "metrics.csv")
        self._index, self._columns = index, [index, *columns]
        self._lines = kept.splitlines(keepends=True) if kept else [self._line({n: n for n in self._columns})]
        if kept:
            self._tell_difference()
        self._write_whole()
        first_round = int(self._lines[-1].partition(",")[0]) + 1 if self._lines[1:] else 0
        self._events = SummaryWriter(
            str(pathlib.Path(directory, "tensorboard")),
            purge_step=first_round,
            # TensorBoard names event files by the second; a restart may come within one.
            filename_suffix=f".{os.getpid()}.{first_round}",
        )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.close()
        else:  # a run that continues writes its rows again
            self._events.close()

    @property
    def text(self) -> str:
        """The content of metrics.csv."""
        return "".join(self._lines)

    def write(self, number: int, row: Mapping[str, Any]) -> None:
        """Appends a row; readers of the file see it when this returns.

        Args:
          number: the number of the round, or of the point.
          row: numbers by column; a column that is absent or None stays empty.

        Raises:
          ValueError: a name that is not a column.
        """
        numbers = {name: _number(value) for name, value in row.items()}
        line = self._line({**numbers, self._index: int(number)})
        self._restore_if_changed()
        self._lines.append(line)
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            file.write(line)
        self._bytes += len(line.encode())
        for name, value in numbers.items():
            if name != self._index and value is not None and math.isfinite(value):
                self._events.add_scalar(name, value, int(number))
        self._events.flush()

    def forget_evaluation(self) -> None:
        """Empties the cells of an evaluation in the last row: the round is no longer the last."""
        row = next(csv.DictReader([self._lines[0], self._lines[-1]]))
        self._lines[-1] = self._line(without_evaluation(row))
        self._write_whole()

    def close(self) -> None:
        """Closes the event file, and leaves metrics.csv with the rows of the run."""
        self._events.close()
        self._restore_if_changed()
        if self._path.read_bytes() != self.text.encode():  # an edit may keep the length
            self._tell_difference()
            self._write_whole()

    def _line(self, cells: Mapping[str, Any]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def _write_whole(self) -> None:
        content = self.text.encode()
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, self._path)
        self._bytes = len(content)

    def _restore_if_changed(self) -> None:
        """Writes the file again if another program removed it or changed its length."""
        os.stat(self._path.parent)  # fails if the directory is gone: before a line says what is written
        if not self._path.exists() or self._path.stat().st_size != self._bytes:
            self._tell_difference()
            self._write_whole()

    def _tell_difference(self) -> None:
        """Says how the file differs from the rows of the run, and puts one with other rows aside."""
        found = self._path.read_bytes() if self._path.exists() else b""
        # A spreadsheet may add a byte order mark and end lines its own way: the rows are the same.
        lines = found.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").splitlines(keepends=True)
        differing = [n for n, line in enumerate(self._lines) if lines[n : n + 1] != [line]]
        if not differing:  # rows after those that a resumed run keeps are those that it repeats
            return
        problem = "was missing" if not found else f"lacks rows from line {differing[0] + 1} on"
        rest = "".join(lines[differing[0] :])
        if not self._lines[differing[0]].startswith(rest):  # else the end of the file is lost, no more
            aside = self._path.with_name("metrics_changed.csv")
            os.replace(self._path, aside)
            problem = f"was changed in line {differing[0] + 1} (the changed file is now {aside.name})"
        print(f"warning: {self._path} {problem}: written again from the rows of the run", file=sys.stderr)


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
    return parse_metrics(pathlib.Path(path).read_text(encoding="utf-8"))


def parse_metrics(text: str) -> list[dict[str, Number]]:
    """Returns the rows of the content of a metrics.csv, as `read_metrics` does."""
    # A killed process may leave an incomplete line, whose last number may have lost digits.
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: _parse(cell) for name, cell in row.items()} for row in csv.DictReader(lines)]


def _number(value: Any) -> Number:
    return value.item() if hasattr(value, "item") else value


def _parse(text: str) -> Number:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
