"""Compiles programs ahead of time, and says in a table what they take of a chip."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from launch.hosts.devices import no_compilation_cache
from launch.run.progress import format_seconds
from launch.targets import Chip

MEGABYTE = 1e6

Table = tuple[str, list[str], list[list[str]]]
"""Title, header and rows, as `launch.run.progress.print_table` takes them."""


class Compiled(NamedTuple):
    """What compiling a program showed.

    Attributes:
      arguments, temporaries, outputs: bytes on a chip; outputs without those that reuse arguments.
      flop, moved: FLOP, and bytes between chip and memory, of one execution as XLA counts them: the body of a
        loop once.
      collectives: how many of each kind its text has; None where XLA cannot print it.
      seconds: that lowering and compiling took.
    """

    arguments: int
    temporaries: int
    outputs: int
    flop: float
    moved: float
    collectives: Counter[str] | None
    seconds: float

    @property
    def total(self) -> int:
        """Bytes on a chip."""
        return self.arguments + self.temporaries + self.outputs


COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compile_program(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Returns what compiling shows.

    Args:
      lower: () -> `jax.stages.Lowered`.
    """
    begun = time.perf_counter()
    compiled = lower().compile()
    seconds = time.perf_counter() - begun
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend of JAX's own tells
    cost = compiled.cost_analysis() or {}
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        count_collectives(compiled),
        seconds,
    )


def count_collectives(compiled: jax.stages.Compiled) -> Counter[str] | None:
    """Returns a program's collectives; None where XLA cannot print it (libtpu 0.0.50, some programs)."""
    try:
        return Counter(COLLECTIVE.findall(compiled.as_text() or ""))
    except jax.errors.JaxRuntimeError:
        return None


def compile_programs(
    programs: Iterable[tuple[str, Callable[[], jax.stages.Lowered]]],
) -> dict[str, Compiled | str]:
    """Returns by name what compiling a program showed, or XLA's message if its memory is refused.

    Args:
      programs: by name, functions that lower them.
    """
    found: dict[str, Compiled | str] = {}
    for name, lower in programs:
        try:
            with no_compilation_cache():
                found[name] = compile_program(lower)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found[name] = str(error)
    return found


def collective_text(collectives: Counter[str] | None) -> str:
    """Returns collectives as a cell of a table.

    >>> collective_text(Counter(["all-reduce"])), collective_text(Counter()), collective_text(None)
    ('1 all-reduce', '-', 'unknown')
    """
    if collectives is None:
        return "unknown"
    return ", ".join(f"{count} {kind}" for kind, count in sorted(collectives.items())) or "-"


def program_table(programs: dict[str, Compiled | str], chip: Chip) -> Table:
    """Returns each program's memory on a chip, its collectives, and the time to compile it.

    Args:
      programs: see `compile_programs`.
      chip: that they were compiled for.
    """
    rows = [
        [name, *(too_large_cells(found) if isinstance(found, str) else compiled_cells(found, chip))]
        for name, found in programs.items()
    ]
    header = [
        "program", "arguments", "temporaries", "outputs", "in all", "of the chip",
        "collectives", "compiled in",
    ]  # fmt: skip
    return f"Programs, MB on a chip of {megabytes(chip.memory_bytes)}", header, rows


def compiled_cells(found: Compiled, chip: Chip) -> list[str]:
    """Returns the cells of a program after its name."""
    room = chip.memory_bytes - found.total
    return [
        *map(megabytes, (found.arguments, found.temporaries, found.outputs, found.total)),
        f"{megabytes(abs(room))} {'free' if room >= 0 else 'too much'}",
        collective_text(found.collectives),
        format_seconds(found.seconds),
    ]


TOO_LARGE = re.compile(r"temporaries \(([\d.]+)([KMG])\) exceeds available \w+ \(([\d.]+)([KMG])\)")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def too_large_cells(message: str) -> list[str]:
    """Returns the cells of a program that XLA refuses for its memory.

    >>> too_large_cells("... HLO temporaries (20.5G) exceeds available HBM (15.75G). ...")
    ['-', '22,012', '-', '-', '5,100 too much', '-', '-']
    """
    found = TOO_LARGE.search(message)
    if found is None:
        return ["-", "-", "-", "-", "too much: " + message.splitlines()[0], "-", "-"]
    needed, there = (float(found[place]) * UNITS[found[place + 1]] for place in (1, 3))
    return ["-", megabytes(needed), "-", "-", f"{megabytes(needed - there)} too much", "-", "-"]


def megabytes(count: float) -> str:
    """Returns bytes in MB, as text."""
    return f"{count / MEGABYTE:,.4g}" if count < 1e9 else f"{count / MEGABYTE:,.0f}"
