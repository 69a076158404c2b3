"""Parquet, csv and json files on disk to raw columns."""

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import Documents, no_rows, to_documents, wanted_columns
from hfedmoe_jax.errors import InputError

# Given the columns that a file has, returns those to read, by their role.
Choose = Callable[[Sequence[str]], dict[str, str]]
Columns = Mapping[str, Sequence[Any]]


def read_documents(data_config: ConfigDict, field: str) -> Documents:
    """Reads the documents of one file, chosen by its suffix: parquet, csv, json or jsonl.

    A csv file has a header line; a json file is an array of objects or, like jsonl, one object a line.

    Args:
      data_config: `train_path` or `test_path`, and the names of the columns.
      field: which of the two paths, `train_path` or `test_path`.

    Raises:
      InputError: the file is missing, unreadable, of an unknown kind or empty, or lacks a column.
    """
    path = data_config[field]
    if not path:
        raise InputError(f"data.{field}", path, "data.source=file needs a file", f"give data.{field}=FILE")
    read = READERS.get(Path(path).suffix.lower())
    if read is None:
        raise InputError(f"data.{field}", path, "unknown kind of file", f"use one of {', '.join(READERS)}")
    file = Path(path).expanduser()
    if not file.is_file():
        problem = "is a directory" if file.is_dir() else "no such file"
        raise InputError(f"data.{field}", path, problem, "give the path of a data file")
    if file.stat().st_size == 0:
        raise no_rows(data_config, path)

    def choose(names: Sequence[str]) -> dict[str, str]:
        return wanted_columns(names, data_config, with_clients=field == "train_path", where=path)

    try:
        columns = read(file, choose)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        kind = Path(path).suffix.lower().removeprefix(".")
        raise InputError(
            f"data.{field}", path, f"cannot be read as {kind}: {error}", "check or replace the file"
        ) from error
    if columns is None:
        raise no_rows(data_config, path)
    return to_documents(columns, data_config, path)


def _read_parquet(file: Path, choose: Choose) -> Columns:
    parquet = pyarrow.parquet.ParquetFile(file)
    wanted = choose(parquet.schema_arrow.names)
    table = parquet.read(columns=list(wanted.values()))
    return {role: table[column].to_pylist() for role, column in wanted.items()}


def _read_csv(file: Path, choose: Choose) -> Columns | None:
    # A field may be a whole book; the module's limit is for the whole process, so it is put back.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            names = next(reader, None)
            if names is None:
                return None
            wanted = choose(names)
            rows = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise ValueError(f"line {reader.line_num} has {len(row)} fields, not {len(names)}")
                rows.append(row)
    finally:
        csv.field_size_limit(limit)
    columns = {role: [row[names.index(column)] for row in rows] for role, column in wanted.items()}
    # pandas writes whole numbers beside a missing one as 1.0; parquet gives such labels as '1' too.
    columns["label"] = [re.sub(r"^(-?\d+)\.0+$", r"\1", label) for label in columns["label"]]
    return columns


def _read_json(file: Path, choose: Choose) -> Columns | None:
    rows = _json_rows(file.read_text(encoding="utf-8-sig"))
    if not rows:
        return None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}, not an object")
    wanted = choose(list(dict.fromkeys(name for row in rows for name in row)))
    return {role: [row.get(column) for row in rows] for role, column in wanted.items()}


def _json_rows(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


READERS: dict[str, Callable[[Path, Choose], Columns | None]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
}
