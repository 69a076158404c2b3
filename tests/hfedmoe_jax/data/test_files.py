"""Files as people have them: compressed, separated otherwise, without a header, many, of other encodings."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from hfedmoe_jax.data import Documents, load_federated, load_source
from hfedmoe_jax.data.facts import alike
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks import classification

ROWS = [("Zürich, snow", "b"), ("plain; text", "a"), ("", "b")]
EXPECTED = Documents([text for text, _ in ROWS], [label for _, label in ROWS], None)


def load(make_config, path, **data):
    return load_source(make_config(train_path=str(path), **data).data).train


def error_of(make_config, path, **data):
    with pytest.raises(InputError) as caught:
        load(make_config, path, **data)
    assert "\n" not in str(caught.value)
    return caught.value


def separated(separator, header=True):
    lines = [("text", "label")] * header + ROWS
    return "".join(f'"{text}"{separator}"{label}"\n' for text, label in lines).encode()


def as_jsonl(rows=ROWS):
    return "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows).encode()


NUMBERED = {"header": False, "text_column": "1", "label_column": "2"}


@pytest.mark.parametrize(
    "name, content, fields",
    [
        ("data.tsv", separated("\t"), {}),
        ("data.csv", separated(";"), {"separator": ";"}),
        ("data.csv", separated("\t"), {"separator": "\\t"}),
        ("data.csv.gz", gzip.compress(separated(","), mtime=0), {}),
        ("data.TSV.GZ", gzip.compress(separated("\t"), mtime=0), {}),
        ("data.jsonl.gz", gzip.compress(as_jsonl(), mtime=0), {}),
        (
            "data.csv",
            separated(",", header=False),
            {"header": False, "text_column": "1", "label_column": "2"},
        ),
    ],
)
def test_kinds_of_files(make_config, tmp_path, name, content, fields):
    (tmp_path / name).write_bytes(content)
    assert load(make_config, tmp_path / name, **fields) == EXPECTED


@pytest.mark.parametrize("separator", ";|\t^~ ")
@pytest.mark.parametrize("quote", ["", '"'])
def test_another_separator_is_named(make_config, tmp_path, separator, quote):
    (tmp_path / "data.csv").write_bytes(separated(separator).replace(b'"', quote.encode()))
    error = error_of(make_config, tmp_path / "data.csv")
    assert error.field == "data.separator" and error.value == ","
    assert f"data.separator={separator!r}" in str(error)
    (tmp_path / "data.csv").write_bytes(separated(separator))
    assert load(make_config, tmp_path / "data.csv", separator=separator) == EXPECTED


def test_a_missing_header_is_named(make_config, tmp_path):
    (tmp_path / "data.csv").write_bytes(separated(",", header=False))
    error = error_of(make_config, tmp_path / "data.csv")
    assert error.field == "data.text_column" and "data.header=False" in str(error)


@pytest.mark.parametrize("separator", [",,", '"', "\n"])
def test_separators_that_cannot_be(make_config, tmp_path, separator):
    (tmp_path / "data.csv").write_bytes(separated(","))
    assert error_of(make_config, tmp_path / "data.csv", separator=separator).field == "data.separator"


@pytest.mark.parametrize("given", ["", "/*.parquet", "/part-?.parquet"])
def test_several_files_are_read_in_order(make_config, tmp_path, given):
    for number in (1, 0):
        rows = [{"text": f"{number} {label}", "label": label} for label in "ab"]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"part-{number}.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".part-0.parquet.crc").write_text("x")
    assert load(make_config, f"{tmp_path}{given}").texts == ["0 a", "0 b", "1 a", "1 b"]


def test_files_that_do_not_go_together(make_config, tmp_path):
    (tmp_path / "a.csv").write_bytes(separated(","))
    (tmp_path / "b.jsonl").write_bytes(as_jsonl())
    assert "several kinds: .csv, .jsonl" in str(error_of(make_config, tmp_path))
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.csv").write_text("body,label\nx,1\n")
    error = error_of(make_config, tmp_path)
    assert error.field == "data.text_column" and "c.csv" in str(error)


def test_an_empty_file_among_others_does_not_matter(make_config, tmp_path):
    (tmp_path / "a.csv").write_bytes(separated(","))
    (tmp_path / "b.csv").write_text("text,label\n")
    (tmp_path / "c.csv").write_text("")
    assert load(make_config, tmp_path) == EXPECTED


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_column_twice_is_refused_by_name(make_config, tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        columns = [["a", "b"], ["c", "d"], ["x", "y"]]
        table = pyarrow.table([pyarrow.array(values) for values in columns], names=["text", "text", "label"])
        pyarrow.parquet.write_table(table, path)
    elif suffix == "csv":
        path.write_text("text,text,label\na,c,x\nb,d,y\n")
    else:
        path.write_text('{"text": "a", "text": "c", "label": "x"}')
    error = error_of(make_config, path)
    assert "'text'" in str(error) and ("columns of" in str(error) or "given twice" in str(error))


@pytest.mark.parametrize(
    "encoding, part",
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("cp1252", "perhaps cp1252")],
)
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.csv.gz"])
def test_other_encodings_are_told(make_config, tmp_path, encoding, part, name):
    content = (as_jsonl() if "json" in name else separated(",")).decode()
    if "json" in name:
        content = content.replace("\\u00fc", "ü")
    content = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    error = error_of(make_config, tmp_path / name)
    assert error.field == "data.train_path" and part in str(error) and "save it as UTF-8" in str(error)


def test_several_text_columns_become_one(make_config, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('title,"body, long",label\nA,b,1\n,c,2\n')
    path2 = tmp_path / "data2.csv"
    path2.write_text("title,body,label\nA,b,1\n,c,2\n")
    assert load(make_config, path2, text_column="title, body").texts == ["A\nb", "c"]
    assert load(make_config, path, text_column="body, long").texts == ["b", "c"]
    error = error_of(make_config, path2, text_column="title,bodi")
    assert error.field == "data.text_column" and error.value == "bodi" and "'body'" in str(error)


def test_a_text_is_made_of_columns_in_braces(make_config, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("title,body,{odd},label\nA{body},b,x,1\n,c,y,2\n")
    assert load(make_config, path, text_column=r"{title}:\n{body}").texts == ["A{body}:\nb", ":\nc"]
    assert load(make_config, path, text_column="{body}{body}").texts == ["bb", "cc"]
    assert load(make_config, path, text_column="{odd}").texts == ["x", "y"]
    error = error_of(make_config, path, text_column="On {titel}")
    assert error.field == "data.text_column" and "did you mean 'title'?" in str(error)


@pytest.mark.parametrize("text_column", ["label", "text,label", "{text}: {label}"])
def test_the_label_is_no_text(make_config, tmp_path, text_column):
    (tmp_path / "data.csv").write_bytes(separated(","))
    error = error_of(make_config, tmp_path / "data.csv", text_column=text_column)
    assert error.field == "data.text_column" and "data.label_column" in str(error)


def test_a_validation_file_of_its_own(make_config, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_bytes(as_jsonl([(f"{name} {n}", "ab"[n % 2]) for n in range(9)]))
    config = make_config(
        train_path=str(tmp_path / "train.jsonl"), validation_path=str(tmp_path / "validation.jsonl")
    )
    corpus = load_source(config.data)
    assert corpus.test is None and corpus.validation.texts == [f"validation {n}" for n in range(9)]


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b', "label": 1}'])
def test_json_that_python_cannot_hold(make_config, tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    assert error_of(make_config, tmp_path / "data.json").field == "data.train_path"


def test_a_damaged_gz_is_told(make_config, tmp_path):
    whole = gzip.compress(separated(",") * 50, mtime=0)
    for name, content in (("cut", whole[:-20]), ("plain", separated(","))):
        path = tmp_path / f"{name}.csv.gz"
        path.write_bytes(content)
        assert "cannot be read as csv" in str(error_of(make_config, path))


def test_labels_that_differ_in_case_or_spaces_are_alike():
    names = ["pos", "pos ", "POS", "neg", "Neg", " neg", "neutral", "ﬁne", "fine"]
    groups = {frozenset(group) for group in alike(names)}
    assert groups == {
        frozenset({"pos", "pos ", "POS"}),
        frozenset({"neg", "Neg", " neg"}),
        frozenset({"ﬁne", "fine"}),
    }


@pytest.mark.parametrize("given", ["test_path", "validation_path"])
def test_a_set_of_which_nothing_is_left_is_refused(make_config, write_rows, given):
    """The training file as a test or validation set; then one file as both of them."""
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    train = write_rows(rows)
    with pytest.raises(InputError, match=r"data\.train_path=.*: every text of it is in another of the given"):
        load_federated(make_config(train_path=train, **{given: train}), classification.prepare)
    both = write_rows([{"text": f"other {i}", "label": "ab"[i % 2]} for i in range(9)], "both.jsonl")
    with pytest.raises(InputError, match=r"data\.validation_path=.*: every text of it is in another"):
        config = make_config(train_path=train, validation_path=both, test_path=both)
        load_federated(config, classification.prepare)
