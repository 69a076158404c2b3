"""Verifies an allocation against its problem and names every constraint that it breaks.

Plain NumPy in float64, and independent of the solvers: latency is computed layer by layer from the recursion,
never by their closed forms.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from slide_jax.problem import REASONS, Allocation, Problem, Users, refuse_traced

TOLERANCE = 1e-9
"""Relative slack of latency (from the start), energy, clock and memory, also of reported values."""

ROUNDING = 4
"""Units in the last place of a time from 0 that rounding may add: starts may be far from 0."""

SPECTRUM_TOLERANCE = 1e-12
"""Relative slack of the spectrum's sum: an exact fit is a fit, in whatever order it is summed."""

HALVINGS = 60
"""Of the range of clocks, until the fastest that the energy allows is known to rounding."""


class Violation(NamedTuple):
    """One broken constraint.

    Attributes:
      user: the user's id; None where the constraint is one of all users together.
      constraint: its name, e.g. `deadline_s`.
      value: what the answer has.
      limit: what it should have, or keep to.

    >>> print(Violation("u3", "deadline_s", 2.5, 2.0))
    u3: deadline_s is 2.5, limit 2.0
    """

    user: str | None
    constraint: str
    value: Any
    limit: Any

    def __str__(self) -> str:
        who = "all users" if self.user is None else self.user
        return f"{who}: {self.constraint} is {self.value}, limit {self.limit}"


def verify(problem: Problem, allocation: Allocation) -> list[Violation]:
    """Returns the constraints that an answer breaks; none if it is feasible and reports correct values.

    Checked, by constraint name: `model` (exists), `admissible_model` (solves the task accurately enough, or
    is among those the user allows), `memory_bits`, `f_min_hz`, `f_max_hz`, `energy_j`, `deadline_s`,
    `bandwidth_hz` (not negative, not nan; nothing for users who are not served; in sum no more than the
    spectrum), `frequency_hz` (0 for users who are not served), `reported latency_s` and `reported energy_j`
    (nan for users who are not served), `reason` (`served` for exactly the served; of the others the first
    constraint that the model breaks which comes furthest) and `upper_bound` (not below the
    throughput). An answer of the wrong length or dtype breaks `shape` or `dtype` alone.

    An answer to another problem is to be verified against that one: an answer of `dai` against
    `baselines.download_then_infer(problem)`. Clocks by layer, released spectrum and freed memory
    (`extensions`) break constraints of this problem on purpose.

    Args:
      problem: of K users, arrays of any kind.
      allocation: arrays of length K.
    """
    refuse_traced("verify", problem, allocation)
    num_users = problem.num_users
    columns = ("model", "bandwidth_hz", "frequency_hz", "latency_s", "energy_j", "reason")
    answer = {name: np.asarray(getattr(allocation, name)) for name in columns}
    for name, column in answer.items():
        if column.shape != (num_users,):
            return [Violation(None, "shape", f"{name} {column.shape}", (num_users,))]
        kinds = "iu" if name in ("model", "reason") else "fiu"
        if column.dtype.kind not in kinds:
            limit = "integers" if kinds == "iu" else "numbers"
            return [Violation(None, "dtype", f"{name} {column.dtype}", limit)]
    catalogue, users = problem.catalogue, problem.users
    names = problem.labels.users
    violations = []

    def check(good: np.ndarray, of: np.ndarray, constraint: str, value: Any, limit: Any) -> None:
        """Notes the users `of` a constraint who are not `good`; nan compares as not good."""
        value, limit = (np.broadcast_to(x, num_users) for x in (value, limit))
        for k in np.flatnonzero(of & ~good).tolist():
            user = f"u{k}" if names is None else names[k]
            violations.append(Violation(user, constraint, value[k].item(), limit[k].item()))

    everyone = np.ones(num_users, bool)
    model, bandwidth = answer["model"], answer["bandwidth_hz"].astype(np.float64)
    exists = (model >= -1) & (model < problem.num_models)
    check(exists, everyone, "model", model, problem.num_models - 1)
    check(bandwidth >= 0, everyone, "bandwidth_hz", bandwidth, 0.0)
    check(bandwidth == 0, model < 0, "bandwidth_hz", bandwidth, 0.0)
    reason = answer["reason"]
    expected = np.where(model >= 0, 0, _nearest_reason(problem, reason, model < 0))
    check(reason == expected, everyone, "reason", reason, expected)

    served = exists & (model >= 0)
    chosen = np.where(served, model, 0)
    check(_is_admissible(problem, chosen), served, "admissible_model", chosen, "an admissible one")
    bits = np.sum(np.asarray(catalogue.layer_bits, np.float64), axis=1)[chosen]
    memory = np.asarray(users.memory_bits, np.float64)
    check(bits <= memory * (1 + TOLERANCE), served, "memory_bits", bits, memory)

    clock = answer["frequency_hz"].astype(np.float64)
    f_min, f_max = np.asarray(users.f_min_hz, np.float64), np.asarray(users.f_max_hz, np.float64)
    check(clock >= f_min * (1 - TOLERANCE), served, "f_min_hz", clock, f_min)
    check(clock <= f_max * (1 + TOLERANCE), served, "f_max_hz", clock, f_max)
    check(clock == 0, model < 0, "frequency_hz", clock, 0.0)
    taking, energy = _replay(problem, chosen, bandwidth, clock)
    budget, deadline, start = (
        np.asarray(column, np.float64) for column in (users.energy_j, users.deadline_s, users.start_s)
    )
    check(energy <= budget * (1 + TOLERANCE), served, "energy_j", energy, budget)
    latency, rounding = start + taking, ROUNDING * np.spacing(deadline)
    in_time = taking <= (deadline - start) * (1 + TOLERANCE) + rounding
    check(in_time, served, "deadline_s", latency, deadline)
    reported = answer["latency_s"].astype(np.float64)
    same = np.abs(reported - latency) <= TOLERANCE * taking + rounding
    check(same, served, "reported latency_s", reported, latency)
    check(np.isnan(reported), model < 0, "reported latency_s", reported, np.nan)
    reported = answer["energy_j"].astype(np.float64)
    same = np.isclose(reported, energy, rtol=TOLERANCE, atol=0.0)
    check(same, served, "reported energy_j", reported, energy)
    check(np.isnan(reported), model < 0, "reported energy_j", reported, np.nan)

    spectrum = float(problem.bandwidth_hz)
    used = math.fsum(np.where(bandwidth >= 0, bandwidth, 0.0))
    if not used <= spectrum * (1 + SPECTRUM_TOLERANCE):
        violations.append(Violation(None, "bandwidth_hz", used, spectrum))
    bound, throughput = float(allocation.upper_bound), allocation.throughput
    if bound < throughput:
        violations.append(Violation(None, "upper_bound", bound, throughput))
    return violations


