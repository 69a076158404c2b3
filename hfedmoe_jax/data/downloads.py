"""Data sets by name: the Hugging Face hub and tensorflow_datasets (without TensorFlow)."""

import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import requests
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import Documents, to_documents, wanted_columns
from hfedmoe_jax.errors import InputError

PROBE_TIMEOUT_S = 5.0
OFFLINE_REMEDY = (
    "connect to the network, set data.cache_dir to where the data set lies prepared, "
    "or download its files elsewhere and use data.source=file with data.train_path"
)


def load_hub(name: str, data_config: ConfigDict) -> tuple[Documents, Documents | None]:
    """Loads the train split, and the test split if there is one, by `datasets.load_dataset`.

    Args:
      name: of a data set on the hub, or a local directory of data files.
      data_config: `cache_dir` (empty: the library's own) and the names of the columns.

    Raises:
      InputError: no network, no such data set, no train split, or a column is missing.
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
            splits = datasets.load_dataset(name, cache_dir=data_config.cache_dir or None)
    # The library raises some twenty unrelated classes for what a user may get wrong.
    except Exception as error:
        reason = str(error)
        if is_silent and isinstance(error, ConnectionError):
            reason = f"{datasets.config.HF_ENDPOINT} does not answer, and it is not in the cache"
        raise _cannot_load(data_config, reason) from error

    def names_of(split: str, column: str) -> Sequence[str] | None:
        return getattr(splits[split].features[column], "names", None)

    def read(split: str, columns: list[str]) -> Mapping[str, Sequence[Any]]:
        return {column: list(splits[split][column]) for column in columns}

    names = {split: splits[split].column_names for split in splits}
    return _train_and_test(data_config, names, read, names_of)


def load_tfds(name: str, data_config: ConfigDict) -> tuple[Documents, Documents | None]:
    """Loads the train split, and the test split if there is one, from ArrayRecord files of `tfds`.

    Args:
      name: as for `tfds.builder`, or a local directory of a prepared data set.
      data_config: `cache_dir` (empty: the library's own) and the names of the columns.

    Raises:
      InputError: no network, no such data set, a module that preparing it needs is not there,
        no train split, or a column is missing.
    """
    import tensorflow_datasets as tfds

    try:
        if os.path.isdir(name):
            builder = tfds.builder_from_directory(name)
        else:
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
        raise _cannot_load(data_config, str(error)) from error

    features: Any = builder.info.features

    def names_of(split: str, column: str) -> Sequence[str] | None:
        return getattr(features[column], "names", None)

    def read(split: str, columns: list[str]) -> Mapping[str, Sequence[Any]]:
        rows = list(splits[split])
        return {column: [row[column] for row in rows] for column in columns}

    names = {split: list(features) for split in splits}
    return _train_and_test(data_config, names, read, names_of)


def _train_and_test(data_config, column_names, read, names_of) -> tuple[Documents, Documents | None]:
    if "train" not in column_names:
        splits = ", ".join(map(str, column_names))
        raise InputError(
            "data.source",
            data_config.source,
            f"has no split named train; it has {splits}",
            "use data.source=file with the files of the splits",
        )
    documents = []
    for split in ("train", "test"):
        if split not in column_names:
            documents.append(None)
            continue
        where = f"{data_config.source} ({split})"
        wanted = wanted_columns(column_names[split], data_config, with_clients=split == "train", where=where)
        columns = read(split, list(wanted.values()))
        values = {role: _named(columns[name], names_of(split, name)) for role, name in wanted.items()}
        documents.append(to_documents(values, data_config, where))
    return documents[0], documents[1]


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


def _cannot_load(data_config: ConfigDict, reason: str) -> InputError:
    reason = " ".join(reason.split())[:300]
    return InputError("data.source", data_config.source, f"cannot be loaded: {reason}", OFFLINE_REMEDY)
