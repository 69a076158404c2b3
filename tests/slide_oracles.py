"""Brute force for small SLIDE problems: bisection on the replayed recursion, every admission.

Plain Python. Nothing here knows the closed forms or the order in which the package admits users.
"""

import math

import numpy as np

from slide_jax.problem import Allocation, Problem

NO_SLACK = 1e-10
"""Share of a user's time: a download that would have to be faster than this never fits."""


def best_throughput(problem: Problem) -> int:
    """Returns the most users that any choice of models and admissions serves."""
    return len(_best_choice(problem, least_bandwidth(problem)))


def best_allocation(problem: Problem) -> Allocation:
    """Returns one best answer, each user at its best clock with its least bandwidth."""
    least, clocks = least_bandwidth(problem), best_clock(problem)
    choice = _best_choice(problem, least)
    model = np.full(problem.num_users, -1, np.int32)
    bandwidth, frequency = np.zeros((2, problem.num_users))
    latency, energy = np.full((2, problem.num_users), np.nan)
    for k, i in choice.items():
        model[k], bandwidth[k], frequency[k] = i, least[k, i], clocks[k, i]
        latency[k] = latency_s(problem, k, i, least[k, i], clocks[k, i])
        energy[k] = energy_j(problem, k, i, clocks[k, i])
    return Allocation(
        model=model,
        bandwidth_hz=bandwidth,
        frequency_hz=frequency,
        latency_s=latency,
        energy_j=energy,
        reason=np.array(
            [0 if k in choice else _reason(problem, k, least[k]) for k in range(model.size)], np.int32
        ),
        solver="brute force",
    )


def _reason(problem: Problem, k: int, least_hz: np.ndarray) -> int:
    """Returns why a user is not served: the constraint at which the model that came furthest stopped."""
    models = [i for i in range(problem.num_models) if is_admissible(problem, k, i)]
    fitting = [i for i in models if fits_memory(problem, k, i)]
    clocks = {i: _best_clock(problem, k, i) for i in fitting}
    running = [i for i in fitting if np.isfinite(clocks[i])]
    for left, reason in ((models, 1), (fitting, 2), (running, 3)):
        if not left:
            return reason
    if np.isfinite(least_hz).any():
        return 7 if least_hz.min() > problem.bandwidth_hz * (1 + 1e-9) else 8
    deadline = float(problem.users.deadline_s[k])
    if all(_replay(problem, k, i, math.inf, clocks[i]) >= deadline for i in running):
        return 4
    return 6 if rate_bps(problem, k, 1.0) > 0 else 5


def least_bandwidth(problem: Problem) -> np.ndarray:
    """Returns the least bandwidth with which each pair of user and model keeps every constraint, [K, I] [Hz].

    Infinite where none does, whatever the spectrum.
    """
    clocks = best_clock(problem)
    least = np.full(clocks.shape, np.inf)
    for k, i in np.argwhere(np.isfinite(clocks)):
        least[k, i] = _least_bandwidth(problem, k, i, clocks[k, i])
    return least


def best_clock(problem: Problem) -> np.ndarray:
    """Returns the highest clock within the energy, [K, I] [Hz]; nan: none, or the model is not admissible."""
    clocks = np.full((problem.num_users, problem.num_models), np.nan)
    for k, i in np.ndindex(clocks.shape):
        if is_admissible(problem, k, i) and fits_memory(problem, k, i):
            clocks[k, i] = _best_clock(problem, k, i)
    return clocks


def is_admissible(problem: Problem, k: int, i: int) -> bool:
    users, catalogue = problem.users, problem.catalogue
    if users.allowed is not None:
        return bool(users.allowed[k, i])
    return users.task[k] == catalogue.task[i] and catalogue.accuracy[i] >= users.min_accuracy[k]


def fits_memory(problem: Problem, k: int, i: int) -> bool:
    return math.fsum(problem.catalogue.layer_bits[i]) <= problem.users.memory_bits[k]


def rate_bps(problem: Problem, k: int, bandwidth_hz: float) -> float:
    if bandwidth_hz == 0:
        return 0.0
    if problem.rate_model == "linear":
        return bandwidth_hz * float(problem.users.spectral_efficiency_bps_hz[k])
    return bandwidth_hz * math.log1p(float(problem.users.snr_hz[k]) / bandwidth_hz) / math.log(2)


