"""Budget tiers: few compiled programs for clients of many budgets.

A program of tier K has room for K experts; a client runs in the smallest that holds its budget, and
uses of it what its own budget allows.
"""

import numpy as np
from jaxtyping import Int


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
