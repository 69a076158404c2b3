"""Timing of calls that take turns, and the tables of their results."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.run.progress import format_value


class Timing(NamedTuple):
    """Seconds of a repeated call: median and quartiles."""

    median_s: float
    low_s: float
    high_s: float


class Rate(NamedTuple):
    """Items a second: median and quartiles."""

    median_hz: float
    low_hz: float
    high_hz: float


class Table(NamedTuple):
    """One table of a suite.

    Attributes:
      title: one line, with the sizes and the unit.
      columns: names of the columns, of which the first names the rows.
      rows: values by column; a `Timing` is printed in milliseconds, a `Rate` per second.
      note: conditions of the measurement that a reader must know.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


def time_together(repeats: int, **calls: Callable[[], Any]) -> dict[str, Timing]:
    """Returns the time of each call; the calls take turns, so that all meet the same state of the machine.

    Args:
      repeats: of each call, after a first one that compiles and is not counted.
      calls: each must block until its result is computed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return {name: Timing(*quartiles(values)) for name, values in seconds.items()}


def quartiles(values: Sequence[float]) -> tuple[float, ...]:
    """Returns the median, the lower and the upper quartile."""
    return tuple(float(np.quantile(values, q)) for q in (0.5, 0.25, 0.75))


def each_of(timing: Timing, count: float) -> Timing:
    """Returns the time of one item of a call that computes `count` of them."""
    return Timing(*(seconds / count for seconds in timing))


def rate(timing: Timing, count: float) -> Rate:
    """Returns the items a second of a call that computes `count` of them."""
    return Rate(count / timing.median_s, count / timing.high_s, count / timing.low_s)


def ratio(first: Timing, second: Timing) -> float:
    """Returns the ratio of the median times, first over second."""
    return first.median_s / second.median_s


def cell(value: Any) -> str:
    """Returns the text of a table's value.

    >>> cell(Timing(0.0123, 0.0121, 0.0130)), cell(2.345678), cell(None)
    ('12.3 (12.1-13)', '2.346', '-')
    """
    if isinstance(value, Timing | Rate):
        unit = 1e3 if isinstance(value, Timing) else 1.0
        median, low, high = (f"{unit * number:.3g}" for number in value)
        return f"{median} ({low}-{high})"
    return format_value(value)


def as_json(table: Table) -> dict[str, Any]:
    """Returns a table as values for JSON."""
    rows = [
        {
            name: value._asdict() if isinstance(value, Timing | Rate) else value
            for name, value in zip(table.columns, row, strict=True)
        }
        for row in table.rows
    ]
    return {"title": table.title, "rows": rows, "note": table.note}
