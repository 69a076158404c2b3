"""Terminal output: progress of a run as a bar or as lines, and tables."""

import math
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

LINES = 15  # printed over a whole run if there is no terminal


class Progress:
    """Shows the progress of a run, its latest numbers and the estimated time left.

    On a terminal it is a bar; elsewhere at most about 15 lines over the whole run.

    Args:
      total: number of rounds of the whole run.
      description: the unit of the count, e.g. "rounds".
      initial: number of rounds that an earlier process has completed.
    """

    def __init__(self, total: int, description: str, initial: int = 0):
        self._total, self._description, self._initial = total, description, initial
        self._fields: dict[str, Any] = {}
        self._printed = initial
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self._clock = _Clock(self._initial, self._total)
        if sys.stdout.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[numbers]}", style="bold", table_column=Column(no_wrap=True)),
                _TimeColumn(self._clock),
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._description, total=self._total, completed=self._initial, numbers=""
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, completed: int, **fields: Any) -> None:
        """Shows that `completed` rounds are done, with their numbers by name; None keeps the last number."""
        self._clock.tick(completed)
        for name, value in fields.items():
            self._fields[name] = self._fields.get(name) if value is None else value
        known = {name: value for name, value in self._fields.items() if value is not None}
        numbers = "  ".join(f"{name} {format_value(value)}" for name, value in known.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, numbers=numbers)
        elif self._line_is_due(completed):
            self._printed = completed
            count = f"{completed:>{len(str(self._total))}}/{self._total}"
            print(
                "  ".join(filter(None, [f"{self._description} {count}", numbers, str(self._clock)])),
                flush=True,
            )

    def _line_is_due(self, completed: int) -> bool:
        first = self._printed == self._initial
        every = max(1, math.ceil((self._total - self._initial) / LINES))
        return first or completed >= self._total or completed // every > self._printed // every


class _Clock:
    """Elapsed time, and time left at the present pace of this process."""

    def __init__(self, initial: int, total: int):
        self._total = total
        self._marks = [(initial, time.monotonic())]

    def tick(self, completed: int) -> None:
        self._marks.append((completed, time.monotonic()))

    def left_s(self) -> float | None:
        # The pace leaves out the first round, which compiles the program.
        (done_then, then), (done, now) = self._marks[:2][-1], self._marks[-1]
        if done <= done_then:
            return None
        left = (now - then) / (done - done_then) * (self._total - done)
        return max(0.0, left - (time.monotonic() - now))

    def __str__(self) -> str:
        elapsed = f"{_minutes(time.monotonic() - self._marks[0][1])} elapsed"
        left = self.left_s()
        if left is None or self._marks[-1][0] >= self._total:
            return elapsed
        return f"{elapsed}, ETA {_minutes(left)}"


def _minutes(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


class _TimeColumn(ProgressColumn):
    def __init__(self, clock: _Clock):
        super().__init__(table_column=Column(no_wrap=True))
        self._clock = clock

    def render(self, task: Task) -> Text:
        return Text(str(self._clock), style="cyan")


def print_summary(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Prints names and values in two columns; a word without spaces, such as a path, is never broken."""
    console = Console(highlight=False)
    width = max((len(name) for name, _ in rows), default=0)
    console.print(f"\n{title}", style="bold", markup=False)
    for name, value in rows:
        lines = textwrap.wrap(
            format_value(value),
            width=max(20, console.width - width - 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in zip([name, *[""] * (len(lines) - 1)], lines, strict=True):
            console.print(Text.assemble("  ", (f"{label:<{width}}", "cyan"), f"  {text}"), soft_wrap=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table of texts, its first column left-aligned and the others right-aligned."""
    console = Console(highlight=False)
    console.print(f"\n{title}", style="bold", markup=False, soft_wrap=True)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for style, row in [("cyan", header), *(("", row) for row in rows)]:
        cells = [
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print(Text("  " + "  ".join(cells).rstrip(), style=style), soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """Returns a duration as text in seconds, minutes or hours.

    >>> [format_seconds(s) for s in (1.34, 42.4, 187, 7512)]
    ['1.3 s', '42 s', '3:07 min', '2:05 h']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def format_value(value: Any) -> str:
    """Returns a float with about four significant digits, anything else as it is.

    >>> [format_value(v) for v in (0.81234567, 98765.4, 2.0, None, "text")]
    ['0.8123', '98,765', '2', '-', 'text']
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)
