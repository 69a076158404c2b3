import csv
import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from hfedmoe_jax.data import Documents, load_source
from hfedmoe_jax.data.columns import ordered_names
from hfedmoe_jax.errors import InputError

ROWS = [
    {"text": "Zürich, “snow”\nand wind", "label": 10, "user": "bo"},
    {"text": None, "label": 2, "user": "al"},
    {"text": "plain", "label": 10, "user": "bo"},
]
EXPECTED = Documents(["Zürich, “snow”\nand wind", "", "plain"], ["10", "2", "10"], None)


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def load(make_config, **data):
    return load_source(make_config(**data).data)


def error_of(make_config, **data):
    with pytest.raises(InputError) as caught:
        load(make_config, **data)
    assert "\n" not in str(caught.value)
    return caught.value


def test_bbc_news_is_complete_and_in_order(make_config, capsys):
    documents = load(make_config, source="bbc_news").train
    assert capsys.readouterr().out == ""
    # 2,225 files, 98 of them copies.
    assert len(documents.texts) == len(documents.labels) == len(set(documents.texts)) == 2127
    assert ordered_names(documents.labels) == ("business", "entertainment", "politics", "sports", "tech")
    assert documents.labels == sorted(documents.labels)
    assert documents.texts[0].startswith("Ad sales boost Time Warner profit")
    assert documents == load(make_config, source="bbc_news").train


def test_bbc_news_has_no_clients(make_config):
    error = error_of(make_config, source="bbc_news", client_column="user")
    assert error.field == "data.client_column" and "leave it empty" in str(error)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl"])
