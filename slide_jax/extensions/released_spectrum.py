"""Spectrum that is free again when a download ends: shares that vary over time, linear rates.

With a spectral efficiency that does not depend on the band, bits are an area of spectrum and time [Hz s]: a
user with a model and a clock is a chain of pieces (S_l - S_{l-1}) / efficiency, released at its start, and
layer l keeps the deadline T iff its piece has arrived by T - W_l / v, by (*).

A set of such users is feasible iff one server of speed B, which may be interrupted, meets the deadlines of
all pieces: shares that vary are such a server's time cut finer, and cutting gains nothing. So it is
feasible iff earliest deadline first meets them, or iff no window is asked for more than it holds:

    sum of pieces released at or after r and due by d   <=   B (d - r)    for all r and d.

Pieces of one user are due in the order of the layers, so they arrive in that order. Constant shares are one
way to serve, so the optimum of `exact` stays feasible and the optimum here is never below it.

Whom to serve is NP-hard, already with one model of two layers a user, one start 0 and one deadline. For take
the NP-complete question whether n of 2n numbers a_k of sum 2Q sum to Q (partition into halves of one size).
Let A exceed all a_k, let user k need the area a_k by time t and 2A - a_k in all by u = t (2nA - Q) / Q, and
B = Q / t. Then n users fit iff their a_k sum to at most Q, and 2nA less that sum is at most 2nA - Q: iff the
sum is Q. And n + 1 users never fit. Hence a heuristic with a proven bound:

- Bound: of each user keep one piece, the least area of all its models, due at the latest of their last
  deadlines and released when the first user starts. These are jobs of one release, of which the algorithm
  of Moore and Hodgson serves the most.
- Answer: the better of two. Insert users into the optimum of constant shares by least area, as long as
  everyone's deadlines hold; or insert users by deadline and, when it no longer holds, drop the largest area.

Source: Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs",
Management Science 15 (1968), with Hodgson's form of the algorithm.

Axes: K users, I models, L layers, N downloads.
"""

import collections
import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.float64 import to_float64
from slide_jax.milp import PairNeeds, least_bandwidth_by_model
from slide_jax.problem import Allocation, Problem
from slide_jax.provisioning import CROWDED_OUT, SERVED

TOLERANCE = 1e-10
"""Part of its time by which a layer may come late: a tenth of what `verify` allows."""


class Download(NamedTuple):
    """Who has the whole spectrum when, in order of time.

    Attributes:
      user: index.
      begin_s, end_s: from when to when [s].
    """

    user: Int[Array, " N"]
    begin_s: Float[Array, " N"]
    end_s: Float[Array, " N"]


class ReleasedSpectrum(NamedTuple):
    """An allocation over time.

    Attributes:
      allocation: its bandwidths are means from the first start to the last deadline, its `upper_bound` is
        proven; `verify`, which knows constant shares, does not apply.
      download: the schedule.
    """

    allocation: Allocation
    download: Download


class Piece(NamedTuple):
    """Areas of spectrum and time [Hz s], from when on and by when they must arrive [s]; by deadline."""

    area: Float[Array, " N"]
    release_s: Float[Array, " N"]
    due_s: Float[Array, " N"]
    layer: Int[Array, " N"]


def released_spectrum(problem: Problem) -> ReleasedSpectrum:
    """Returns an allocation whose downloads take turns, never fewer users than `exact`, and a bound.

    Args:
      problem: linear; of hundreds of users, for the effort grows with K^2 L, times the number of distinct
        starts.

    Raises:
      InputError: the rate model is `shannon`, under which bits are no area.
    """
    if problem.rate_model != "linear":
        remedy = "make it linear, or use `exact`"
        raise InputError("rate_model", problem.rate_model, "bits must be areas of spectrum and time", remedy)
    problem = to_float64(problem)
    static, needs = exact(problem), least_bandwidth_by_model(problem)
    spectrum = float(problem.bandwidth_hz)
    possible = np.isfinite(needs.bandwidth_hz)
    pieces = {(k, i): _pieces(problem, needs, k, i) for i, k in np.argwhere(possible).tolist()}
    pieces = {pair: piece for pair, piece in pieces.items() if _feasible([piece], spectrum)}

    constant = {k: i for k, i in enumerate(static.model.tolist()) if i >= 0}
    answers = (_insert(pieces, constant, spectrum), _by_deadline(pieces, spectrum))
    models = max(answers, key=len)
    download, received_s = _schedule({k: pieces[k, i] for k, i in models.items()}, spectrum)
    allocation = _allocate(problem, static, needs, models, received_s, pieces, _bound(pieces, spectrum))
    return ReleasedSpectrum(allocation, download)


def _pieces(problem: Problem, needs: PairNeeds, k: int, i: int) -> Piece:
    users, bits = problem.users, problem.catalogue.layer_bits[i]
    flop = problem.catalogue.layer_flop[i]
    left = np.cumsum(flop[::-1])[::-1] / (needs.frequency_hz[i, k] * users.flop_per_cycle[k])
    layer = np.flatnonzero(bits > 0)
    due = users.deadline_s[k] - left[layer] + TOLERANCE * (users.deadline_s[k] - users.start_s[k])
    return Piece(
        bits[layer] / users.spectral_efficiency_bps_hz[k], np.full(layer.size, users.start_s[k]), due, layer
    )


