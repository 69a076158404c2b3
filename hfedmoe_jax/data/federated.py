"""From a config to tokenised federated data, the one way in: `load_federated`.

Axes: N passages (rows), T tokens, C clients, D documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Int32, Int64, Integer
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import Documents, ordered_names
from hfedmoe_jax.data.partition import partition_documents
from hfedmoe_jax.data.sources import Corpus, check_labels, load_source
from hfedmoe_jax.data.tokenizers import (
    check_passages,
    check_tokenizer,
    to_json,
    train_tokenizer,
)
from hfedmoe_jax.errors import InputError

# Each use of chance has a stream of its own, so that changing one leaves the others as they were.
SPLIT_STREAM, PARTITION_STREAM, HOLDOUT_STREAM, BATCH_STREAM = range(4)
# One each for training, validation and test.
MINIMUM_TO_SPLIT = 3


Rows = dict[str, np.ndarray]
"""What a task makes of documents: arrays [N, ...] by name, `tokens` [N, T] among them."""

Clients = TypeVar("Clients", int, np.ndarray)


@dataclass(frozen=True)
class FederatedData:
    """Tokenised data of all clients.

    Attributes:
      train: the passages of all clients.
      validation: passages of documents that no client holds.
      test: likewise, or the source's own test set.
      validation_document, test_document: the document that each passage is of.
      client_train: for each client, the rows of `train` it trains on, in ascending order.
      client_holdout: for each client, the rows of `train` cut from its own documents that it never
        trains on. A client with a single document has the same rows in both.
      label_names: by label index.
      client_names: by client index; the owners' names in a natural partition.
      vocab_size: the tokenizer's actual size, at most `data.vocab_size`.
      tokenizer_json: for `from_json`.
      duplicates_removed: training documents dropped as exact copies of an earlier one or of a test
        document.
    """

    train: Rows
    validation: Rows
    test: Rows
    validation_document: Integer[np.ndarray, " _"]
    test_document: Integer[np.ndarray, " _"]
    client_train: tuple[Int64[np.ndarray, " _"], ...]
    client_holdout: tuple[Int64[np.ndarray, " _"], ...]
    label_names: tuple[str, ...]
    client_names: tuple[str, ...]
    vocab_size: int
    tokenizer_json: str
    duplicates_removed: int

    def of_host(self, host: int, hosts: int) -> "FederatedData":
        """Returns the same with the training passages of this host's clients only (see `host_of`).

        The others keep their places, without rows.
        """
        own = [host_of(client, hosts) == host for client in range(len(self.client_train))]
        by_client = zip(own, self.client_train, self.client_holdout, strict=True)
        kept = np.unique(np.concatenate([np.union1d(train, held) for mine, train, held in by_client if mine]))

        def rows_here(rows_by_client: tuple) -> tuple:
            return tuple(
                np.searchsorted(kept, rows) if is_own else rows[:0]
                for rows, is_own in zip(rows_by_client, own, strict=True)
            )

        return replace(
            self,
            train=take(self.train, kept),
            client_train=rows_here(self.client_train),
            client_holdout=rows_here(self.client_holdout),
        )


def host_of(client: Clients, hosts: int) -> Clients:
    """Returns which of several hosts has a client's data."""
    return client % hosts


def num_rows(rows: Rows) -> int:
    """Returns N."""
    return len(rows["tokens"])


def take(rows: Rows, index: np.ndarray) -> Rows:
    """Returns rows by index."""
    return {name: values[index] for name, values in rows.items()}


def load_federated(config: ConfigDict, prepare: Callable[..., tuple[Rows, np.ndarray]]) -> FederatedData:
    """Loads, splits, tokenises and partitions the data of a config; equal configs give equal data.

    Documents, not passages, are split and partitioned, so no document is in two places. The tokenizer sees
    training documents only.

    Args:
      config: `data`, `partition`, `fl.clients` and `seed` are read.
      prepare: of the `Task`.

    Raises:
      InputError: any of these is out of range, or the source cannot be used (see `load_source`).
    """
    _check(config)
    data_config = config.data
    corpus, duplicates_removed = without_duplicates(load_source(data_config))
    check_labels(corpus, data_config)
    texts, label_strings, clients = corpus.train
    label_names = ordered_names(label_strings)
    labels = _label_indices(label_strings, label_names)

    train, validation, test = _split(labels, corpus.test is None, config)
    train_texts, train_labels = _take(texts, train), labels[train]
    test_texts, test_labels = _take(texts, test), labels[test]
    if corpus.test is not None:
        test_texts, test_labels = corpus.test.texts, _label_indices(corpus.test.labels, label_names)

    owners = None if clients is None else _take(clients, train)
    partition_rng = np.random.default_rng([config.seed, PARTITION_STREAM])
    parts = partition_documents(train_labels, owners, config.fl.clients, config.partition, partition_rng)
    holdout_rng = np.random.default_rng([config.seed, HOLDOUT_STREAM])
    kept, held = zip(
        *(cut_holdout(part, data_config.holdout_fraction, holdout_rng) for part in parts), strict=True
    )

    tokenizer = train_tokenizer(train_texts, data_config.tokenizer, data_config.vocab_size)

    train_rows, train_document = prepare(tokenizer, train_texts, train_labels, data_config)
    validation_rows, validation_document = prepare(
        tokenizer, _take(texts, validation), labels[validation], data_config
    )
    test_rows, test_document = prepare(tokenizer, test_texts, test_labels, data_config)
    return FederatedData(
        train=train_rows,
        validation=validation_rows,
        test=test_rows,
        validation_document=validation_document,
        test_document=test_document,
        client_train=_rows_of(kept, train_document),
        client_holdout=_rows_of(held, train_document),
        label_names=label_names,
        client_names=_client_names(parts, owners if config.partition.name == "column" else None),
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer_json=to_json(tokenizer),
        duplicates_removed=duplicates_removed,
    )


