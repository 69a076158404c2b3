"""Which clients run where, and together: tiers of budgets, blocks of a program call, chunks of a vmap.

Clients of unlike budgets run in few compiled programs: a program of tier K has room for K experts, and a
client runs in the smallest that holds its budget. A program runs a block of clients on each device at a
call, and of a block a chunk at once. None of this changes results on a CPU; on accelerators the chunk
changes roundings.

Axes: D devices along "clients", B clients of a block on a device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from hfedmoe_jax.aggregation.sums import power_below
from hfedmoe_jax.cost import ModelCost
from hfedmoe_jax.mesh import CLIENTS, EXPERTS

BLOCK = 16  # clients of a block on a device, if a chunk is not larger
MOST_CHUNK = 64
NOBODY = -1


class Block(NamedTuple):
    """Members to run together.

    Attributes:
      tier: which program runs them.
      members: int [D, B], their places in the population, NOBODY where there is none.
      count: int [D], how many there are.
    """

    tier: int
    members: Int[np.ndarray, "devices block"]
    count: Int[np.ndarray, " devices"]


def block_size(chunk: int) -> int:
    """Returns B, the members of a block on a device: whole chunks."""
    return -(-BLOCK // chunk) * chunk


def chunk_size(
    wanted: int, cost: ModelCost, mesh: Mesh, members: int, memory_bytes: float | None = None
) -> int:
    """Returns how many clients run at once on a device, vmapped.

    A CPU takes one, whatever is wanted: a batch axis costs it a slower matrix product, and XLA rounds a
    program with one otherwise (it contracts multiply-adds by the shape of a loop). So a run on CPUs has
    the same bits at any setting. An accelerator takes what is wanted.

    Args:
      wanted: 0 for the largest power of two, at most 64, with which the clients' parameters, gradients,
        optimizer state and activations fill half of the memory; no larger than a device's part of a cohort
        asks for, because empty places of a chunk are computed too.
      members: of a cohort.
      memory_bytes: of a device; None: what the device says.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return 1
    if wanted:
        return wanted
    limit = memory_bytes or (device.memory_stats() or {}).get("bytes_limit", 16 * 2**30)
    held = cost.all_experts // mesh.shape[EXPERTS]
    one = cost.shared_training_bytes + held * (cost.expert_parameter_bytes + cost.expert_training_bytes)
    part = 1 << (-(-members // mesh.shape[CLIENTS]) - 1).bit_length()
    chunk = int(power_below(max(1, min(MOST_CHUNK, 0.5 * limit / one, part))))
    # Every process must run the same program, whatever its own device says.
    return int(np.min(multihost_utils.process_allgather(np.int32(chunk))))


def plan_blocks(
    tiers: Int[np.ndarray, " members"],
    mesh: Mesh,
    chunk: int,
    hosts: Int[np.ndarray, " members"] | None = None,
) -> list[Block]:
    """Deals a population out to the devices, tier by tier, the largest first.

    Args:
      tiers: of each member.
      mesh, chunk: where and in what portions they run.
      hosts: the process that has each member's data; default: any.

    Every process plans the same blocks. A process's members go to its own devices.
    """
    size = block_size(chunk)
    processes = np.array([device.process_index for device in mesh.devices[:, 0]])
    seats = [np.flatnonzero(processes == host) for host in range(processes.max() + 1)]
    if hosts is None:
        seats, hosts = [np.arange(len(processes))], np.zeros(len(tiers), int)
    dealt = [0] * len(seats)
    blocks = []
    for tier in sorted(set(tiers.tolist()), reverse=True):
        queues: list[list[int]] = [[] for _ in processes]
        for member in np.flatnonzero(tiers == tier):
            host = int(hosts[member])
            # Dealing goes on where the last tier ended, so that no device gets all the remainders.
            queues[seats[host][dealt[host] % len(seats[host])]].append(int(member))
            dealt[host] += 1
        for start in range(0, max(map(len, queues)), size):
            members = np.full((len(queues), size), NOBODY)
            for device, queue in enumerate(queues):
                part = queue[start : start + size]
                members[device, : len(part)] = part
            blocks.append(Block(tier, members, (members != NOBODY).sum(axis=1, dtype=np.int32)))
    return blocks


def empty_places(blocks: Sequence[Block], chunk: int) -> float:
    """Returns the share of the computed places of chunks that have no member."""
    count = np.array([block.count for block in blocks])
    computed = np.sum(-(-count // chunk) * chunk)
    return float(1 - count.sum() / computed)


def default_tiers(chunk: int) -> int:
    """Returns the most tiers to make for clients that are computed `chunk` at once.

    Members of a chunk take as many turns as the one with the most experts, so unlike budgets are kept
    apart. A client alone takes turns for its own experts in any tier; one program then compiles
    sooner and spreads the clients more evenly (on a CPU the default job runs 1.14 times as fast as in three).

    >>> default_tiers(chunk=1), default_tiers(chunk=8)
    (1, 3)
    """
    return 1 if chunk == 1 else 3


def choose_tiers(budgets: Int[np.ndarray, " clients"], most: int) -> list[int]:
    """Returns at most `most` tiers, ascending, with the least unused room over all clients.

    >>> choose_tiers(np.array([2, 2, 3, 9, 10]), most=2)
    [3, 10]
    """
    distinct, clients = np.unique(budgets, return_counts=True)
    most = min(most, len(distinct))
    # unused[t, i]: the least room that the budgets up to the i-th leave in t tiers, the last of which is it.
    unused = np.full((most + 1, len(distinct) + 1), np.inf)
    unused[0, 0] = 0
    before = np.zeros((most + 1, len(distinct) + 1), int)
    for tier in range(1, most + 1):
        for end in range(1, len(distinct) + 1):
            rooms = [
                unused[tier - 1, start]
                + np.sum(clients[start:end] * (distinct[end - 1] - distinct[start:end]))
                for start in range(end)
            ]
            before[tier, end] = int(np.argmin(rooms))
            unused[tier, end] = rooms[before[tier, end]]
    tiers, end = [], len(distinct)
    for tier in range(most, 0, -1):
        tiers.append(int(distinct[end - 1]))
        end = before[tier, end]
    return tiers[::-1]


def tier_of(budgets: Int[np.ndarray, " clients"], tiers: list[int]) -> Int[np.ndarray, " clients"]:
    """Returns the smallest tier that holds each budget."""
    return np.asarray(tiers)[np.searchsorted(tiers, budgets)]