def _feasible(pieces: list[Piece], spectrum_hz: float) -> bool:
    """Returns whether no window is asked for more than it holds."""
    area, release, due = (np.concatenate([piece[n] for piece in pieces]) for n in range(3))
    order = np.argsort(due, kind="stable")
    area, release, due = area[order], release[order], due[order]
    for begin in np.unique(release):
        asked = np.cumsum(np.where(release >= begin, area, 0.0))
        if np.any((release >= begin) & (asked > spectrum_hz * (due - begin))):
            return False
    return True


def _insert(pieces: dict, models: dict, spectrum_hz: float) -> dict:
    """Returns the models of the users served when others are inserted, least area first."""
    models = dict(models)
    for k, i in sorted(pieces, key=lambda pair: (pieces[pair].area.sum(), pair)):
        if k not in models:
            trial = models | {k: i}
            if _feasible([pieces[pair] for pair in trial.items()], spectrum_hz):
                models = trial
    return models


def _by_deadline(pieces: dict, spectrum_hz: float) -> dict:
    """Returns the models of the users served when each comes by deadline and the largest area goes."""
    smallest: dict[int, int] = {}
    for k, i in sorted(pieces, key=lambda pair: (pieces[pair].area.sum(), pair)):
        smallest.setdefault(k, i)
    models: dict[int, int] = {}
    for k, i in sorted(smallest.items(), key=lambda pair: pieces[pair].due_s.max(initial=-np.inf)):
        models[k] = i
        while models and not _feasible([pieces[pair] for pair in models.items()], spectrum_hz):
            del models[max(models, key=lambda j: pieces[j, models[j]].area.sum())]
    return models


def _bound(pieces: dict, spectrum_hz: float) -> int:
    """Returns how many users fit if each has but one piece, the easiest of all its models."""
    free = {k for (k, _), piece in pieces.items() if not piece.area.size}
    loaded = {pair: piece for pair, piece in pieces.items() if pair[0] not in free}
    begin = min((piece.release_s.min() for piece in loaded.values()), default=0.0)
    area, due = {}, {}
    for (k, _), piece in loaded.items():
        area[k] = min(area.get(k, np.inf), piece.area.sum())
        due[k] = max(due.get(k, -np.inf), piece.due_s[-1])
    served: list[float] = []
    for k in sorted(due, key=lambda k: due[k]):
        heapq.heappush(served, -area[k])
        if -sum(served) > spectrum_hz * (due[k] - begin):
            heapq.heappop(served)
    return len(free) + len(served)


def _schedule(pieces: dict[int, Piece], spectrum_hz: float) -> tuple[Download, dict]:
    """Returns the downloads of earliest deadline first, and when each (user, layer) has arrived."""
    jobs = collections.deque(
        sorted(
            (release, due, k, layer, area / spectrum_hz)
            for k, piece in pieces.items()
            for area, release, due, layer in zip(*(column.tolist() for column in piece), strict=True)
        )
    )
    now, waiting, turns, received = 0.0, [], [], {}
    while jobs or waiting:
        if not waiting:
            now = max(now, jobs[0][0])
        while jobs and jobs[0][0] <= now:
            _, due, k, layer, seconds = jobs.popleft()
            heapq.heappush(waiting, (due, k, layer, seconds))
        due, k, layer, seconds = heapq.heappop(waiting)
        end = now + seconds
        if jobs and jobs[0][0] < end:
            end = jobs[0][0]
            heapq.heappush(waiting, (due, k, layer, seconds - (end - now)))
        else:
            received[k, layer] = end
        if turns and turns[-1][0] == k and turns[-1][2] == now:
            turns[-1][2] = end
        else:
            turns.append([k, now, end])
        now = end
    user, begin, end = (
        (np.array(column) for column in zip(*turns, strict=True)) if turns else np.zeros((3, 0))
    )
    return Download(user.astype(np.int32), begin, end), received


def _allocate(problem, static, needs, models, received_s, pieces, bound) -> Allocation:
    users, catalogue = problem.users, problem.catalogue
    model = np.full(problem.num_users, -1, np.int32)
    bandwidth, frequency = np.zeros((2, problem.num_users))
    latency, energy = np.full((2, problem.num_users), np.nan)
    horizon = users.deadline_s.max(initial=-np.inf) - users.start_s.min(initial=np.inf)
    for k, i in models.items():
        model[k], frequency[k] = i, needs.frequency_hz[i, k]
        area, now, done = pieces[k, i].area.sum(), users.start_s[k], users.start_s[k]
        bandwidth[k] = area / horizon if area > 0 else 0.0
        for layer, flop in enumerate(catalogue.layer_flop[i].tolist()):
            now = received_s.get((k, layer), now)
            busy = flop / (frequency[k] * users.flop_per_cycle[k]) if flop > 0 else 0.0
            done = max(done, now) + busy
        latency[k] = done
        cycles = catalogue.layer_flop[i].sum() / users.flop_per_cycle[k]
        static_j = users.static_power_w[k] * cycles / frequency[k] if cycles > 0 else 0.0
        energy[k] = users.kappa_j_per_hz2_cycle[k] * frequency[k] ** 2 * cycles + static_j
    # Who was served by constant shares may have made room.
    others = np.where(static.reason == SERVED, CROWDED_OUT, static.reason)
    reason = np.where(model >= 0, SERVED, others).astype(np.int32)
    return Allocation(
        model,
        bandwidth,
        frequency,
        latency,
        energy,
        reason,
        upper_bound=float(bound),
        solver="released_spectrum",
    )