def _nearest_reason(problem: Problem, reason: np.ndarray, refused: np.ndarray) -> np.ndarray:
    """Returns the reasons [K], or where a user cannot have been refused for them the nearest possible ones.

    A model stops at the first constraint that it breaks, in the order of `REASONS`; the one that comes
    furthest counts. What lies within the tolerance of a limit may stop there or not.

    Args:
      reason: int [K].
      refused: bool [K], the users who are judged.
    """
    last = len(REASONS) - 1
    least, most = np.ones((2, problem.num_users), np.int64)
    for model in range(problem.num_models):
        admissible = _is_admissible(problem, np.full(problem.num_users, model))
        who = np.flatnonzero(refused & admissible & (least < last))  # nothing comes further than `last`
        judged = _of_users(problem, who)
        for bound, slack in ((least, 1 - TOLERANCE), (most, 1 + TOLERANCE)):
            bound[who] = np.maximum(bound[who], _stop_of(judged, model, slack))
    return np.where(refused, np.clip(reason, least, np.maximum(least, most)), reason)


def _of_users(problem: Problem, who: np.ndarray) -> Problem:
    """Returns the problem with these users alone."""
    columns = dataclasses.asdict(problem.users).items()
    chosen = {name: None if column is None else np.asarray(column)[who] for name, column in columns}
    return dataclasses.replace(problem, users=Users(**chosen))


def _stop_of(problem: Problem, model: int, slack: float) -> np.ndarray:
    """Returns the reason [K] at which an admissible model stops for each user, its limits times `slack`.

    The fastest clock that the energy allows has to do the work in the time there is, then the whole spectrum
    to carry the layers, each by the replay of the recursion.
    """
    users = problem.users
    memory, deadline, start, signal = (
        np.asarray(column, np.float64)
        for column in (
            users.memory_bits,
            users.deadline_s,
            users.start_s,
            users.spectral_efficiency_bps_hz if problem.rate_model == "linear" else users.snr_hz,
        )
    )
    chosen = np.full(problem.num_users, model)
    bits = np.sum(np.asarray(problem.catalogue.layer_bits[model], np.float64))
    clock = _fastest_clock(problem, model, slack)
    time_s = (deadline - start) * slack + np.sign(slack - 1) * ROUNDING * np.spacing(deadline)

    def in_time(bandwidth):
        return _replay(problem, chosen, np.full(clock.shape, bandwidth), clock)[0] <= time_s

    spectrum = float(problem.bandwidth_hz) * (1 + np.sign(slack - 1) * SPECTRUM_TOLERANCE)
    # So wide that a rate is at its limit to rounding: for `shannon` snr_hz / ln 2.
    wide = np.inf if problem.rate_model == "linear" else np.max(signal, initial=1.0) * 1e18
    stops = [
        ("memory smaller than the model", bits > memory * slack),
        ("energy budget too small for the lowest clock", ~(clock > 0)),
        ("deadline shorter than compute", ~_computes_in(problem, model, clock, time_s)),
        ("no signal", (signal <= 0) & (bits > 0)),
        ("rate above what the channel can carry", ~in_time(wide)),
        ("needs more than the whole spectrum", ~in_time(spectrum)),
    ]
    last = REASONS.index("spectrum used by others")
    return np.select([stopped for _, stopped in stops], [REASONS.index(name) for name, _ in stops], last)


