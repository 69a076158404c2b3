"""Two solvers of the exact optimum in plain NumPy, the baselines of `slide_jax.exact`.

Both return the decisions (served, model, clock, bandwidth) without latencies, energies and reasons, for the
linear rate model without static power. They are written for speed: vectors of users, in blocks.

Axes: K users, I models, L layers.
"""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from slide_jax.hull import convex_hull
from slide_jax.problem import Problem

BLOCK = 16384
"""Users computed together, as in `slide_jax.provisioning`, so that arrays stay in the cache."""

Answer = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Number of users served, a mask of them, and model, clock and least bandwidth of each user."""


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
    count = problem.num_users
    vertices = [list(points(model)) for model in range(problem.num_models)]
    best, clock = np.full(count, np.inf), np.zeros(count)
    chosen = np.full(count, -1)
    for begin in range(0, count, BLOCK):
        block = slice(begin, begin + BLOCK)
        users = jax.tree.map(lambda column, block=block: column[block], problem.users)
        _provision(problem.catalogue, users, vertices, best[block], chosen[block], clock[block])
    bandwidth = best / problem.users.spectral_efficiency_bps_hz
    order = np.argsort(bandwidth, kind="stable")
    fits = np.cumsum(bandwidth[order]) <= problem.bandwidth_hz * (1 + 1e-12)
    served = np.zeros(count, bool)
    served[order[fits]] = True
    return int(fits.sum()), served, chosen, clock, bandwidth


def _provision(catalogue, users, vertices, best, chosen, clock):
    """Writes the least rate, the model and the clock of a block of users into `best`, `chosen`, `clock`."""
    slack = users.deadline_s - users.start_s
    total = catalogue.layer_flop.sum(axis=1)
    # More accurate models first, so that a strict comparison keeps them where rates are equal.
    for model in np.argsort(-catalogue.accuracy, kind="stable"):
        cycles = total[model] / users.flop_per_cycle
        frequency = np.minimum(
            np.sqrt(users.energy_j / (users.kappa_j_per_hz2_cycle * cycles)), users.f_max_hz
        )
        per_flop = 1 / (frequency * users.flop_per_cycle)
        rate = np.zeros(len(slack))
        late = np.zeros(len(slack), bool)
        for bits, flop in vertices[model]:
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
