"""What a user gets wrong: exit code 2, one line that names field, value and remedy, nothing written."""

import re

import pytest
import tiny_run

from hfedmoe_jax.data import downloads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a good data file, train.jsonl, and with several bad ones."""
    folder = tmp_path_factory.mktemp("data")
    rows = tiny_run.texts(30)
    tiny_run.write_jsonl(folder / "train.jsonl", rows)
    tiny_run.write_jsonl(folder / "unseen.jsonl", [*rows[:2], {"text": "a poem", "label": "poetry"}])
    tiny_run.write_jsonl(folder / "unlabelled.jsonl", [*rows, {"text": "a poem"}])
    tiny_run.write_jsonl(folder / "one_label.jsonl", [row for row in rows if row["label"] == "law"])
    (folder / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    (folder / "broken.parquet").write_text("this is no parquet file")
    (folder / "ragged.csv").write_text("text,label\na,b\na,b,c\n")
    (folder / "latin.csv").write_bytes("text,label\nGrüße,b\n".encode("latin-1"))
    (folder / "empty.csv").write_text("")
    (folder / "notes.txt").write_text("text")
    (folder / "directory.csv").mkdir()
    return folder


def refusal(folder, tmp_path, extra=(), **fields) -> str:
    """Returns the line that refuses these fields; FOLDER in values and line is the folder of data files."""
    fields = {
        name: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
        for name, value in fields.items()
    }
    command = tiny_run.arguments(tmp_path / "a" / "run", folder / "train.jsonl", **fields)
    return tiny_run.refusal([*command, *extra], tmp_path).replace(str(folder), "FOLDER")


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("fl.algorithm", "hfedmo", "='hfedmo': unknown name; did you mean 'hfedmoe'?"),
        ("fl.clients", 500, "=500: there are only 18 training documents; use at most 18 clients"),
        ("fl.clients_per_round", 5, "=5: above fl.clients=4; sample at most all clients"),
        ("fl.dropout_probability", 1.5, "=1.5: must be at least 0 and below 1; use"),
        ("fl.rounds", -1, "=-1: must be at least 0 and at most 1,000,000,000; use e.g. 40"),
        ("fl.score", "frequncy", "='frequncy': unknown name; did you mean 'frequency'?"),
        ("seed", -1, "=-1: must be at least 0 and at most 4,294,967,295; "),
        ("importance.lam", 2.0, "=2.0: must be at least 0 and at most 1; "),
        ("partition.alpha", 0.0, "=0.0: must be above 0 and at most 1e+09; use e.g. 0.3"),
        ("partition.alpha", -0.5, "=-0.5: must be above 0"),
        ("partition.name", "dirichlett", "='dirichlett': unknown name; did you mean 'dirichlet'?"),
        ("budget.fraction", 0.1, "=0.1: is 0.6 of one expert; use at least 0.1667, one of 6 experts"),
        ("budget.fraction", -1.0, "=-1.0: must be at least 0 and at most 1; "),
        ("client.learning_rate", 0.0, "=0.0: must be at least 1e-37 and at most "),
        ("server.learning_rate", -1.0, "=-1.0: must be at least 0 and at most "),
        ("client.optimizer", "adm", "='adm': unknown name; did you mean 'adam'?"),
        ("model.num_heads", 3, "=3: does not divide model.width=8; "),
        ("model.top_k", 4, "=4: above model.num_experts=3; "),
        ("data.source", "bbcnews", "='bbcnews': unknown name; did you mean 'bbc_news'?"),
        ("data.tokenizer", "bpee", "='bpee': unknown name; did you mean 'bpe'?"),
        ("data.vocab_size", 10, "=10: too small for a wordpiece tokenizer; use at least 64"),
        ("data.train_path", "", "='': data.source=file needs a file; "),
        ("data.train_path", "FOLDER/none.jsonl", "='FOLDER/none.jsonl': no such file; give the path"),
        ("data.train_path", "FOLDER/directory.csv", "='FOLDER/directory.csv': the folder has no data files"),
        ("data.train_path", "FOLDER/notes.txt", "='FOLDER/notes.txt': unknown kind of file; use one of .par"),
        ("data.train_path", "FOLDER/broken.jsonl", "='FOLDER/broken.jsonl': cannot be read as jsonl: line 2"),
        ("data.train_path", "FOLDER/broken.parquet", "='FOLDER/broken.parquet': cannot be read as parquet: "),
        ("data.train_path", "FOLDER/ragged.csv", "='FOLDER/ragged.csv': cannot be read as csv: line 3 has 3"),
        ("data.train_path", "FOLDER/latin.csv", "='FOLDER/latin.csv': is not UTF-8: byte 0xfc is of"),
        ("data.train_path", "FOLDER/empty.csv", "='FOLDER/empty.csv': there are no rows; "),
        ("data.test_path", "FOLDER/none.csv", "='FOLDER/none.csv': no such file; "),
        ("data.test_path", "FOLDER/unseen.jsonl", "='FOLDER/unseen.jsonl': the test label 'poetry' is in no"),
        ("data.text_column", "txt", "='txt': no such column in FOLDER/train.jsonl; did you mean 'text'?"),
        ("data.label_column", "topic", "='topic': no such column in FOLDER/train.jsonl; it has 'text', 'la"),
        ("data.text_column", "label", "='label': it is data.label_column too, so the texts would be the ans"),
        ("data.client_column", "owner", "='owner': no such column in FOLDER/train.jsonl; "),
    ],
)
def test_a_bad_value_is_refused_by_name(folder, tmp_path, field, value, line):
    fields = {"partition__name": "dirichlet", field.replace(".", "__"): value}
    assert refusal(folder, tmp_path, **fields).startswith(f"error: {field}{line}")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("unlabelled", "data.label_column='label': row 31 of FOLDER/unlabelled.jsonl has no label (1 such"),
        ("one_label", "data.label_column='label': the training documents have 1 distinct label, a class"),
    ],
)
def test_a_file_without_labels_to_learn_is_refused(folder, tmp_path, file, line):
    found = refusal(folder, tmp_path, data__train_path=f"FOLDER/{file}.jsonl")
    assert found.startswith(f"error: {line}")


def test_an_unknown_field_is_refused_with_the_nearest(folder, tmp_path):
    line = refusal(folder, tmp_path, extra=["--config.fl.round=3"])
    assert line == "error: fl.round='3': unknown config field; did you mean fl.rounds?"


def test_a_natural_partition_needs_the_owners(folder, tmp_path):
    line = refusal(folder, tmp_path, partition__name="column")
    assert line.startswith("error: data.client_column='': partition.name=column needs to know which client")


def test_a_device_below_one_expert_says_how_many_bytes_it_lacks(folder, tmp_path):
    """Given the bytes that are missing, less one, the next message says that one is missing."""
    fields = {"budget__fraction": 0.0, "devices__phone__memory_bytes": 5000.0}
    line = refusal(folder, tmp_path, **fields)
    start = r"error: devices\.phone\.memory_bytes=([\d.]+): too small by ([\d,]+) bytes .*; give more memory"
    match = re.match(start, line)
    assert match and match[1] == "5000.0"
    fields["devices__phone__memory_bytes"] += float(match[2].replace(",", "")) - 1
    assert re.match(start, refusal(folder, tmp_path, **fields))[2] == "1"


@pytest.mark.parametrize("source", ["hub:ag_news", "tfds:ag_news_subset"])
def test_a_data_set_out_of_reach_says_what_to_do(folder, tmp_path, tmp_path_factory, monkeypatch, source):
    monkeypatch.setattr(downloads, "_answers", lambda url: False)
    cache = str(tmp_path_factory.mktemp("cache"))
    line = refusal(folder, tmp_path, data__source=source, data__cache_dir=cache)
    assert line.startswith(f"error: data.source='{source}': cannot be loaded: ")
    assert "does not answer" in line and "connect to the network" in line and "data.source=file" in line


def test_a_workdir_that_is_a_file_or_in_use_is_refused_and_left_alone(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    for name, problem in (("file", "is no directory that can be written"), ("used", "holds other files")):
        screen = tiny_run.run_main(tiny_run.arguments(tmp_path / name, folder / "train.jsonl"))
        (line,) = screen.err.splitlines()
        assert screen.code == 2 and line.startswith(f"error: workdir='{tmp_path / name}': {problem}")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "used"]


def test_the_program_itself_exits_with_2_and_no_traceback(folder, tmp_path):
    command = tiny_run.arguments(tmp_path / "run", folder / "train.jsonl", fl__clients=500)
    screen = tiny_run.run_process(command)
    line = "error: fl.clients=500: there are only 18 training documents; use at most 18 clients\n"
    assert screen == (2, "", line)
    assert list(tmp_path.iterdir()) == []