def _computes_in(problem: Problem, model: int, clock: np.ndarray, time_s: np.ndarray) -> np.ndarray:
    """Returns for whom the work of a model takes less than `time_s` at a clock, all layers being there."""
    flop = np.sum(np.asarray(problem.catalogue.layer_flop[model], np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        busy = np.where(flop > 0, flop / (clock * np.asarray(problem.users.flop_per_cycle, np.float64)), 0.0)
    return busy < time_s


def _fastest_clock(problem: Problem, model: int, slack: float) -> np.ndarray:
    """Returns the fastest clock [Hz] at which each user's energy, times `slack`, runs a model; 0: none.

    Energy falls with the clock down to the thriftiest one and rises from there. Without static power the
    clock is sqrt(energy / (kappa cycles)); with it, it is searched above the thriftiest by halving.
    """
    users = problem.users
    budget, f_min, f_max, flop_per_cycle, kappa, static = (
        np.asarray(column, np.float64)
        for column in (
            users.energy_j,
            users.f_min_hz,
            users.f_max_hz,
            users.flop_per_cycle,
            users.kappa_j_per_hz2_cycle,
            users.static_power_w,
        )
    )
    cycles = np.sum(np.asarray(problem.catalogue.layer_flop[model], np.float64)) / flop_per_cycle
    budget = budget * slack

    def fits(clock):
        drawn = np.where(static * cycles > 0, static * cycles / clock, 0.0)
        return kappa * clock**2 * cycles + drawn <= budget

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low = np.clip(np.nan_to_num(np.cbrt(static / (2 * kappa)), posinf=np.inf), f_min, f_max)
        runs, best = fits(low), np.sqrt(budget / (kappa * cycles))
        best = np.where(fits(f_max), f_max, np.clip(best, f_min, f_max))
        if np.any(static > 0):
            high = best
            for _ in range(HALVINGS):
                middle = np.sqrt(low) * np.sqrt(high)
                low, high = np.where(fits(middle), middle, low), np.where(fits(middle), high, middle)
            best = np.where((static > 0) & ~fits(f_max), low, best)
    return np.where(runs, best, 0.0)


def _is_admissible(problem: Problem, model: np.ndarray) -> np.ndarray:
    """Returns whether each user's model solves its task accurately enough, or is one that it names."""
    catalogue, users = problem.catalogue, problem.users
    if users.allowed is not None:
        return np.asarray(users.allowed)[np.arange(model.size), model]
    accuracy = np.asarray(catalogue.accuracy)[model]
    same_task = np.asarray(catalogue.task)[model] == np.asarray(users.task)
    return same_task & (accuracy >= np.asarray(users.min_accuracy))


def _replay(problem: Problem, model: np.ndarray, bandwidth: np.ndarray, clock: np.ndarray):
    """Returns how long after its start each user's task is finished [s], and the inference's energy [J].

    D_l = (s_1 + ... + s_l) / r, C_l = max(D_l, C_{l-1}) + w_l / v, C_0 = 0. No bits and no work take
    no time, even at no rate or clock.
    """
    users = problem.users
    layer_bits, layer_flop = (
        np.asarray(table, np.float64)
        for table in (problem.catalogue.layer_bits, problem.catalogue.layer_flop)
    )
    flop_per_cycle, kappa, static, efficiency, snr = (
        np.asarray(column, np.float64)
        for column in (
            users.flop_per_cycle,
            users.kappa_j_per_hz2_cycle,
            users.static_power_w,
            users.spectral_efficiency_bps_hz,
            users.snr_hz,
        )
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if problem.rate_model == "linear":
            rate = bandwidth * efficiency
        else:
            rate = np.where(bandwidth > 0, bandwidth * np.log1p(snr / bandwidth) / np.log(2), 0.0)
        received, done = np.zeros_like(rate), np.zeros_like(rate)
        for bits, flop in zip(layer_bits.T, layer_flop.T, strict=True):
            received = received + bits[model]
            arrival = np.where(received > 0, received / rate, 0.0)
            busy = np.where(flop[model] > 0, flop[model] / (clock * flop_per_cycle), 0.0)
            done = np.maximum(arrival, done) + busy
        cycles = np.sum(layer_flop, axis=1)[model] / flop_per_cycle
        static_j = np.where(static * cycles > 0, static * cycles / clock, 0.0)
        energy = kappa * clock**2 * cycles + static_j
    return done, energy
