"""Data sets by name: the Hugging Face hub and tensorflow_datasets (without TensorFlow)."""

import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import requests
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import (
    Corpus,
    Documents,
    has_label,
    named,
    no_rows,
    to_documents,
    wanted_columns,
)
from hfedmoe_jax.data.values import to_string
from hfedmoe_jax.errors import InputError

PROBE_TIMEOUT_S = 5.0
OFFLINE_REMEDY = (
    "connect to the network, set data.cache_dir to where the data set lies prepared, "
    "or download its files elsewhere and use data.source=file with data.train_path"
)

TFDS_REMEDY = "see what tfds says, check data.subset and data.cache_dir, or use data.source=file"


def load_hub(name: str, data_config: ConfigDict) -> Corpus:
    """Loads the splits that the config names, by `datasets.load_dataset`.

    Args:
      name: of a data set on the hub, or a local directory of data files.
      data_config: `subset`, the names of the splits and columns, `cache_dir` (empty: the library's own).

    Raises:
      InputError: no network, no such data set, subset, split or column.
    """
    # They take a second to import, which the other sources need not pay.
    import datasets
    import datasets.config

    # An offline mode that the user chose is left to the library, which names it in its error.
    is_silent = not (
        os.path.isdir(name) or datasets.config.HF_HUB_OFFLINE or _answers(datasets.config.HF_ENDPOINT)
    )
    try:
        with _offline(is_silent):
            splits = datasets.load_dataset(
                name, data_config.subset or None, cache_dir=data_config.cache_dir or None
            )
    # The library raises some twenty unrelated classes for what a user may get wrong.
    except Exception as error:
        reason = str(error) or type(error).__name__
        # A ConnectionError of the standard library or of requests, which are unrelated classes.
        is_offline = isinstance(error, ConnectionError | requests.exceptions.RequestException)
        if is_silent and is_offline:
            reason = f"{datasets.config.HF_ENDPOINT} does not answer, and it is not in the cache"
        remedy = OFFLINE_REMEDY if is_silent or is_offline else _hub_remedy(reason)
        raise _cannot_load(data_config, reason, remedy) from error

    def names_of(split: str, column: str) -> Sequence[str] | None:
        return getattr(splits[split].features[column], "names", None)

    def read(split: str, columns: list[str]) -> Mapping[str, Sequence[Any]]:
        try:
            return {column: list(splits[split][column]) for column in columns}
        except Exception as error:
            raise _cannot_load(data_config, f"split {split}: {error}", _hub_remedy("")) from error

    names = {split: splits[split].column_names for split in splits}
    return _read_splits(data_config, names, read, names_of)


def load_tfds(name: str, data_config: ConfigDict) -> Corpus:
    """Loads the splits that the config names from ArrayRecord files of `tfds`.

    Args:
      name: as for `tfds.builder`, or a local directory of a prepared data set.
      data_config: `subset`, the names of the splits and columns, `cache_dir` (empty: the library's own).

    Raises:
      InputError: no network, no such data set, a module that preparing it needs is not there,
        no such subset, split or column.
    """
    import tensorflow_datasets as tfds

    try:
        if os.path.isdir(name):
            builder = tfds.builder_from_directory(name)
        else:
            name = f"{name}/{data_config.subset}" if data_config.subset else name
            builder = tfds.builder(name, data_dir=data_config.cache_dir or None, file_format="array_record")
            if not builder.is_prepared():
                _require_answer(next(iter(builder.url_infos or ()), None))
                builder.download_and_prepare()
        splits: Any = builder.as_data_source()
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(
            "data.source",
            data_config.source,
            "tfds knows no such data set",
            f"{hint}See tfds.list_builders()",
        ) from error
    except ModuleNotFoundError as error:
        raise InputError(
            "data.source",
            data_config.source,
            f"preparing it needs the module {error.name}",
            f"pip install {error.name}, or use data.source=file",
        ) from error
    except Exception as error:
        remedy = OFFLINE_REMEDY if isinstance(error, ConnectionError) else TFDS_REMEDY
        raise _cannot_load(data_config, str(error), remedy) from error

    features: Any = builder.info.features

    def names_of(split: str, column: str) -> Sequence[str] | None:
        return getattr(features[column], "names", None)

    def read(split: str, columns: list[str]) -> Mapping[str, Sequence[Any]]:
        rows = list(splits[split])
        return {column: [row[column] for row in rows] for column in columns}

    names = {split: list(features) for split in splits}
    return _read_splits(data_config, names, read, names_of)


def _read_splits(data_config: ConfigDict, column_names, read, names_of) -> Corpus:
    """Reads the splits that are named; a split "test" that is not named is used if it has labels."""

    def documents(split: str, role: str) -> Documents:
        if split not in column_names:
            known = ", ".join(map(str, column_names))
            raise InputError(
                f"data.{role}_split", split, f"{data_config.source} has no such split", f"it has {known}"
            )
        where = f"{data_config.source} ({split})"
        roles = wanted_columns(column_names[split], data_config, role == "train", where)
        columns = {
            name: _named(values, names_of(split, name)) for name, values in read(split, named(roles)).items()
        }
        if not len(columns[roles["text"][0]]):
            raise no_rows(f"data.{role}_split", split)
        return to_documents(columns, roles, data_config, where)

    def is_labelled(split: str) -> bool:
        label = data_config.label_column
        if label not in column_names[split]:
            return not label
        values = _named(read(split, [label])[label], names_of(split, label))
        return any(has_label(to_string(value), data_config) for value in values)

    test_split, notes = data_config.test_split, ()
    if not test_split and "test" in column_names and data_config.train_split != "test":
        if is_labelled("test"):
            test_split = "test"
        else:
            notes = ("the split test has no labels, so a test split is cut from the training documents",)
    return Corpus(
        train=documents(data_config.train_split, "train"),
        test=documents(test_split, "test") if test_split else None,
        validation=documents(data_config.validation_split, "validation")
        if data_config.validation_split
        else None,
        notes=notes,
    )


def _named(values: Sequence[Any], names: Sequence[str] | None) -> Sequence[Any]:
    """Returns class ids as class names; a negative id stands for no label in both libraries."""
    if names is None:
        return values
    return [None if value is None or value < 0 else names[value] for value in values]


@contextlib.contextmanager
def _offline(is_offline: bool) -> Iterator[None]:
    """Has `datasets` look into its cache at once; it would first retry for half a minute."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or is_offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _require_answer(url: str | None) -> None:
    # tfds retries for more than three minutes where there is no network.
    if url is not None and not _answers(url):
        raise ConnectionError(f"not prepared yet, and {url} does not answer")


def _answers(url: str) -> bool:
    try:
        requests.head(url, timeout=PROBE_TIMEOUT_S)
    except requests.exceptions.SSLError:
        # Something answered; the library that downloads has certificates of its own.
        return True
    except requests.exceptions.RequestException:
        return False
    return True


def _hub_remedy(reason: str) -> str:
    """Returns what to do about an error of `datasets` that is not the network's."""
    lowered = reason.lower()
    if "config name" in lowered or "builderconfig" in lowered:
        return "name one of them with data.subset"
    if "script" in lowered:
        return "use data.source=file with the data set's parquet files"
    if "doesn't exist" in lowered or "gated" in lowered:
        return "check the name; for a data set that is not public, log in with `hf auth login`"
    return "see what `datasets` says, or use data.source=file with the data set's files"


def _cannot_load(data_config: ConfigDict, reason: str, remedy: str) -> InputError:
    reason = " ".join(reason.split())[:300]
    return InputError("data.source", data_config.source, f"cannot be loaded: {reason}", remedy)