def without_duplicates(corpus: Corpus) -> tuple[Corpus, int]:
    """Drops training documents whose exact text came before or is in the test set, and counts them."""
    seen = set(corpus.test.texts if corpus.test else [])
    kept = []
    for index, text in enumerate(corpus.train.texts):
        if text not in seen:
            seen.add(text)
            kept.append(index)
    texts, labels, clients = corpus.train
    train = Documents(
        _take(texts, kept), _take(labels, kept), None if clients is None else _take(clients, kept)
    )
    return Corpus(train, corpus.test), len(texts) - len(kept)


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


def _check(config: ConfigDict) -> None:
    """Raises InputError for what is wrong before any data are read."""
    data = config.data
    if config.seed < 0:
        raise InputError("seed", config.seed, "must not be negative", "use e.g. 0")
    if config.fl.clients < 1:
        raise InputError("fl.clients", config.fl.clients, "must be at least 1", "use e.g. 20")
    for name in ("validation_fraction", "test_fraction"):
        if not 0 <= data[name] < 1:
            raise _bad_fraction(config, name, "must be at least 0 and below 1")
    if not 0 < data.holdout_fraction < 1:
        raise _bad_fraction(config, "holdout_fraction", "must be above 0 and below 1")
    check_tokenizer(data.tokenizer, data.vocab_size)
    check_passages(data.seq_len, data.long_text)


def _split(labels: np.ndarray, cuts_test: bool, config: ConfigDict) -> tuple[np.ndarray, ...]:
    data = config.data
    if cuts_test and data.test_fraction == 0:
        raise _bad_fraction(config, "test_fraction", "must be above 0 where there is no separate test set")
    if cuts_test and data.validation_fraction + data.test_fraction >= 1:
        raise _bad_fraction(
            config,
            "test_fraction",
            f"with validation_fraction={data.validation_fraction} nothing is left to train on",
        )
    test_fraction = data.test_fraction if cuts_test else 0.0
    rng = np.random.default_rng([config.seed, SPLIT_STREAM])
    train, validation, test = split_documents(labels, data.validation_fraction, test_fraction, rng)
    for name, documents in (("validation", validation), ("test", test)):
        is_needed = data.validation_fraction > 0 if name == "validation" else cuts_test
        if is_needed and not len(documents):
            problem = f"no label has {MINIMUM_TO_SPLIT} documents, so none can be cut"
            raise _bad_fraction(config, f"{name}_fraction", problem, "add documents or give data.test_path")
    return train, validation, test


def _bad_fraction(config: ConfigDict, name: str, problem: str, remedy: str = "use e.g. 0.1") -> InputError:
    return InputError(f"data.{name}", config.data[name], problem, remedy)


def _rows_of(parts: Sequence[np.ndarray], document: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns each client's rows: those whose document is in its part."""
    client_of = np.full(document[-1] + 1, len(parts))
    for client, part in enumerate(parts):
        client_of[part] = client
    client_of_row = client_of[document]
    by_client = np.argsort(client_of_row, kind="stable")
    ends = np.cumsum(np.bincount(client_of_row, minlength=len(parts)))
    return tuple(np.split(by_client, ends)[: len(parts)])


def _label_indices(labels: Sequence[str], names: Sequence[str]) -> Int32[np.ndarray, " D"]:
    position = {name: index for index, name in enumerate(names)}
    return np.array([position[label] for label in labels], np.int32)


def _client_names(parts: Sequence[np.ndarray], owners: Sequence[str] | None) -> tuple[str, ...]:
    if owners is None:
        width = len(str(len(parts) - 1))
        return tuple(f"client_{index:0{width}d}" for index in range(len(parts)))
    names = []
    for part in parts:
        first, *others = ordered_names(_take(owners, part))
        names.append(f"{first} (+{len(others)} more)" if others else first)
    return tuple(names)


def _take(values: Sequence[str], indices: Sequence[int] | np.ndarray) -> list[str]:
    return [values[index] for index in indices]