def test_every_kind_of_file_gives_the_same_documents(make_config, tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", ROWS)
    assert load(make_config, train_path=path).train == EXPECTED
    with_clients = load(make_config, train_path=path, test_path=path, client_column="user")
    assert with_clients.train == EXPECTED._replace(clients=["bo", "al", "bo"])
    assert with_clients.test == EXPECTED


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
@pytest.mark.parametrize(
    "labels, names",
    [
        ([3.0, 11.0, 3.0], ("3", "11")),
        ([True, False, True], ("False", "True")),
        (["b", "a", "b"], ("a", "b")),
        (["7", "-12", "7"], ("-12", "7")),
        (["07", "7", "12"], ("07", "12", "7")),
    ],
)
def test_labels_of_any_type_become_ordered_names(make_config, tmp_path, suffix, labels, names):
    rows = [{"text": "x", "label": label} for label in labels]
    documents = load(make_config, train_path=write(tmp_path / f"data{suffix}", rows)).train
    assert ordered_names(documents.labels) == names


def test_other_columns_and_odd_lines_do_not_matter(make_config, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes("\ufefftext,id,label\r\na,1,x\r\n\r\nb,second,y\r\n".encode())
    assert load(make_config, train_path=str(path)).train == Documents(["a", "b"], ["x", "y"], None)
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"label": 2}\n{"text": "\\ud83d half", "label": 1}')
    assert load(make_config, train_path=str(path)).train.texts == ["a", "", "? half"]


def test_a_text_may_be_a_book(make_config, tmp_path):
    limit = 1000
    csv.field_size_limit(limit)
    rows = [{"text": "word " * 100_000, "label": label} for label in "ab"]
    assert load(make_config, train_path=write(tmp_path / "data.csv", rows)).train.texts[0] == rows[0]["text"]
    assert csv.field_size_limit(131072) == limit


@pytest.mark.parametrize("label", [None, math.nan, ""])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_missing_label_names_its_row(make_config, tmp_path, suffix, label):
    filled = "b" if label == "" else 1.0
    rows = [{"text": "a", "label": filled}, {"text": "b", "label": label}, {"text": "c", "label": filled}]
    if suffix == ".csv" and label is not None and label != label:
        label = rows[1]["label"] = ""
    error = error_of(make_config, train_path=write(tmp_path / f"data{suffix}", rows))
    assert error.field == "data.label_column" and error.value == "label"
    assert "row 2" in str(error) and "1 such rows" in str(error)


def test_a_missing_client_names_its_row(make_config, write_rows):
    path = write_rows([{"text": "a", "label": 1, "user": "x"}, {"text": "b", "label": 2, "user": None}])
    error = error_of(make_config, train_path=path, client_column="user")
    assert error.field == "data.client_column" and "row 2" in str(error)


@pytest.mark.parametrize(
    "source, near",
    [("bbc-news", "'bbc_news'"), ("hub:", "'hub:NAME'"), ("files", "'file'"), ("x", "tfds:NAME")],
)
def test_unknown_source(make_config, source, near):
    error = error_of(make_config, source=source)
    assert error.field == "data.source" and error.value == source and near in str(error)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl"])
def test_files_that_cannot_be_read(make_config, tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    assert "no such file" in str(error_of(make_config, train_path=str(path)))
    path.write_bytes(b"")
    assert "no rows" in str(error_of(make_config, train_path=str(path)))
    path.write_bytes(b'text,label\n"a\xff\xfe,1\n')
    error = error_of(make_config, train_path=str(path))
    assert error.field == "data.train_path" and error.value == str(path)
    if suffix == ".parquet":
        assert "cannot be read as parquet" in str(error) and "replace the file" in str(error)
    else:
        assert "is not UTF-8" in str(error) and "save it as UTF-8" in str(error)
    good = write(tmp_path / f"good{suffix}", ROWS)
    assert error_of(make_config, train_path=good, test_path=str(path)).field == "data.test_path"


def test_paths_that_are_no_data_files(make_config, tmp_path):
    assert "give data.train_path=FILE" in str(error_of(make_config, train_path=""))
    assert ".parquet, .csv" in str(error_of(make_config, train_path="data.xlsx"))
    (tmp_path / "folder.csv").mkdir()
    assert "has no data files" in str(error_of(make_config, train_path=str(tmp_path / "folder.csv")))


def test_broken_rows_are_named(make_config, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\na,1\nb\n")
    assert "line 3 has 1 fields, not 2" in str(error_of(make_config, train_path=str(path)))
    path.write_text('text,label\na,1\nb,"2\nc,3\n')
    assert "cannot be read as csv" in str(error_of(make_config, train_path=str(path)))
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": \n')
    assert "line 2" in str(error_of(make_config, train_path=str(path)))
    path.write_text('{"text": "a", "label": 1}\n[1]\n')
    assert "row 2 is a list" in str(error_of(make_config, train_path=str(path)))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_a_file_of_no_rows(make_config, tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [], "label": []}), path)
    else:
        path.write_text("text,label\n" if suffix == ".csv" else "[]")
    error = error_of(make_config, train_path=str(path))
    assert error.field == "data.train_path" and "no rows" in str(error)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_a_missing_column_names_those_there_are(make_config, tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", ROWS)
    error = error_of(make_config, train_path=path, text_column="texts")
    assert error.field == "data.text_column" and error.value == "texts"
    assert "did you mean 'text'?" in str(error) and "'text', 'label', 'user'" in str(error)
    error = error_of(make_config, train_path=path, client_column="zzz")
    assert error.field == "data.client_column" and "did you mean" not in str(error)


def test_a_column_of_lists_is_no_text(make_config, tmp_path):
    path = write(tmp_path / "data.parquet", [{"text": ["a", "b"], "label": 1}])
    error = error_of(make_config, train_path=path)
    assert error.field == "data.text_column" and "row 1" in str(error) and "list" in str(error)


def test_one_label_is_not_enough(make_config, write_rows):
    path = write_rows([{"text": text, "label": "only"} for text in "abc"])
    error = error_of(make_config, train_path=path)
    assert error.field == "data.label_column" and "1 distinct label" in str(error)


def test_a_test_label_must_be_known(make_config, write_rows):
    train = write_rows([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    test = write_rows([{"text": "c", "label": "x"}, {"text": "d", "label": "z"}], "test.jsonl")
    error = error_of(make_config, train_path=train, test_path=test)
    assert error.field == "data.test_path" and error.value == test
    assert "'z'" in str(error) and "training has x, y" in str(error)
