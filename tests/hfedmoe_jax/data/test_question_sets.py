"""The six question sets as files and as the hub publishes them give the same rows."""

import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hfedmoe_jax.data.federated import load_federated
from hfedmoe_jax.data.sources import load_source
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks.multiple_choice import prepare

DOCS = (pathlib.Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
LISTED = r"{}\n{choices}\nAnswer:"
TEXT = datasets.Value("string")
KEYED = dict(choices=datasets.Sequence({"text": TEXT, "label": TEXT}), answerKey=TEXT)


def question(number):
    """Returns a subject, a question, three to five choices and the right one's number."""
    choices = [f"choice {number} {'long ' * place}" + "xyzuv"[place] for place in range(3 + number % 3)]
    return f"topic {number % 2}", f"What is {number}?", choices, number % len(choices)


def keyed(number, column):
    """Returns a row of ARC, OpenBookQA or CommonsenseQA on the hub; some name their choices 1, 2, ..."""
    _, text, choices, answer = question(number)
    names = "12345" if number % 4 == 3 else "ABCDE"
    return {
        column: text,
        "choices": {"text": choices, "label": list(names[: len(choices)])},
        "answerKey": names[answer],
    }


def listed(number):
    """Returns a row of the files with the columns question, choices and answer."""
    _, text, choices, answer = question(number)
    return dict(question=text, choices=choices, answer=answer)


def mmlu(number):
    subject, text, choices, answer = question(number)
    return dict(question=text, subject=subject, choices=choices, answer=answer % 3)


def hellaswag(number):
    subject, text, choices, answer = question(number)
    return dict(activity_label=subject, ctx=text, endings=choices, label=str(answer))


def piqa(number):
    _, text, choices, answer = question(number)
    return dict(goal=text, sol1=choices[0], sol2=choices[1], label=answer % 2)


class Published(NamedTuple):
    """A set: its rows as functions of a number, in files and on the hub, and the `data` fields for each."""

    of_file: Callable[[int], dict]
    of_hub: Callable[[int], dict]
    file_fields: dict
    hub_fields: dict
    types: dict
    no_answer: Any


def fields(text, choices, label, **more):
    return dict(text_column=text, choices_column=choices, label_column=label) | more


ANSWERED = fields("question", "choices", "answer")
HELLASWAG = fields("{activity_label}: {ctx}", "endings", "label", prompt="{}")
LETTERED = dict(prompt=r"Question: {}\n{choices}\nAnswer:")
SETS = {
    "arc": Published(
        listed,
        lambda number: keyed(number, "question"),
        ANSWERED,
        fields("question", "choices", "answerKey", subset="ARC-Easy"),
        dict(question=TEXT, **KEYED),
        "",
    ),
    "openbookqa": Published(
        listed,
        lambda number: keyed(number, "question_stem"),
        ANSWERED | dict(prompt="{}"),
        fields("question_stem", "choices", "answerKey", subset="main", prompt="{}"),
        dict(question_stem=TEXT, **KEYED),
        "",
    ),
    "commonsenseqa": Published(
        listed,
        lambda number: keyed(number, "question"),
        ANSWERED | LETTERED,
        fields("question", "choices", "answerKey") | LETTERED,
        dict(question=TEXT, **KEYED),
        "",
    ),
    "mmlu": Published(
        mmlu,
        mmlu,
        ANSWERED | dict(prompt=LISTED),
        ANSWERED | dict(prompt=LISTED, subset="all"),
        dict(
            question=TEXT,
            subject=TEXT,
            choices=datasets.Sequence(TEXT),
            answer=datasets.ClassLabel(names=list("ABCD")),
        ),
        -1,
    ),
    "piqa": Published(
        piqa,
        piqa,
        fields("goal", "sol1,sol2", "label"),
        fields("goal", "sol1,sol2", "label"),
        dict(goal=TEXT, sol1=TEXT, sol2=TEXT, label=datasets.ClassLabel(names=["0", "1"])),
        -1,
    ),
    "hellaswag": Published(
        lambda number: hellaswag(number) | dict(label=question(number)[3]),
        hellaswag,
        HELLASWAG,
        HELLASWAG,
        dict(activity_label=TEXT, ctx=TEXT, endings=datasets.Sequence(TEXT), label=TEXT),
        "",
    ),
}


def save_on_hub(folder, splits, published):
    """Writes a data set as the hub's repositories hold them, and returns the `data` fields that name it.

    These are a card and parquet files by configuration.
    """
    name = published.hub_fields.get("subset", "default")
    (folder / "hub" / name).mkdir(parents=True)
    card = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    for split, rows in splits.items():
        dataset = datasets.Dataset.from_list(rows, features=datasets.Features(published.types))
        dataset.to_parquet(folder / "hub" / name / f"{split}-00000-of-00001.parquet")
        card.append(f"  - split: {split}\n    path: {name}/{split}-*")
    (folder / "hub" / "README.md").write_text("\n".join([*card, "---"]))
    return published.hub_fields | dict(source=f"hub:{folder / 'hub'}", cache_dir=str(folder / "cache"))


@pytest.fixture
def both(make_config, tmp_path):
    """Returns a function that writes a set both ways and gives its configs by path and by name."""

    def make(name, splits):
        published, paths = SETS[name], {}
        for split, numbers in splits.items():
            path = tmp_path / f"{split}.parquet"
            table = pyarrow.Table.from_pylist(list(map(published.of_file, numbers)))
            pyarrow.parquet.write_table(table, path)
            paths[f"{split}_path"] = str(path)
        rows = {split: list(map(published.of_hub, numbers)) for split, numbers in splits.items()}
        by_name = save_on_hub(tmp_path, rows, published)
        common = dict(tokenizer="bpe", seq_len=48, partition={"name": "iid"})
        return make_config(**common, **published.file_fields, **paths), make_config(**common, **by_name)

    return make


@pytest.mark.parametrize("name", SETS)
def test_rows_by_path_and_by_name_are_the_same(name, both):
    splits = dict(train=range(24), test=range(100, 108))
    by_path, by_name = (load_federated(config, prepare) for config in both(name, splits))
    assert by_path.tokenizer_json == by_name.tokenizer_json
    assert by_path.label_names == by_name.label_names
    for part in ("train", "validation", "test"):
        rows, others = getattr(by_path, part), getattr(by_name, part)
        assert set(rows) == set(others) and len(rows["labels"])
        for column, values in rows.items():
            np.testing.assert_array_equal(values, others[column], err_msg=column)


@pytest.mark.parametrize("name", SETS)
def test_the_documented_fields_are_those_of_this_test(name):
    (line,) = re.findall(rf"^\| {name} \|.*\|$", DOCS, re.MULTILINE | re.IGNORECASE)
    _, _, both, columns, by_name, _ = line.split("|")
    shared, named = (dict(re.findall(r"`data\.(\w+)='?(.*?)'?`", cell)) for cell in (both, by_name))
    columns_used = {field: named.get(field, shared.get(field, ANSWERED[field])) for field in ANSWERED}
    for field in ("prompt", "subset"):
        assert SETS[name].hub_fields.get(field) == (shared | named).get(field)
    assert {field: SETS[name].hub_fields[field] for field in ANSWERED} == columns_used
    assert ANSWERED | shared | SETS[name].file_fields == ANSWERED | shared
    assert set(SETS[name].of_file(0)) - {"subject"} == set(columns.strip().split(", "))


@pytest.mark.parametrize("name", SETS)
def test_the_right_answer_is_the_one_the_row_names(name, both):
    for config in both(name, dict(train=range(12))):
        documents = load_source(config.data).train
        assert documents.choices is not None
        for number, (text, choices, label) in enumerate(
            zip(documents.texts, documents.choices, documents.labels, strict=True)
        ):
            _, asked, expected, answer = question(number)
            count = {"piqa": 2, "mmlu": 3}.get(name, len(expected))
            assert choices[int(label)] == expected[answer % count] and text.endswith(asked)
            assert text.startswith("topic") == (name == "hellaswag")


@pytest.mark.parametrize("name", SETS)
def test_a_hub_test_split_without_answers_is_told_and_one_is_cut(name, make_config, tmp_path):
    published = SETS[name]
    rows = list(map(published.of_hub, range(12)))
    unanswered = {published.hub_fields["label_column"]: published.no_answer}
    by_name = save_on_hub(tmp_path, dict(train=rows, test=[row | unanswered for row in rows[:3]]), published)
    corpus = load_source(make_config(**by_name).data)
    assert corpus.test is None and "the split test has no labels" in corpus.notes[0]
    with pytest.raises(InputError, match=r"row 1 of .* \(test\) has no label \(3 such rows") as error:
        load_source(make_config(**by_name, test_split="test").data)
    assert error.value.field == "data.label_column" and "leave the row out" in str(error.value)
