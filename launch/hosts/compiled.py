"""What a compiled program computes: its matrix products, each as often as it runs.

XLA's own cost analysis counts the body of a loop once, however often it runs, and a federated round
is loops all the way down: clients, steps, layers, experts. So the optimized program is read as
text and followed through its loops. Only products are counted (dots and convolutions, also where a GPU's
library computes them): the rest is a few percent of a model's operations, and the peak that they
are compared to is that of a product.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Product(NamedTuple):
    """A matrix product of a program.

    Attributes:
      sizes: of all axes of its operands.
      flop: of one run of it, a multiplication and an addition being two.
      times: how often it runs.
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


def products(program: str, turns: Sequence[float] = ()) -> list[Product]:
    """Returns the matrix products of a program.

    A conditional counts as its most expensive branch.

    Args:
      program: an optimized program of XLA, `compiled.as_text()`; of one device.
      turns: how often loops run whose end only the data decide: first those that lie in no other such
        loop, then those inside one of these, and so on. Loops without products need none.

    Raises:
      ValueError: `turns` lacks a loop, or a product is of a kind that nobody has taught this function.
    """
    computations, entry = _read(program)
    return _visit(computations, entry, turns)


def total_flop(found: Iterable[Product], sizes: Iterable[int] = ()) -> float:
    """Returns the FLOP of a program's products, or of those whose operands have axes of all these sizes.

    An expert's products are told from the others by the model's width, the hidden units and the
    slots of an expert, if nothing else has all three.
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


def _visit(computations: dict, name: str, turns: Sequence[float]) -> list[Product]:
    operations, shapes = computations[name]
    found: list[Product] = []
    for operation in operations:
        line = operation.line
        if product := _product(operation, shapes):
            found.append(product)
        elif operation.kind == "while":
            found += _loop(computations, line, turns)
        elif operation.kind == "conditional":
            names = re.findall(r"[\w.\-]+", " ".join(map("".join, _BRANCHES.findall(line))))
            found += max((_visit(computations, each, turns) for each in names), key=total_flop)
        elif called := _CALLED.search(line):
            found += _visit(computations, called[1], turns)
    return found


def _loop(computations: dict, line: str, turns: Sequence[float]) -> list[Product]:
    body = _CALLED.search(line)[1]
    if known := _TRIPS.search(line):
        inside, times = _visit(computations, body, turns), int(known[1])
    else:
        # A loop without products may lie deeper than `turns` goes.
        inside, times = _visit(computations, body, turns[1:]), turns[0] if turns else None
    if inside and times is None:
        raise ValueError(
            f"the data decide how often this loop runs, and `turns` does not say: {line.strip()}"
        )
    return [each._replace(times=each.times * times) for each in inside]


def _product(operation: _Operation, shapes: dict[str, list[int]]) -> Product | None:
    line = operation.line
    if operation.kind == "dot":
        contracted, batched = (_numbers(line, f"lhs_{axes}_dims=") for axes in ("contracting", "batch"))
    elif operation.kind == "custom-call" and (library := _LIBRARY.search(line)):
        if not library[1].startswith("__cublas"):
            raise ValueError(f"the operations of {library[1]} are not known: {line.strip()}")
        axes = json.loads(re.search(r'"dot_dimension_numbers":(\{.*?\})', line)[1])
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
    """A convolution, which is also how a TPU writes a product; taps on padding and gaps cost nothing."""
    lhs, rhs = (shapes[name] for name in operation.operands[:2])
    of_lhs, of_rhs, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.line).groups()
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


def _numbers(line: str, name: str) -> list[int]:
    found = re.search(name + r"\{([\d,]*)\}", line)
    return [int(number) for number in found[1].split(",") if number] if found else []
