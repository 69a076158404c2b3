"""Batches of fixed shape, for training rounds and for evaluation.

Axes: M clients of a cohort, C all clients, B batch, T tokens, N passages, H held-out passages of a client.
"""

import numpy as np
from jaxtyping import Bool, Float32, Integer
from ml_collections import ConfigDict

from hfedmoe_jax.data.federated import BATCH_STREAM, FederatedData, Rows, num_rows, take


def round_batches(
    data: FederatedData,
    clients: Integer[np.ndarray, " M"],
    round_number: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> Rows:
    """Returns what each client of a cohort trains on in a round, arrays [M, steps, B, ...].

    A client's rows are shuffled anew each epoch, and epoch follows epoch until the round is full. The
    batches of a client depend on nothing but (seed, round_number, client): not on the cohort, nor on
    earlier rounds, so a resumed run sees the same.
    """
    clients = np.asarray(clients)
    rows = np.empty((len(clients), steps * batch_size), np.int64)
    for position, client in enumerate(clients):
        rng = np.random.default_rng([seed, BATCH_STREAM, round_number, int(client)])
        own = data.client_train[client]
        epochs = -(-rows.shape[1] // len(own))
        order = np.concatenate([rng.permutation(own) for _ in range(epochs)])
        rows[position] = order[: rows.shape[1]]
    rows = rows.reshape(len(clients), steps, batch_size)
    return take(data.train, rows)


def pad_batches(rows: Rows, batch_size: int) -> tuple[Rows, Float32[np.ndarray, "n B"]]:
    """Returns all rows in order, in batches [n, B, ...]; the last one is filled up with zeros of weight 0."""
    count = num_rows(rows)
    num_batches = -(-count // batch_size)
    index = np.arange(num_batches * batch_size).reshape(num_batches, batch_size)
    return take_padded(rows, index, index < count)


def holdout_batches(data: FederatedData, limit: int) -> tuple[Rows, Float32[np.ndarray, "C H"]]:
    """Returns at most H = `limit` held-out passages of every client, one batch [H, ...] each.

    They are spread evenly over the client's own. A client with fewer is filled up with zeros of weight 0; one
    without any, whose data are another host's, has nothing else.
    """
    counts = np.array([min(limit, len(rows)) for rows in data.client_holdout])
    chosen = np.zeros((len(counts), limit), np.int64)
    for client in np.flatnonzero(counts):
        rows = data.client_holdout[client]
        chosen[client, : counts[client]] = rows[np.arange(counts[client]) * len(rows) // counts[client]]
    return take_padded(data.train, chosen, np.arange(limit) < counts[:, None])


def take_padded(
    rows: Rows, index: Integer[np.ndarray, "n B"], real: Bool[np.ndarray, "n B"]
) -> tuple[Rows, Float32[np.ndarray, "n B"]]:
    """Returns rows by index, zeros where not `real`, and the weights: 1 where real.

    Zeros are padding throughout, so that such a row asks for no expert.
    """
    batches = take(rows, np.where(real, index, 0))
    for name, values in batches.items():
        batches[name] = np.where(
            real.reshape(real.shape + (1,) * (values.ndim - 2)), values, np.zeros((), values.dtype)
        )
    return batches, real.astype(np.float32)


def most_tokens(data: FederatedData, fl: ConfigDict) -> int:
    """Returns a bound on the distinct tokens of any client's round, padding included, in whole hundreds.

    Args:
      fl: local_steps and batch_size are read.
    """
    distinct = max(len(np.unique(data.train["tokens"][rows])) for rows in data.client_train)
    seen = fl.local_steps * fl.batch_size * data.train["tokens"].shape[1]
    return min(data.vocab_size, 100 * -(-(min(distinct, seen) + 1) // 100))
