"""Multiple-choice questions from files: lists, several columns, labels as numbers, letters and names."""

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_jax.data.choices import LETTERS, read_choices
from hfedmoe_jax.data.federated import load_federated
from hfedmoe_jax.data.files import read_documents
from hfedmoe_jax.data.sources import load_source
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks.multiple_choice import prepare

COLUMNS = dict(text_column="question", choices_column="choices", label_column="answer")


def row(choices, answer, question="Why?"):
    return dict(question=question, choices=choices, answer=answer)


def read(make_config, path, **columns):
    return read_documents(make_config(train_path=str(path), **(COLUMNS | columns)).data, "train_path")


def test_lists_and_numbers_letters_or_names_of_the_right_choice(make_config, write_rows):
    """The last two as ARC has them on the hub: with names of their own, which may be numbers from 1."""
    rows = [
        row(["a", "b"], 1),
        row(["a", "b", "c"], "C"),
        row({"text": ["a", "b"], "label": ["A", "B"]}, "B"),
        row({"text": ["a", "b"], "label": ["1", "2"]}, "1"),
    ]
    documents = read(make_config, write_rows(rows))
    assert documents.choices == [["a", "b"], ["a", "b", "c"], ["a", "b"], ["a", "b"]]
    assert documents.labels == ["1", "2", "1", "0"] and documents.texts == ["Why?"] * 4
    taken = documents.take([2, 1])
    assert taken.choices == [["a", "b"], ["a", "b", "c"]] and taken.labels == ["1", "2"]


def test_several_columns_a_choice_each_and_missing_ones_at_the_end(make_config, tmp_path):
    rows = [
        dict(goal="x", sol1="a", sol2="b", sol3="c", label=2),
        dict(goal="y", sol1="d", sol2="e", label=0),
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("goal,sol1,sol2,sol3,label\nx,a,b,c,2\ny,d,e,,0\n")
    columns = dict(text_column="goal", choices_column="sol1, sol2,sol3", label_column="label")
    for name in ("rows.parquet", "rows.csv"):
        documents = read(make_config, tmp_path / name, **columns)
        assert documents.choices == [["a", "b", "c"], ["d", "e"]] and documents.labels == ["2", "0"]


def test_all_sets_are_filled_up_to_the_same_number_of_choices(make_config, write_rows):
    train = write_rows([row(["a", "b"], 0), row(["a", "b"], 1, "How?")])
    test = write_rows([row(["a", "b", "c"], 1)], "test.jsonl")
    config = make_config(train_path=train, test_path=test, **COLUMNS)
    corpus = load_source(config.data)
    assert corpus.train.choices == [["a", "b", ""]] * 2
    assert corpus.test is not None and corpus.test.choices == [["a", "b", "c"]]


def test_places_that_training_never_has_right_are_no_error(make_config, write_rows):
    train = write_rows([row(["a", "b"], 0, f"Why {number}?") for number in range(20)])
    test = write_rows([row(["a", "b", "c"], 2)], "test.jsonl")
    fields = dict(train_path=train, test_path=test, tokenizer="bpe", partition={"name": "iid"})
    data = load_federated(make_config(**fields, **COLUMNS), prepare)
    assert data.label_names == ("0", "1", "2")
    assert not data.train["labels"].any() and data.test["labels"].tolist() == [2]


@given(data=st.data(), keys=st.lists(st.sampled_from([*"ABCDE1234567", "a"]), min_size=2, unique=True))
def test_a_label_finds_its_choice_by_name_number_or_letter(data, keys):
    """Names of the row itself count alone, whatever numbers or letters they are."""
    texts = [f"text {key}" for key in keys]
    answer = data.draw(st.integers(0, len(keys) - 1))

    def right(choices, label):
        (each,), (number,) = read_choices([[choices]], [label], ("choices", "answer"), "a file")
        return each[int(number)]

    assert right({"text": texts, "label": keys}, keys[answer]) == texts[answer]
    assert right(texts, str(answer)) == right(texts, LETTERS[answer]) == texts[answer]
    strange = data.draw(st.sampled_from([*"ABCDE01234567", "a", ""]).filter(lambda key: key not in keys))
    with pytest.raises(InputError, match="is none of its"):
        right({"text": texts, "label": keys}, strange)


@pytest.mark.parametrize(
    ("bad", "field", "problem"),
    [
        (row("ab", 0), "data.choices_column", "holds a str, not a list"),
        (row(["a"], 0), "data.choices_column", "fewer than two choices"),
        (row(["a", "", "b"], 0), "data.choices_column", "or an empty one"),
        (row(["a", "b"], 2), "data.label_column", "'2' in row 2 of .* is none of its 2 choices"),
        (row({"text": ["a", "b"], "label": [1, 2]}, 0), "data.label_column", "row 2 .* its labels, 1, 2"),
        (row({"text": ["a", "b"], "label": ["A", "A"]}, "A"), "data.label_column", "none of its 2 choices"),
        (row({"text": ["a", "b"]}, 0), "data.choices_column", "holds a dict, not a list"),
        (row(["a", "b"], -1), "data.label_column", r"row 2 of .* has no label \(1 such rows"),
        (row(["a", "b"], "right"), "data.label_column", "'right' in row 2 .* from 0, or letters from A"),
    ],
)
def test_what_is_no_question_is_told_with_its_row(bad, field, problem, make_config, write_rows):
    with pytest.raises(InputError, match=problem) as error:
        read(make_config, write_rows([row(["a", "b"], 0), bad]))
    assert error.value.field == field and "\n" not in str(error.value)
