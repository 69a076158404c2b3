"""Equal data have equal fingerprints, and each part its own."""

import dataclasses

import numpy as np
import pytest
from test_batches import DATA

from hfedmoe_jax.data import fingerprint

ROWS, SPLIT, TOKENIZER = "the texts or labels", "the split or the partition of the texts", "the tokenizer"


def changed(**parts):
    """Returns which fingerprints differ."""
    before, after = fingerprint(DATA), fingerprint(dataclasses.replace(DATA, **parts))
    return {what for what in before if before[what] != after[what]}


def test_equal_data_are_equal():
    copied = {name: np.array(values, order="F") for name, values in DATA.train.items()}
    assert changed(train=dict(reversed(copied.items()))) == set()


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("train", {name: values[::-1] for name, values in DATA.train.items()}, ROWS),
        ("test", {name: values[:1] for name, values in DATA.train.items()}, ROWS),
        ("label_names", ("a",), ROWS),
        ("client_train", DATA.client_train[::-1], SPLIT),
        ("client_holdout", (*DATA.client_holdout[:-1], np.arange(1)), SPLIT),
        ("client_names", ("a", "bc"), SPLIT),
        ("tokenizer_json", "{}", TOKENIZER),
    ],
)
def test_a_changed_part_shows(part, value, what):
    assert changed(**{part: value}) == {what}


def test_names_are_not_run_together():
    one, other = (
        fingerprint(dataclasses.replace(DATA, client_names=names)) for names in (("ab", "c"), ("a", "bc"))
    )
    assert one[SPLIT] != other[SPLIT]
