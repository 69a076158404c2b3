"""Batches of fixed shape, for training rounds and for evaluation.

Axes: M clients of a cohort, C all clients, B batch, T tokens, N passages, H held-out passages of a client.
"""

import numpy as np
from jaxtyping import Float32, Int32, Integer
from ml_collections import ConfigDict

from hfedmoe_jax.data.federated import BATCH_STREAM, Examples, FederatedData


def round_batches(
    data: FederatedData,
    clients: Integer[np.ndarray, " M"],
    round_number: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[Int32[np.ndarray, "M steps B T"], Int32[np.ndarray, "M steps B"]]:
    """Returns what each client of a cohort trains on in a round.

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
    return data.train.tokens[rows], data.train.labels[rows]


def pad_batches(
    examples: Examples, batch_size: int
) -> tuple[Int32[np.ndarray, "n B T"], Int32[np.ndarray, "n B"], Float32[np.ndarray, "n B"]]:
    """Returns all examples in order, in batches; the last one is filled up with rows of weight 0.

    A row of weight 0 repeats the first example: one without tokens could turn to NaN, which
    no weight cancels.
    """
    count = len(examples.labels)
    num_batches = -(-count // batch_size)
    rows = np.arange(num_batches * batch_size)
    weight = (rows < count).astype(np.float32)
    rows = np.where(rows < count, rows, 0).reshape(num_batches, batch_size)
    return examples.tokens[rows], examples.labels[rows], weight.reshape(rows.shape)


def holdout_batches(
    data: FederatedData, limit: int
) -> tuple[Int32[np.ndarray, "C H T"], Int32[np.ndarray, "C H"], Float32[np.ndarray, "C H"]]:
    """Returns at most H = `limit` held-out passages of every client, one batch each.

    They are spread evenly over the client's own. A client with fewer repeats its first one with
    weight 0; one without any, whose data are another host's, has weight 0 alone.
    """
    counts = np.array([min(limit, len(rows)) for rows in data.client_holdout])
    chosen = np.zeros((len(counts), limit), np.int64)
    for client in np.flatnonzero(counts):
        rows = data.client_holdout[client]
        spread = rows[np.arange(counts[client]) * len(rows) // counts[client]]
        chosen[client] = spread[0]
        chosen[client, : counts[client]] = spread
    weight = (np.arange(chosen.shape[1]) < counts[:, None]).astype(np.float32)
    return data.train.tokens[chosen], data.train.labels[chosen], weight


def most_tokens(data: FederatedData, fl: ConfigDict) -> int:
    """Returns a bound on the distinct tokens of any client's round, padding included, in whole hundreds.

    Args:
      fl: local_steps and batch_size are read.
    """
    distinct = max(len(np.unique(data.train.tokens[rows])) for rows in data.client_train)
    seen = fl.local_steps * fl.batch_size * data.train.tokens.shape[1]
    return min(data.vocab_size, 100 * -(-(min(distinct, seen) + 1) // 100))
