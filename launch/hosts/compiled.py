"""FLOP of a compiled program, counted from its optimized HLO text with the trip counts of its loops.

XLA's own cost analysis counts the body of a loop once, however often it runs, and a federated round is
nested loops over clients, steps, layers and experts. Only matrix products are counted (dots and
convolutions, also as calls of a GPU's library): other operations are a few percent of a model's FLOP, and
the result is compared with the peak rate of a matrix product.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Product(NamedTuple):
    """A matrix product of a program.

    Attributes:
      sizes: sizes of all axes of its operands.
      flop: FLOP of one execution; a multiplication and an addition are two.
      times: number of executions.
    """

    sizes: frozenset[int]
    flop: float
    times: float


class _Operation(NamedTuple):
    name: str
    kind: str
    operands: list[str]
    line: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"^\w+\[([\d,]*)\]")
_TYPED = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?\s+")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIBRARY = re.compile(r'custom_call_target="([^"]*(?:gemm|matmul|\$conv)[^"]*)"')
_WINDOW = dict(stride=1, lhs_dilate=1, rhs_dilate=1)


def matrix_products(program: str, trip_counts: Sequence[float] = ()) -> list[Product]:
    """Returns the matrix products of a program.

    A conditional counts as its most expensive branch.

    Args:
      program: optimized HLO of one device, `compiled.as_text()`.
      trip_counts: trip counts of the loops whose number of iterations depends on data, by nesting depth
        among such loops, the outermost first. Loops without matrix products need none.

    Raises:
      ValueError: `trip_counts` is too short, or a product is of an unknown kind.
    """
    computations, entry = _read(program)
    return _visit(computations, entry, trip_counts)


def total_flop(found: Iterable[Product], sizes: Iterable[int] = ()) -> float:
    """Returns the FLOP of all products, or of those whose operands have axes of all these sizes.

    The products of experts are found by three sizes, the model's width, the hidden units and the slots of
    an expert, if no other product has all three.
    """
    return sum(each.flop * each.times for each in found if each.sizes.issuperset(sizes))


def _read(program: str) -> tuple[dict[str, tuple[list[_Operation], dict[str, list[int]]]], str]:
    """Returns each computation's operations and the shapes of its arrays, and the entry's name."""
    computations, entry, operations, shapes = {}, "", [], {}
    for line in program.splitlines():
        if header := _HEADER.match(line):
            operations, shapes = computations[header[2]] = [], {}
            entry = header[2] if header[1] else entry
        elif found := _OPERATION.match(line):
            name, kind_of_result, kind, rest = found.groups()
            if array := _ARRAY.match(kind_of_result):
                shapes[name] = [int(size) for size in array[1].split(",") if size]
            operands = _TYPED.sub("", rest.split(")")[0]).split(",")
            operands = [operand.strip().lstrip("%") for operand in operands]
            operations.append(_Operation(name, kind, operands, line))
    return computations, entry


def _visit(computations: dict, name: str, trip_counts: Sequence[float]) -> list[Product]:
    operations, shapes = computations[name]
    found: list[Product] = []
    for operation in operations:
        line = operation.line
        if product := _product(operation, shapes):
            found.append(product)
        elif operation.kind == "while":
            found += _loop(computations, line, trip_counts)
        elif operation.kind == "conditional":
            names = re.findall(r"[\w.\-]+", " ".join(map("".join, _BRANCHES.findall(line))))
            found += max((_visit(computations, each, trip_counts) for each in names), key=total_flop)
        elif called := _CALLED.search(line):
            found += _visit(computations, called[1], trip_counts)
    return found


def _loop(computations: dict, line: str, trip_counts: Sequence[float]) -> list[Product]:
    body = _match(_CALLED, line)[1]
    if known := _TRIPS.search(line):
        inside, times = _visit(computations, body, trip_counts), int(known[1])
    else:
        # A loop without products may be nested deeper than `trip_counts` is long.
        inside, times = _visit(computations, body, trip_counts[1:]), trip_counts[0] if trip_counts else None
    if not inside:
        return []
    if times is None:
        raise ValueError(
            f"this loop's trip count depends on data and is not in `trip_counts`: {line.strip()}"
        )
    return [each._replace(times=each.times * times) for each in inside]


def _product(operation: _Operation, shapes: dict[str, list[int]]) -> Product | None:
    line = operation.line
    if operation.kind == "dot":
        contracted, batched = (_numbers(line, f"lhs_{axes}_dims=") for axes in ("contracting", "batch"))
    elif operation.kind == "custom-call" and (library := _LIBRARY.search(line)):
        if not library[1].startswith("__cublas"):
            raise ValueError(f"the FLOP of {library[1]} are unknown: {line.strip()}")
        axes = json.loads(_match(r'"dot_dimension_numbers":(\{.*?\})', line)[1])
        contracted, batched = (
            [int(axis) for axis in axes.get(f"lhs_{kind}_dimensions", ())]
            for kind in ("contracting", "batch")
        )
    elif operation.kind == "convolution":
        return _convolution(operation, shapes)
    else:
        return None
    lhs, rhs = (shapes[name] for name in operation.operands[:2])
    shared = math.prod(lhs[axis] for axis in (*contracted, *batched))
    return Product(frozenset(lhs + rhs), 2.0 * math.prod(lhs) * math.prod(rhs) / shared, 1.0)


def _convolution(operation: _Operation, shapes: dict[str, list[int]]) -> Product:
    """A convolution, as TPUs also write dots; taps on padding and dilation gaps are not counted."""
    lhs, rhs = (shapes[name] for name in operation.operands[:2])
    of_lhs, of_rhs, of_out = _match(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.line).groups()
    out = shapes[operation.name]
    window = re.search(r"window=\{([^}]*)\}", operation.line)
    options = dict(option.split("=") for option in window[1].split()) if window else {}
    taps = 1
    for place, axis in enumerate(sorted(label for label in of_out if label.isdigit())):
        stride, gap, apart = (
            int(options[name].split("x")[place]) if name in options else default
            for name, default in _WINDOW.items()
        )
        low = int(options["pad"].split("x")[place].split("_")[0]) if "pad" in options else 0
        size = lhs[of_lhs.index(axis)]
        reached = (
            position * stride - low + tap * apart
            for position in range(out[of_out.index(axis)])
            for tap in range(rhs[of_rhs.index(axis)])
        )
        taps *= sum(index % gap == 0 and 0 <= index // gap < size for index in reached)
    channels = rhs[of_rhs.index("i")] * out[of_out.index("b")] * out[of_out.index("f")]
    return Product(frozenset(lhs + rhs), 2.0 * taps * channels, 1.0)


def _match(pattern: str | re.Pattern[str], line: str) -> re.Match[str]:
    """Returns the match that every operation of the line's kind has."""
    found = re.search(pattern, line)
    assert found is not None, line
    return found


def _numbers(line: str, name: str) -> list[int]:
    found = re.search(name + r"\{([\d,]*)\}", line)
    return [int(number) for number in found[1].split(",") if number] if found else []
