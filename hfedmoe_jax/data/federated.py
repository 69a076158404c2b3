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
from hfedmoe_jax.data.facts import Facts, check_unknown, facts_of, unknown_share
from hfedmoe_jax.data.partition import partition_documents
from hfedmoe_jax.data.sources import load_source
from hfedmoe_jax.data.splits import bad_fraction, cut_own_texts, first_copies, split_corpus
from hfedmoe_jax.data.tokenizers import (
    CHECKPOINT,
    check_passages,
    check_tokenizer,
    load_tokenizer,
    to_json,
    token_offset,
    train_tokenizer,
)
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.pretrained import find_source

# Each use of chance has a stream of its own, so that changing one leaves the others as they were.
SPLIT_STREAM, PARTITION_STREAM, HOLDOUT_STREAM, BATCH_STREAM = range(4)

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
        trains on. A client with a single text has the same rows in both.
      label_names: by label index.
      client_names: by client index; the owners' names in a natural partition.
      vocab_size: token numbers are below it; at most `data.vocab_size` if the tokenizer was trained.
      token_offset: a token's number in the passages over its number in the tokenizer.
      tokenizer_json: for `from_json`.
      facts: what is worth telling about the data.
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
    facts: Facts
    token_offset: int = 0

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
      config: `data`, `partition`, `fl.clients` and `seed` are read, `model.source` for its tokenizer.
      prepare: of the `Task`.

    Raises:
      InputError: any of these is out of range, or the source cannot be used (see `load_source`).
    """
    _check(config)
    data_config = config.data
    corpus = load_source(data_config)
    splits = split_corpus(corpus, config, np.random.default_rng([config.seed, SPLIT_STREAM]))
    label_names = _label_names(splits.train)
    train_labels = _label_indices(splits.train.labels, label_names)

    owners = splits.train.clients
    partition_rng = np.random.default_rng([config.seed, PARTITION_STREAM])
    parts = partition_documents(train_labels, owners, config.fl.clients, config.partition, partition_rng)
    holdout_rng = np.random.default_rng([config.seed, HOLDOUT_STREAM])
    first = first_copies(splits.train.texts)
    cuts = (cut_own_texts(part, first, data_config.holdout_fraction, holdout_rng) for part in parts)
    kept, held = zip(*cuts, strict=True)

    if data_config.tokenizer == CHECKPOINT:
        tokenizer = load_tokenizer(find_source(config.model.source))
    else:
        tokenizer = train_tokenizer(splits.train.texts, data_config.tokenizer, data_config.vocab_size)

    def encode(part: Documents) -> tuple[Rows, np.ndarray]:
        labels = _label_indices(part.labels, label_names)
        return prepare(tokenizer, part, labels, label_names, data_config)

    train_rows, train_document = encode(splits.train)
    validation_rows, validation_document = encode(splits.validation)
    test_rows, test_document = encode(splits.test)
    unknown = unknown_share(tokenizer, splits.train.texts, train_rows["tokens"])
    check_unknown(unknown, data_config)
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
        vocab_size=tokenizer.get_vocab_size() + token_offset(tokenizer),
        token_offset=token_offset(tokenizer),
        tokenizer_json=to_json(tokenizer),
        facts=facts_of(corpus, splits, unknown),
    )


def _check(config: ConfigDict) -> None:
    """Raises InputError for what is wrong before any data are read."""
    data = config.data
    if config.seed < 0:
        raise InputError("seed", config.seed, "must not be negative", "use e.g. 0")
    if config.fl.clients < 1:
        raise InputError("fl.clients", config.fl.clients, "must be at least 1", "use e.g. 20")
    for name in ("validation_fraction", "test_fraction"):
        if not 0 <= data[name] < 1:
            raise bad_fraction(config, name, "must be at least 0 and below 1")
    if not 0 < data.holdout_fraction < 1:
        raise bad_fraction(config, "holdout_fraction", "must be above 0 and below 1")
    check_tokenizer(data.tokenizer, data.vocab_size)
    check_passages(data.seq_len, data.long_text)


def _rows_of(parts: Sequence[np.ndarray], document: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns each client's rows: those whose document is in its part."""
    client_of = np.full(document[-1] + 1, len(parts))
    for client, part in enumerate(parts):
        client_of[part] = client
    client_of_row = client_of[document]
    by_client = np.argsort(client_of_row, kind="stable")
    ends = np.cumsum(np.bincount(client_of_row, minlength=len(parts)))
    return tuple(np.split(by_client, ends)[: len(parts)])


def _label_names(train: Documents) -> tuple[str, ...]:
    """Returns the labels there may be; of questions the numbers of all choices, right ones or not."""
    if train.choices is None:
        return ordered_names(train.labels)
    return tuple(map(str, range(len(train.choices[0]))))


def _label_indices(labels: Sequence[str], names: Sequence[str]) -> Int32[np.ndarray, " D"]:
    position = {name: index for index, name in enumerate(names)}
    return np.array([position[label] for label in labels], np.int32)


def _client_names(parts: Sequence[np.ndarray], owners: Sequence[str] | None) -> tuple[str, ...]:
    if owners is None:
        width = len(str(len(parts) - 1))
        return tuple(f"client_{index:0{width}d}" for index in range(len(parts)))
    names = []
    for part in parts:
        first, *others = ordered_names([owners[int(index)] for index in part])
        names.append(f"{first} (+{len(others)} more)" if others else first)
    return tuple(names)
