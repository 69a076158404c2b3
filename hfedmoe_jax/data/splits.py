"""Which document is in which split, so that no text is in two of them.

A text and all its copies are in the same split, so nothing is left out for copies in the training file.
Where a validation or test set is given, what training has of it would leak, and is left out.

Axes: D documents, G distinct texts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import Corpus, Documents, ordered_names
from hfedmoe_jax.data.sources import check_labels
from hfedmoe_jax.errors import InputError

# One each for training, validation and test.
MINIMUM_TO_SPLIT = 3
TRAIN, VALIDATION, TEST = range(3)


class Splits(NamedTuple):
    """The documents of each split, in the order of their source.

    Attributes:
      left_out: how many documents were left out so that no text is in two splits, by the reason.
      moved: how many texts were drawn for another split and train, because a label or an owner had no other.
    """

    train: Documents
    validation: Documents
    test: Documents
    left_out: dict[str, int]
    moved: int


def split_corpus(corpus: Corpus, config: ConfigDict, rng: np.random.Generator) -> Splits:
    """Returns the splits of a corpus; a set that it does not give is cut from its training documents.

    Every label, and where owners are known every owner, has at least one training document.

    Args:
      corpus: of `load_source`.
      config: `data.validation_fraction` and `data.test_fraction` are read; other fields are for messages.
      rng: the source of all chance.

    Raises:
      InputError: a fraction is out of range, too few documents, a label that training does not have, or a set
        whose every text is in another one too.
    """
    corpus, left_out = without_leaks(corpus)
    check_left(corpus, config.data)
    check_labels(corpus, config.data)
    documents = corpus.train
    first = first_copies(documents.texts)
    distinct, text_of = np.unique(first, return_inverse=True)
    split_of_text, moved = _cut(corpus, distinct, text_of, config, rng)
    split_of = split_of_text[text_of]
    parts = [documents.take(np.flatnonzero(split_of == split)) for split in (TRAIN, VALIDATION, TEST)]
    return Splits(
        train=parts[TRAIN],
        validation=parts[VALIDATION] if corpus.validation is None else corpus.validation,
        test=parts[TEST] if corpus.test is None else corpus.test,
        left_out=left_out,
        moved=moved,
    )


def first_copies(texts: Sequence[str]) -> Int64[np.ndarray, " D"]:
    """Returns for each text the index of its first copy.

    >>> first_copies(["a", "b", "a"]).tolist()
    [0, 1, 0]
    """
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, index) for index, text in enumerate(texts)], np.int64)


def without_leaks(corpus: Corpus) -> tuple[Corpus, dict[str, int]]:
    """Leaves out what would be in two splits: training documents first, then those of validation.

    An owner whose every text is in a given set keeps its first one, which that set then goes without.

    Returns:
      The corpus, and how many documents were left out by the reason.
    """
    sets = {"validation": corpus.validation, "test": corpus.test}
    given = {name: part for name, part in sets.items() if part is not None}
    texts_of = {name: set(part.texts) for name, part in given.items()}
    reserved = set().union(*texts_of.values())
    spared = _only_texts(corpus.train, reserved)
    left_out: dict[str, int] = {}

    def without(part: Documents, texts: set[str], reason: str) -> Documents:
        kept = [index for index, text in enumerate(part.texts) if text not in texts]
        if len(kept) < len(part.texts):
            left_out[reason] = len(part.texts) - len(kept)
        return part.take(kept)

    for name in texts_of:
        given[name] = without(given[name], spared, f"{name}: the only text of an owner in training")
    if len(texts_of) == 2:
        given["validation"] = without(
            given["validation"], texts_of["test"], "validation: in the test set too"
        )
    where = " or ".join(texts_of)
    train = without(corpus.train, reserved - spared, f"training: in the {where} set too")
    return corpus._replace(train=train, **given), left_out


def check_left(corpus: Corpus, data: ConfigDict) -> None:
    """Raises InputError for a set of which `without_leaks` left nothing."""
    for name, part in (("train", corpus.train), ("validation", corpus.validation), ("test", corpus.test)):
        if part is not None and not part.texts:
            field = f"{name}_path" if data.source == "file" else f"{name}_split"
            problem = "every text of it is in another of the given sets too"
            raise InputError(f"data.{field}", data[field], problem, "give sets without common texts")


def _only_texts(train: Documents, reserved: set[str]) -> set[str]:
    """Returns a text of each owner that has reserved ones only."""
    if train.clients is None:
        return set()
    first = {owner: text for owner, text in zip(reversed(train.clients), reversed(train.texts), strict=True)}
    free = {owner for owner, text in zip(train.clients, train.texts, strict=True) if text not in reserved}
    return {text for owner, text in first.items() if owner not in free}


def _cut(
    corpus: Corpus,
    distinct: Int64[np.ndarray, " G"],
    text_of: Int64[np.ndarray, " D"],
    config: ConfigDict,
    rng: np.random.Generator,
) -> tuple[Int64[np.ndarray, " G"], int]:
    """Returns the split of each text, and how many were moved to training."""
    data, documents = config.data, corpus.train
    fractions = {
        "validation": data.validation_fraction if corpus.validation is None else 0.0,
        "test": data.test_fraction if corpus.test is None else 0.0,
    }
    if corpus.test is None and data.test_fraction == 0:
        raise bad_fraction(config, "test_fraction", "must be above 0 where there is no separate test set")
    if sum(fractions.values()) >= 1:
        problem = f"with validation_fraction={data.validation_fraction} nothing is left to train on"
        raise bad_fraction(config, "test_fraction", problem)
    names = ordered_names(documents.labels)
    position = {name: index for index, name in enumerate(names)}
    labels = np.array([position[documents.labels[index]] for index in distinct], np.int32)
    split_of = np.full(len(distinct), TRAIN)
    _, *cut = split_documents(labels, fractions["validation"], fractions["test"], rng)
    for split, texts in zip((VALIDATION, TEST), cut, strict=True):
        split_of[texts] = split
    drawn = split_of.copy()
    for owned in (documents.labels, documents.clients or []):
        split_of[_needed(owned, text_of, split_of == TRAIN)] = TRAIN
    for split, (name, fraction) in enumerate(fractions.items(), start=VALIDATION):
        if fraction > 0 and not (split_of == split).any():
            raise _nothing_to_cut(name, bool((drawn == split).any()), documents, len(distinct), config)
    return split_of, int((drawn != split_of).sum())


def _needed(
    names: Sequence[str], text_of: Int64[np.ndarray, " D"], trains: Bool[np.ndarray, " G"]
) -> list[int]:
    """Returns a text of each name, a label or an owner, that has none among those that train."""
    texts_of: dict[str, list[int]] = {}
    for name, text in zip(names, text_of.tolist(), strict=False):
        texts_of.setdefault(name, []).append(text)
    trains, needed = trains.copy(), []
    for texts in texts_of.values():
        if not trains[texts].any():
            trains[texts[0]] = True
            needed.append(texts[0])
    return needed


def _nothing_to_cut(
    name: str, was_drawn: bool, documents: Documents, num_texts: int, config: ConfigDict
) -> InputError:
    """Returns the error for a split that would be empty, blamed on the field that is the likely cause."""
    data, num_labels = config.data, len(set(documents.labels))
    if was_drawn:
        problem = f"every document is the only one of its label or owner, so the {name} split is empty"
        return bad_fraction(config, f"{name}_fraction", problem, f"add documents or give data.{name}_path")
    if 2 * num_texts <= len(documents.texts):
        problem = f"it has only {num_texts} distinct texts in {len(documents.texts)} rows"
        return InputError("data.text_column", data.text_column, problem, "name the column of the texts")
    if 2 * num_labels > num_texts:
        problem = f"it has {num_labels} distinct labels for {num_texts} texts"
        return InputError("data.label_column", data.label_column, problem, "name the column of the labels")
    problem = f"no label has {MINIMUM_TO_SPLIT} documents, so none can be cut"
    return bad_fraction(config, f"{name}_fraction", problem, f"add documents or give data.{name}_path")


def split_documents(
    labels: Integer[np.ndarray, " D"],
    validation_fraction: float,
    test_fraction: float,
    rng: np.random.Generator,
) -> tuple[Int64[np.ndarray, " D_t"], Int64[np.ndarray, " D_v"], Int64[np.ndarray, " D_e"]]:
    """Splits documents into training, validation and test, label by label.

    A label with fewer than 3 documents stays in training. Any other has at least one document in
    training and in every split whose fraction is above 0.

    Returns:
      Three sorted, disjoint arrays of indices that cover all documents.
    """
    train, validation, test = [], [], []
    for label in np.unique(labels):
        documents = rng.permutation(np.flatnonzero(labels == label))
        count = len(documents)
        num_validation = num_test = 0
        if count >= MINIMUM_TO_SPLIT:
            if validation_fraction > 0:
                num_validation = max(1, round(count * validation_fraction))
                num_validation = min(num_validation, count - 1 - (test_fraction > 0))
            if test_fraction > 0:
                num_test = min(max(1, round(count * test_fraction)), count - 1 - num_validation)
        validation.extend(documents[:num_validation])
        test.extend(documents[num_validation : num_validation + num_test])
        train.extend(documents[num_validation + num_test :])

    def ordered(part: list) -> np.ndarray:
        return np.sort(np.array(part, np.int64))

    return ordered(train), ordered(validation), ordered(test)


def cut_own_texts(
    part: Int64[np.ndarray, " D_c"],
    first: Int64[np.ndarray, " D"],
    fraction: float,
    rng: np.random.Generator,
) -> tuple[Int64[np.ndarray, " D_k"], Int64[np.ndarray, " D_h"]]:
    """Cuts a client's documents into those it trains on and those held out; copies of a text stay together.

    Args:
      part: the client's documents, ascending.
      first: of `first_copies`, for all documents.
    """
    texts = first[part]
    kept, held = cut_holdout(np.unique(texts), fraction, rng)
    return part[np.isin(texts, kept)], part[np.isin(texts, held)]


def cut_holdout(
    documents: Int64[np.ndarray, " D_c"], fraction: float, rng: np.random.Generator
) -> tuple[Int64[np.ndarray, " D_k"], Int64[np.ndarray, " D_h"]]:
    """Cuts a client's documents into those it trains on and those held out, at least one each.

    A single document serves as both, so its client's own accuracy is one on training data.
    """
    if len(documents) < 2:
        return documents, documents
    num_held = min(max(1, round(len(documents) * fraction)), len(documents) - 1)
    shuffled = rng.permutation(documents)
    return np.sort(shuffled[num_held:]), np.sort(shuffled[:num_held])


def bad_fraction(config: ConfigDict, name: str, problem: str, remedy: str = "use e.g. 0.1") -> InputError:
    """Returns the error for a share of the documents, `data.NAME`."""
    return InputError(f"data.{name}", config.data[name], problem, remedy)
