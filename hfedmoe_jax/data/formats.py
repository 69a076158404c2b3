"""Parquet, csv, tsv and json to columns of raw values: one reader a kind.

Every reader has the signature `(file, choose, data_config) -> {name of a column: its values}`, or None for a
file without rows. It reads the columns that `choose` names.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyarrow.parquet
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import Roles, named
from hfedmoe_jax.errors import InputError

Choose = Callable[[Sequence[str]], Roles]
"""Given the columns that a file has, returns those to read, by their role."""
Columns = Mapping[str, Sequence[Any]]

BinaryFile = gzip.GzipFile | io.BufferedReader
PROBED_BYTES = 4096
SEPARATORS = ",;\t|^~"


def _read_parquet(file: Any, choose: Choose, data_config: ConfigDict) -> Columns:
    parquet = pyarrow.parquet.ParquetFile(file)
    columns = named(choose(parquet.schema_arrow.names))
    table = parquet.read(columns=columns)
    return {column: table[column].to_pylist() for column in columns}


def _read_separated(default: str) -> Callable[[BinaryFile, Choose, ConfigDict], Columns | None]:
    def read(file: BinaryFile, choose: Choose, data_config: ConfigDict) -> Columns | None:
        separator = separator_of(data_config, default)
        first_line = _start(file).decode("utf-8", "replace").lstrip().partition("\n")[0]
        # A field may be a whole book; the module's limit is for the whole process, so it is put back.
        limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            stream = io.TextIOWrapper(cast(Any, file), encoding="utf-8-sig", newline="")
            reader = csv.reader(stream, strict=True, delimiter=separator)
            try:
                first = next((row for row in reader if row), None)
                if first is None:
                    return None
                roles = choose(_names(first, data_config))
            except (csv.Error, InputError) as error:
                raise _likely_cause(error, first_line, separator, data_config) from error
            return _to_columns(reader, first, roles, data_config)
        finally:
            csv.field_size_limit(limit)

    return read


def _names(first: list[str], data_config: ConfigDict) -> list[str]:
    return first if data_config.header else [str(number) for number in range(1, len(first) + 1)]


def _to_columns(reader: Any, first: list[str], roles: Roles, data_config: ConfigDict) -> Columns:
    names, rows = _names(first, data_config), [] if data_config.header else [first]
    for row in reader:
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(f"line {reader.line_num} has {len(row)} fields, not {len(names)}")
        rows.append(row)
    position = {column: names.index(column) for column in named(roles)}
    columns = {column: [row[place] for row in rows] for column, place in position.items()}
    # pandas writes whole numbers beside a missing one as 1.0; parquet gives such labels as '1' too.
    for column in roles.get("label", ()):
        columns[column] = [re.sub(r"^(-?\d+)\.0+$", r"\1", label) for label in columns[column]]
    return columns


def _likely_cause(error: Exception, line: str, separator: str, data_config: ConfigDict) -> Exception:
    """Returns the error of a first line without the columns, blamed on the separator or header if likely."""
    bare = re.sub(r'"[^"]*"', "", line)
    likely = max(SEPARATORS, key=bare.count)
    words = line.strip().replace('"', "").split(" ")
    if not bare.count(likely) and {data_config.text_column, data_config.label_column} <= set(words):
        likely = " "
    if bare.count(likely) > bare.count(separator):
        problem = f"the first line, {line[:60]!r}, looks separated by {likely!r}"
        return InputError("data.separator", separator, problem, f"give data.separator={likely!r}")
    if data_config.header and isinstance(error, InputError):
        hint = "if the file has no header line, data.header=False names its columns 1, 2, ..."
        return InputError(error.field, error.value, error.problem, f"{error.remedy}; {hint}")
    return error


def separator_of(data_config: ConfigDict, default: str) -> str:
    """Returns the character between two fields of a line; a tab may be written as backslash t.

    Raises:
      InputError: it is not a single character, or a quote, or it ends a line.
    """
    separator = data_config.separator.replace("\\t", "\t") or default
    if len(separator) != 1 or separator in '"\r\n\0':
        problem = "must be one character, and neither a quote nor the end of a line"
        raise InputError("data.separator", data_config.separator, problem, "use e.g. ';', or leave it empty")
    return separator


def _read_json(file: BinaryFile, choose: Choose, data_config: ConfigDict) -> Columns | None:
    _start(file)
    rows = _json_rows(file.read().decode("utf-8-sig"))
    if not rows:
        return None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}, not an object")
    columns = named(choose(list(dict.fromkeys(name for row in rows for name in row))))
    return {column: [row.get(column) for row in rows] for column in columns}


def _json_rows(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        return json.loads(text, object_pairs_hook=_once)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=_once))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _start(file: BinaryFile) -> bytes:
    """Returns the first bytes of a text, without reading on; refuses UTF-16, which may pass for UTF-8."""
    start = file.peek(PROBED_BYTES)[:PROBED_BYTES]
    # Every other byte of Latin letters in UTF-16 is a null; a stray null is left to the tokenizer.
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * start.count(0) > len(start):
        raise UnicodeDecodeError("utf-8", start, 0, 1, "UTF-16")
    return start.removeprefix(codecs.BOM_UTF8)


READERS: dict[str, Callable[[Any, Choose, ConfigDict], Columns | None]] = {
    ".parquet": _read_parquet,
    ".csv": _read_separated(","),
    ".tsv": _read_separated("\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
}
