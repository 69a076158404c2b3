"""Documents from files on disk: one file, a pattern of files or a folder of them."""

import csv
import glob
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import Documents, Roles, no_rows, to_documents, wanted_columns
from hfedmoe_jax.data.formats import PROBED_BYTES, READERS, Columns
from hfedmoe_jax.errors import InputError

GZIP = ".gz"


def read_documents(data_config: ConfigDict, field: str) -> Documents:
    """Reads the documents of a file, of the files that a pattern matches, or of those of a folder.

    Files are read in the order of their names. A file's suffix says what it is: parquet, csv, tsv, json or
    jsonl, and the last four may be compressed (`.csv.gz`). A json file is an array of objects or, like jsonl,
    one object a line.

    Args:
      data_config: the path, the names of the columns, and `separator` and `header` for csv and tsv.
      field: which of the paths: `train_path`, `validation_path` or `test_path`.

    Raises:
      InputError: a file is missing, unreadable or of an unknown kind, all are empty, or a column is missing.
    """
    path = data_config[field]
    if not path:
        raise InputError(f"data.{field}", path, "data.source=file needs a file", f"give data.{field}=FILE")
    files = _find(path, field)
    parts = [part for file in files if (part := _read(file, data_config, field)) is not None]
    if not parts:
        raise no_rows(f"data.{field}", path)
    clients = [client for part in parts for client in part.clients or []]
    choices = [each for part in parts for each in part.choices or []]
    return Documents(
        [text for part in parts for text in part.texts],
        [label for part in parts for label in part.labels],
        None if parts[0].clients is None else clients,
        None if parts[0].choices is None else choices,
    )


def kind_of(path: str | Path) -> str:
    """Returns the suffix that says how a file is read, or an empty text.

    >>> kind_of("train.CSV.gz"), kind_of("train.parquet"), kind_of("train.parquet.gz"), kind_of("notes.txt")
    ('.csv', '.parquet', '', '')
    """
    name = Path(path).name.lower()
    suffix = Path(name.removesuffix(GZIP)).suffix
    return suffix if suffix in READERS and not (suffix == ".parquet" and name.endswith(GZIP)) else ""


def _find(path: str, field: str) -> list[Path]:
    """Returns the data files of a path, in order."""

    def refuse(problem: str, remedy: str = "give the path of a data file") -> InputError:
        return InputError(f"data.{field}", path, problem, remedy)

    given = Path(path).expanduser()
    try:
        if given.is_dir():
            # Spark and others leave files such as _SUCCESS and .crc beside the data.
            files = [file for file in given.iterdir() if file.is_file() and file.name[0] not in "._"]
            files = sorted(file for file in files if kind_of(file))
            if not files:
                raise refuse(f"the folder has no data files ({', '.join(READERS)})")
        elif given.exists():
            files = [given]
        else:
            files = [Path(file) for file in sorted(glob.glob(str(given))) if Path(file).is_file()]
            if not files:
                if not kind_of(path):
                    raise refuse("no such file, and of an unknown kind", f"use one of {', '.join(READERS)}")
                raise refuse("no such file")
    except (OSError, ValueError) as error:  # too long a name, a null character, no permission
        if isinstance(error, InputError):
            raise
        raise refuse(f"cannot be read: {error}") from error
    kinds = {kind_of(file) for file in files}
    if "" in kinds:
        raise refuse("unknown kind of file", f"use one of {', '.join(READERS)}")
    if len(kinds) > 1:
        raise refuse(f"has files of several kinds: {', '.join(sorted(kinds))}", "give files of one kind")
    return files


def _read(file: Path, data_config: ConfigDict, field: str) -> Documents | None:
    """Returns the documents of one file, None if it is empty."""
    where, kind = str(file), kind_of(file)

    def choose(names: Sequence[str]) -> Roles:
        return wanted_columns(names, data_config, with_clients=field == "train_path", where=where)

    try:
        if file.stat().st_size == 0:
            return None
        columns: Columns | None
        if kind == ".parquet":
            columns = READERS[kind](file, choose, data_config)
        else:
            with (gzip.open if file.name.lower().endswith(GZIP) else open)(file, "rb") as binary:
                columns = READERS[kind](binary, choose, data_config)
        if columns is None or not any(len(values) for values in columns.values()):
            return None
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.{field}", where, f"is not UTF-8{_encoding_hint(error)}", "save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise InputError(
            f"data.{field}", where, "is nested too deeply", "check or replace the file"
        ) from error
    except (
        OSError, EOFError, zlib.error, ValueError, OverflowError, csv.Error, pyarrow.ArrowException
    ) as error:  # fmt: skip
        problem = f"cannot be read as {kind.removeprefix('.')}: {error}"
        raise InputError(f"data.{field}", where, problem, "check or replace the file") from error
    return to_documents(columns, choose(list(columns)), data_config, where)


def _encoding_hint(error: UnicodeDecodeError) -> str:
    content = bytes(error.object[:PROBED_BYTES])
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        return " (it looks like UTF-16)"
    return f": byte {error.object[error.start]:#04x} is of another encoding, perhaps cp1252"
