"""Which client holds which document: `partition.name` to a disjoint, exact cover.

Every partition has the signature
`(labels, owners, num_clients, partition_config, rng) -> [document indices of client 0, 1, ...]`
and gives each client at least one document.

Axes: D documents, C clients.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer
from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import ordered_names
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import Registry

PARTITIONS = Registry("partition.name")
# Shares are even to the last document long before.
MAXIMUM_ALPHA = 1e9


def partition_documents(
    labels: Integer[np.ndarray, " D"],
    owners: Sequence[str] | None,
    num_clients: int,
    partition_config: ConfigDict,
    rng: np.random.Generator,
) -> list[Int64[np.ndarray, " D_c"]]:
    """Deals documents to clients by the partition that the config names.

    Args:
      labels: the label of each document.
      owners: the client each document comes from, for `column`.
      num_clients: C.
      partition_config: `name`, and the fields that the named partition reads.
      rng: the source of all chance.

    Returns:
      C sorted arrays of indices, none empty, each document in exactly one.

    Raises:
      InputError: fewer documents than clients, an unknown name, or a field out of range.
    """
    partition = PARTITIONS[partition_config.name]
    if num_clients < 1:
        raise InputError("fl.clients", num_clients, "must be at least 1", "use e.g. 20")
    if len(labels) < num_clients:
        raise InputError(
            "fl.clients",
            num_clients,
            f"there are only {len(labels)} training documents",
            f"use at most {len(labels)} clients",
        )
    parts = partition(np.asarray(labels), owners, num_clients, partition_config, rng)
    return [np.sort(part).astype(np.int64) for part in parts]


@PARTITIONS.register("iid")
def iid(labels, owners, num_clients, partition_config, rng):
    """Deals shuffled documents out evenly."""
    return np.array_split(rng.permutation(len(labels)), num_clients)


@PARTITIONS.register("dirichlet")
def dirichlet(labels, owners, num_clients, partition_config, rng):
    """Cuts each label's documents by shares over the clients drawn from Dirichlet(alpha, ..., alpha).

    This is the per-label variant (Yurochkin et al., 2019, arXiv 1905.12022), which makes clients unequal
    in size as well as in labels. Hsu et al. (2019, arXiv 1909.06335), whose name it often bears, draw each
    client's label mix instead and give all clients the same size. In both, a small alpha
    means few labels a client and a large one approaches iid.

    A client left with nothing takes one document from the client that has most (the first of equals),
    its last one as dealt; such clients are served in order.

    Raises:
      InputError: `alpha` is not above 0, or so large that it overflows.
    """
    alpha = partition_config.alpha
    if not 0 < alpha <= MAXIMUM_ALPHA:
        raise InputError(
            "partition.alpha", alpha, f"must be above 0 and at most {MAXIMUM_ALPHA:g}", "use e.g. 0.3"
        )
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        documents = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(documents) + 0.5).astype(int)
        for part, dealt in zip(parts, np.split(documents, cuts), strict=True):
            part.extend(dealt)
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.array(part) for part in parts]


@PARTITIONS.register("shards")
def shards(labels, owners, num_clients, partition_config, rng):
    """Sorts documents by label, cuts them into equal shards and deals each client `shards_per_client`.

    Source: the pathological non-IID split of McMahan et al. (2017, arXiv 1602.05629, section 3).

    Raises:
      InputError: `shards_per_client` below 1, or more shards than documents.
    """
    per_client = partition_config.shards_per_client
    if per_client < 1:
        raise InputError("partition.shards_per_client", per_client, "must be at least 1", "use e.g. 2")
    num_shards = num_clients * per_client
    if num_shards > len(labels):
        raise InputError(
            "partition.shards_per_client",
            per_client,
            f"{num_clients} clients need {num_shards} shards of {len(labels)} training documents",
            f"use at most {len(labels) // num_clients}",
        )
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, num_shards)
    dealt = rng.permutation(num_shards).reshape(num_clients, per_client)
    return [np.concatenate([pieces[shard] for shard in hand]) for hand in dealt]


@PARTITIONS.register("column")
def column(labels, owners, num_clients, partition_config, rng):
    """Gives each owner's documents to one client; surplus owners join the clients round-robin.

    Client c holds the owners c, c + C, c + 2C, ... of the sorted owners. There is no chance in it.

    Raises:
      InputError: no owners are known, or fewer of them than clients.
    """
    if owners is None:
        raise InputError(
            "data.client_column",
            "",
            "partition.name=column needs to know which client owns a document",
            "name the column, or choose another partition",
        )
    names = ordered_names(owners)
    if len(names) < num_clients:
        raise InputError(
            "fl.clients",
            num_clients,
            f"the training documents have only {len(names)} owners",
            f"use at most {len(names)} clients",
        )
    position = {name: index for index, name in enumerate(names)}
    client = np.array([position[owner] for owner in owners]) % num_clients
    return [np.flatnonzero(client == index) for index in range(num_clients)]