def latency_s(problem: Problem, k: int, i: int, bandwidth_hz: float, frequency_hz: float) -> float:
    return _replay(problem, k, i, rate_bps(problem, k, bandwidth_hz), frequency_hz)


def energy_j(problem: Problem, k: int, i: int, frequency_hz: float) -> float:
    users = problem.users
    cycles = math.fsum(problem.catalogue.layer_flop[i]) / float(users.flop_per_cycle[k])
    dynamic = float(users.kappa_j_per_hz2_cycle[k]) * frequency_hz**2 * cycles
    static = float(users.static_power_w[k]) * cycles
    return dynamic + _ratio(static, frequency_hz)


def _ratio(amount: float, speed: float) -> float:
    """Returns amount / speed; nothing takes no time, something at no speed for ever."""
    if amount == 0:
        return 0.0
    return amount / speed if speed > 0 else math.inf


def _replay(problem: Problem, k: int, i: int, rate: float, frequency_hz: float) -> float:
    """Returns the completion of the last layer, from time 0."""
    start, speed = float(problem.users.start_s[k]), frequency_hz * float(problem.users.flop_per_cycle[k])
    received, done = 0.0, start
    for bits, flop in zip(problem.catalogue.layer_bits[i], problem.catalogue.layer_flop[i], strict=True):
        received += float(bits)
        done = max(start + _ratio(received, rate), done) + _ratio(float(flop), speed)
    return done


def _least_bandwidth(problem: Problem, k: int, i: int, frequency_hz: float) -> float:
    start, deadline = float(problem.users.start_s[k]), float(problem.users.deadline_s[k])

    def in_time(bandwidth_hz: float) -> bool:
        return latency_s(problem, k, i, bandwidth_hz, frequency_hz) <= deadline

    if in_time(0.0):
        return 0.0
    size = math.fsum(problem.catalogue.layer_bits[i])
    if size == 0 or deadline <= start:
        return math.inf
    # At such a rate what is left of the download still shows in the latency: without slack it is late.
    if _replay(problem, k, i, size / (NO_SLACK * (deadline - start)), frequency_hz) > deadline:
        return math.inf
    low, high = 0.0, 1.0
    while not in_time(high):
        low, high = high, 2 * high
        if high > 2.0**200:
            return math.inf
    return _bisect(in_time, low, high)


def _best_clock(problem: Problem, k: int, i: int) -> float:
    low, high = float(problem.users.f_min_hz[k]), float(problem.users.f_max_hz[k])
    budget = float(problem.users.energy_j[k])

    def too_much(frequency_hz: float) -> bool:
        return energy_j(problem, k, i, frequency_hz) > budget

    if not too_much(high):
        return high
    if too_much(low):
        low = _thriftiest(lambda frequency_hz: energy_j(problem, k, i, frequency_hz), low, high)
        if too_much(low):
            return math.nan
    above = _bisect(too_much, low, high)
    return max(low, math.nextafter(above, 0.0))


def _thriftiest(energy, low: float, high: float) -> float:
    """Returns where a function that falls and then rises is least, by thirds."""
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if energy(left) <= energy(right) else (left, high)
    return (low + high) / 2


def _bisect(holds, low: float, high: float) -> float:
    """Returns the least number for which a condition holds that `high` meets and `low` does not."""
    for _ in range(2000):
        middle = low + (high - low) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _best_choice(problem: Problem, least: np.ndarray) -> dict[int, int]:
    """Returns the model of each user served, by trying all (I + 1)^K choices whose sums fit."""
    limit = float(problem.bandwidth_hz) * (1 + 1e-12)
    totals, counts, choices = np.zeros(1), np.zeros(1, int), np.zeros((1, 0), int)
    for k in range(problem.num_users):
        options = np.concatenate([[0.0], least[k]])
        sums = totals[:, None] + options
        before, option = np.nonzero(sums <= limit)
        totals = sums[before, option]
        counts = counts[before] + (option > 0)
        choices = np.column_stack([choices[before], option - 1])
    best = choices[np.argmax(counts)]
    return {k: int(i) for k, i in enumerate(best) if i >= 0}
