"""The exact optimum in plain NumPy, twice: what `slide_jax.exact` is measured against.

Both give what the exact solver decides (served, model, clock, bandwidth), without latencies, energies and
reasons, and take the linear rate model without static power. Written to be fast: users in vectors.

Axes: K users, I models, L layers.
"""

from collections.abc import Callable, Iterable

import numpy as np

from slide_jax.hull import convex_hull
from slide_jax.problem import Problem

Answer = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Number of users served; who; model, clock and least bandwidth of each user."""


def solve_dense(problem: Problem) -> Answer:
    """Solves with every layer of every model."""
    bits, flop = problem.catalogue.layer_bits, problem.catalogue.layer_flop
    received = np.cumsum(bits, axis=1)
    remaining = np.cumsum(flop[:, ::-1], axis=1)[:, ::-1]
    return _solve(problem, lambda model: zip(received[model], remaining[model], strict=True))


def solve_hull(problem: Problem) -> Answer:
    """Solves with the layers on the convex hull."""
    hull = convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)

    def vertices(model: int) -> Iterable[tuple[float, float]]:
        return dict.fromkeys(zip(hull.bits[model].tolist(), hull.flop[model].tolist(), strict=True))

    return _solve(problem, vertices)


def _solve(problem: Problem, points: Callable[[int], Iterable[tuple[float, float]]]) -> Answer:
    users, catalogue = problem.users, problem.catalogue
    count = len(users.deadline_s)
    slack = users.deadline_s - users.start_s
    total = catalogue.layer_flop.sum(axis=1)
    best = np.full(count, np.inf)
    chosen, clock = np.full(count, -1), np.zeros(count)
    # More accurate models first, so that a strict comparison keeps them where rates are equal.
    for model in np.argsort(-catalogue.accuracy, kind="stable"):
        cycles = total[model] / users.flop_per_cycle
        frequency = np.minimum(
            np.sqrt(users.energy_j / (users.kappa_j_per_hz2_cycle * cycles)), users.f_max_hz
        )
        per_flop = 1 / (frequency * users.flop_per_cycle)
        rate = np.zeros(count)
        late = np.zeros(count, bool)
        for bits, flop in points(model):
            spare = slack - flop * per_flop
            late |= spare <= 0
            with np.errstate(divide="ignore"):
                np.maximum(rate, bits / spare, out=rate)
        possible = (
            ~late
            & (frequency >= users.f_min_hz)
            & (catalogue.task[model] == users.task)
            & (catalogue.accuracy[model] >= users.min_accuracy)
            & (catalogue.layer_bits[model].sum() <= users.memory_bits)
        )
        better = possible & (rate < best)
        best[better] = rate[better]
        chosen[better] = model
        clock[better] = frequency[better]
    bandwidth = best / users.spectral_efficiency_bps_hz
    order = np.argsort(bandwidth, kind="stable")
    fits = np.cumsum(bandwidth[order]) <= problem.bandwidth_hz * (1 + 1e-12)
    served = np.zeros(count, bool)
    served[order[fits]] = True
    return int(fits.sum()), served, chosen, clock, bandwidth
