"""What a round costs the clients: bytes, simulated seconds and failures, on the host in float64.

Axes: M clients of a round's cohort.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hfedmoe_jax.algorithms import RoundMetrics
from hfedmoe_jax.cost import ModelCost
from hfedmoe_jax.devices import DeviceProfile, ScoringPasses, compute_seconds, transfer_seconds
from hfedmoe_jax.reports import DROPPED_OUT, OVER_BUDGET, STATUS_NAMES


class Ledger(NamedTuple):
    """Totals of a run so far.

    Attributes:
      simulated_time_s: sum of the rounds' simulated times.
      bytes_up, bytes_down: sums over clients and rounds.
      status_counts: int64 [4], client rounds by status (STATUS_NAMES).
      train_s: real seconds spent in rounds, those that bring in a new tier (and compile) left out.
      timed_steps: the client steps of those rounds.
      wall_s: real seconds spent in rounds and evaluations.
    """

    simulated_time_s: np.float64
    bytes_up: np.float64
    bytes_down: np.float64
    status_counts: np.ndarray
    train_s: np.float64
    timed_steps: np.int64
    wall_s: np.float64


class RoundAccount(NamedTuple):
    """One round's costs.

    Attributes:
      round_time_s: the slowest client's download, compute and upload; the server waits for it.
      waiting_share: mean over clients of the part of the round that they wait for the slowest.
      bytes_up, bytes_down: sums over clients.
    """

    round_time_s: float
    waiting_share: float
    bytes_up: float
    bytes_down: float


def open_ledger() -> Ledger:
    """Returns a ledger of zeros."""
    zero = np.float64(0)
    return Ledger(zero, zero, zero, np.zeros(len(STATUS_NAMES), np.int64), zero, np.int64(0), zero)


def account_round(
    metrics: RoundMetrics,
    profiles: Sequence[DeviceProfile],
    cost: ModelCost,
    steps: int,
    scoring: ScoringPasses,
) -> RoundAccount:
    """Returns the costs of a round.

    Every client downloads. One that drops out, or that fails for lack of memory, sends nothing and
    nobody waits for it; one whose loss was not finite notices at the end and sends nothing either.

    Args:
      metrics: of the cohort, host arrays.
      profiles: each member's device.
      cost: of the model.
      steps: local steps.
      scoring: what it adds to a client's round.
    """
    report, times = metrics.report, []
    for index, profile in enumerate(profiles):
        if report.status[index] in (DROPPED_OUT, OVER_BUDGET):
            continue
        served = float(report.assignments[index]), float(report.trained_assignments[index])
        compute = compute_seconds(profile, cost, steps, *served, scoring)
        travel = float(metrics.bytes_down[index]), float(metrics.bytes_up[index])
        times.append(compute + transfer_seconds(profile, *travel))
    slowest = max(times, default=0.0)
    waiting = 1 - np.mean(times) / slowest if slowest else 0.0
    bytes_up, bytes_down = (float(each.sum()) for each in (metrics.bytes_up, metrics.bytes_down))
    return RoundAccount(slowest, float(waiting), bytes_up, bytes_down)


def enter(ledger: Ledger, account: RoundAccount, metrics: RoundMetrics) -> Ledger:
    """Returns the ledger with a round's costs added (the real times are the caller's)."""
    counts = np.bincount(metrics.report.status, minlength=len(STATUS_NAMES))
    return ledger._replace(
        simulated_time_s=ledger.simulated_time_s + account.round_time_s,
        bytes_up=ledger.bytes_up + account.bytes_up,
        bytes_down=ledger.bytes_down + account.bytes_down,
        status_counts=ledger.status_counts + counts,
    )
