"""Data files as nobody should write them: read and split, each ends with data or an `InputError`.

    python tests/fuzz_data.py 200          # so many files, from seed 0
    python tests/fuzz_data.py 200 1000     # from another seed

The suite runs a hundred: tests/hfedmoe_jax/data/test_fuzz_data.py.
"""

import gzip
import json
import math
import pathlib
import random
import sys
import tempfile
import time

import pyarrow
import pyarrow.parquet

from configs.hfedmoe import get_config
from hfedmoe_jax.data import FederatedData, load_federated, num_rows
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks import classification

ODD_TEXTS = [
    "", " ", "\0", "\ufeff", "\ud800", "$x_{$", "<b>&", '"', "a,b;c\td", "line\nline", "\r", "[UNK] [PAD]",
    "ภาษาไทย" * 30, "हिन्दी में", "日本語" * 60, "é" * 300, "x" * 20_000, "🚀" * 50, "\u202e", "=1+1", "nan",
]  # fmt: skip
ODD_LABELS = ["a", "A", "a ", "0", "0.0", "1e9", "9" * 5000, "$x_{$", "<script>", "\ud800", "日本", "x" * 500]
ODD_VALUES = [None, True, 1, 1.0, -0.0, math.nan, math.inf, 2**70, [1], {"a": 1}, "x"]
ENCODINGS = ["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-16-le", "cp1252", "latin-1"]
LIMIT_S = 20.0


def write_file(rng: random.Random, folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """Writes a file and returns its path and the fields of `data` that go with it."""
    rows = make_rows(rng)
    kind = rng.choice(["csv", "csv", "tsv", "json", "jsonl", "jsonl", "parquet"])
    path = folder / f"data.{kind}"
    fields = {"tokenizer": rng.choice(["wordpiece", "bpe"])}
    if rng.random() < 0.3:
        fields["client_column"] = "owner"
    if rng.random() < 0.1:
        odd = ["label", "owner", "text,owner", "{text}: {owner}", "{txt", "txt", "", ",", "1"]
        fields["text_column"] = rng.choice(odd)
    if kind == "parquet":
        content = parquet_bytes(rng, rows)
    else:
        content = text_of(rng, rows, kind, fields).encode(rng.choice(ENCODINGS), "replace")
        if rng.random() < 0.2:
            content, path = gzip.compress(content), path.with_name(f"{path.name}.gz")
    path.write_bytes(damaged(rng, content))
    return path, fields


def make_rows(rng: random.Random) -> list[dict]:
    """Returns rows: plain ones, with odd values among them in half of the cases."""
    share = rng.choice([0.0, 0.0, 0.0, 0.005, 0.1])
    plain = [["a", "b"], ["0", "1", "2"], ["up", "down", "Up"]]
    labels = rng.choice([*plain, *plain, ODD_LABELS, [str(n) for n in range(40)], ["one"]])
    words = rng.choice([["sun", "rain", "snow", "wind"], ODD_TEXTS])
    rows = []
    for number in range(rng.choice([0, 2, 12, 40, 40, 80, 80, 120, 120])):
        text = " ".join(rng.choices(words, k=rng.randint(1, 4)))
        row = {
            "text": text if rng.random() < 0.2 else f"{text} {number}",
            "label": rng.choice(labels),
            "owner": f"owner{rng.randint(0, rng.choice([0, 3, 60]))}",
        }
        for name in row:
            if rng.random() < share:
                row[name] = rng.choice([*ODD_VALUES, *ODD_TEXTS])
        if rng.random() < share / 4:
            del row[rng.choice(list(row))]
        rows.append(row)
    return rows


def text_of(rng: random.Random, rows: list[dict], kind: str, fields: dict) -> str:
    """Returns the rows as csv, tsv or json, perhaps with another separator, without a header, unquoted."""
    if kind.startswith("json"):
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.7) for row in rows]
        return f"[{','.join(lines)}]" if kind == "json" else "\n".join(lines)
    separator = rng.choice([*",,,,", ";", "\t", "|"]) if kind == "csv" else "\t"
    if separator != "," and rng.random() < 0.7:
        fields["separator"] = rng.choice([*[separator] * 5, ";;", '"', "\ud800"])
    if rng.random() < 0.1:
        fields |= {"header": False, "text_column": "1", "label_column": rng.choice(["2", "2", "9"])}
    names = rng.choice([["text", "label", "owner"]] * 12 + [["text", "text", "label"], ["text"], []])
    quoted = rng.random() < 0.8

    def field(value: object) -> str:
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if quoted else text

    lines = [separator.join(names)] + [separator.join(field(row.get(name)) for name in names) for row in rows]
    return rng.choice(["\n", "\r\n"]).join(lines)


def parquet_bytes(rng: random.Random, rows: list[dict]) -> bytes:
    """Returns a parquet file; values that do not go together in a column become texts."""
    names, arrays = rng.choice([["text", "label", "owner"]] * 5 + [["text", "text", "label"]]), []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            arrays.append(pyarrow.array(values))
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
            texts = [str(value).encode("utf-8", "replace").decode() for value in values]
            arrays.append(pyarrow.array(texts))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=names), sink)
    return sink.getvalue().to_pybytes()


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Returns the bytes, in a quarter of the cases cut, doubled or with some of them replaced."""
    damage = rng.choice(["none"] * 15 + ["cut", "flip", "double"])
    if damage == "cut":
        return content[: rng.randint(0, len(content))]
    if damage == "flip" and content:
        found = bytearray(content)
        for _ in range(rng.randint(1, 20)):
            found[rng.randrange(len(found))] = rng.randrange(256)
        return bytes(found)
    return content * 2 if damage == "double" else content


def load(seed: int, folder: pathlib.Path) -> FederatedData | InputError:
    """Writes the file of a seed, reads and splits it, and returns the data or the error."""
    rng = random.Random(seed)
    path, fields = write_file(rng, folder)
    config = get_config("smoke")
    config.data.update({"source": "file", "train_path": str(path), "vocab_size": 400, "seq_len": 8, **fields})
    if rng.random() < 0.2:
        config.data[rng.choice(["test_path", "validation_path"])] = str(path)
    config.fl.clients = rng.choice([1, 2, 2, 4, 60])
    config.partition.name = rng.choice(["iid", "dirichlet", "shards", "column"])
    try:
        return load_federated(config, classification.prepare)
    except InputError as error:
        return error


def check(seed: int, folder: pathlib.Path) -> bool:
    """Says whether the file of a seed was read; fails if neither data nor a single line came of it."""
    found = load(seed, folder)
    if isinstance(found, InputError):
        assert len(str(found).splitlines()) == 1, str(found)
        str(found).encode("utf-8")
        return False
    assert num_rows(found.train) and num_rows(found.test) and all(map(len, found.client_train))
    "".join([*found.label_names, *found.client_names]).encode("utf-8")
    return True


def main(count: int, first: int = 0) -> None:
    """Checks so many seeds and prints how many files were read."""
    read = 0
    for seed in range(first, first + count):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                read += check(seed, pathlib.Path(folder))
            except BaseException:
                print(f"seed {seed}:", file=sys.stderr)
                raise
        assert time.monotonic() - started < LIMIT_S, f"seed {seed} takes too long"
    print(f"{count} files: {read} read, {count - read} refused in one line")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
