"""Random SLIDE problems by family, sized so that about half of the users can be served.

Away from the family `exact fit` the numbers are continuous, so that no comparison is a matter of rounding.
"""

import dataclasses
import json
import math

import numpy as np
from hypothesis import strategies as st
from slide_oracles import least_bandwidth

from slide_jax.hull import Hull, convex_hull
from slide_jax.problem import RATE_MODELS, Problem, Users
from slide_jax.scenario import make_problem

CORNERS = (
    "none",
    "no feasible user",
    "zero layers",
    "one layer",
    "no spectrum",
    "exact fit",
    "equal users",
    "clock limits",
    "static power",
    "shannon cap",
    "zero signal",
    "memory",
    "named models",
)
"""Families of problems; `shannon cap` sets the rate model itself."""

TASKS = ("vision", "language")
TYPICAL_HZ, TYPICAL_FLOP_PER_CYCLE, TYPICAL_KAPPA = 1e9, 1000.0, 1e-27


@st.composite
def problems(draw, users=(1, 2, 5), models=(1, 3), layers=(1, 4), rate_models=RATE_MODELS, corners=CORNERS):
    """Draws a problem; few sizes, because each shape compiles anew."""
    sizes = [draw(st.sampled_from(choices)) for choices in (users, models, layers, rate_models, corners)]
    return random_problem(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), *sizes)


def random_problem(
    rng: np.random.Generator,
    users: int,
    models: int,
    layers: int,
    rate_model: str = "linear",
    corner: str = "none",
) -> Problem:
    """Returns a problem of a family.

    Args:
      users, models: how many.
      layers: of the longest model at most.
      rate_model: `linear` or `shannon`.
      corner: one of `CORNERS`.
    """
    if corner not in CORNERS:
        raise ValueError(f"corner {corner!r} is not among {CORNERS}")
    if corner == "exact fit":
        return _exact_fit(rng, users, models, layers, rate_model)
    if corner == "shannon cap":
        rate_model = "shannon"
    catalogue = _models(rng, models, 1 if corner == "one layer" else layers, corner)
    columns = _columns(rng, users, catalogue, corner)
    columns["snr_hz"] = _snr(columns, catalogue) * (
        rng.uniform(0.01, 0.4, users) if corner == "shannon cap" else 1
    )
    if corner == "zero signal":
        lost = rng.random(users) < 0.5
        columns["snr_hz"], columns["spectral_efficiency_bps_hz"] = (
            np.where(lost, 0.0, columns[name]) for name in ("snr_hz", "spectral_efficiency_bps_hz")
        )
    if corner == "equal users":
        columns = {name: np.repeat(column[:1], users) for name, column in columns.items()}
    if corner == "named models":
        by_name = rng.random(users) < 0.5
        columns["allowed"] = rng.random((users, models)) < 0.6
        columns["task"] = np.where(by_name, -1, columns["task"])
    problem = make_problem(catalogue, Users(**columns), 0.0, rate_model, tasks=TASKS)
    return problem if corner == "no spectrum" else _with_spectrum(rng, problem)


def _models(rng: np.random.Generator, models: int, layers: int, corner: str) -> list[dict]:
    """Returns a catalogue whose models take 0.2 to 0.8 s on a typical device."""
    zeros = corner in ("zero layers", "no spectrum")
    catalogue = []
    for i in range(models):
        number = int(rng.integers(1, layers + 1))
        bits, flop = rng.lognormal(0, 1, (2, number))
        bits *= 10 ** rng.uniform(6.5, 7.5) / bits.sum()
        flop *= TYPICAL_HZ * TYPICAL_FLOP_PER_CYCLE * rng.uniform(0.2, 0.8) / flop.sum()
        if zeros:
            bits, flop = (np.where(rng.random(number) < 0.4, 0.0, values) for values in (bits, flop))
        if zeros and rng.random() < 0.3:
            bits[:] = 0.0
        pairs = zip(bits.tolist(), flop.tolist(), strict=True)
        catalogue.append(
            {
                "name": f"model{i}",
                "task": TASKS[int(rng.integers(len(TASKS)))] if i else TASKS[0],
                "accuracy": float(rng.uniform(0.5, 0.95)),
                "layers": [{"bits": b, "flop": f} for b, f in pairs],
            }
        )
    return catalogue


def _columns(rng: np.random.Generator, users: int, catalogue: list[dict], corner: str) -> dict:
    """Returns the users but for their SNR."""
    model = rng.integers(len(catalogue), size=users)
    flop = np.array([sum(layer["flop"] for layer in m["layers"]) for m in catalogue])[model]
    bits = np.array([sum(layer["bits"] for layer in m["layers"]) for m in catalogue])[model]
    f_max = TYPICAL_HZ * rng.uniform(0.7, 1.3, users)
    flop_per_cycle = TYPICAL_FLOP_PER_CYCLE * rng.uniform(0.8, 1.25, users)
    kappa = TYPICAL_KAPPA * rng.uniform(0.5, 2, users)
    f_min = f_max * rng.uniform(0.2, 0.4, users)
    static = np.zeros(users)
    budget = rng.uniform(0.3, 2.0, users)
    if corner == "clock limits":
        f_min = rng.choice([0.0, 0.3, 1.0], users) * f_max
        budget = 10 ** rng.uniform(-2, 0.3, users)
    if corner == "static power":
        static = kappa * f_max**3 * rng.uniform(0.02, 1.0, users)
        f_min = rng.choice([0.0, 0.1, 0.5], users) * f_max
        budget = rng.uniform(0.3, 2.2, users)
    cycles = flop / flop_per_cycle
    start = rng.uniform(0, 0.3, users) * (rng.random(users) < 0.5)
    columns = {
        "task": np.array([TASKS.index(m["task"]) for m in catalogue])[model],
        "min_accuracy": rng.uniform(0.4, 0.8, users),
        "deadline_s": start + rng.uniform(0.8, 3.0, users),
        "start_s": start,
        # What the inference takes at the highest clock, times a factor; no limit for some.
        "energy_j": np.where(rng.random(users) < 0.2, np.inf, budget * kappa * f_max**2 * cycles),
        "spectral_efficiency_bps_hz": rng.uniform(1.0, 6.0, users),
        "f_min_hz": f_min,
        "f_max_hz": f_max,
        "flop_per_cycle": flop_per_cycle,
        "kappa_j_per_hz2_cycle": kappa,
        "static_power_w": static,
        "memory_bits": np.full(users, np.inf),
    }
    if corner == "memory":
        columns["memory_bits"] = bits * rng.choice([0.7, 1.5, np.inf], users)
    if corner == "no feasible user":
        spoilt = rng.integers(3, size=users)
        columns["min_accuracy"] = np.where(spoilt == 0, 0.99, columns["min_accuracy"])
        columns["deadline_s"] = np.where(spoilt == 1, 0.5 * start, columns["deadline_s"])
        columns["memory_bits"] = np.where(spoilt == 2, 1.0, columns["memory_bits"])
    return columns


def _snr(columns: dict, catalogue: list[dict]) -> np.ndarray:
    """Returns the SNR at which a typical download runs at about the spectral efficiency."""
    bits = np.mean([sum(layer["bits"] for layer in m["layers"]) for m in catalogue])
    efficiency = columns["spectral_efficiency_bps_hz"]
    typical_hz = max(bits, 1e5) / (columns["deadline_s"] * efficiency + 1e-9)
    return typical_hz * (2**efficiency - 1)


def _with_spectrum(rng: np.random.Generator, problem: Problem) -> Problem:
    """Returns the problem with a spectrum that about half of the users fill, by a rough estimate."""
    users, catalogue = problem.users, problem.catalogue
    time = np.maximum(users.deadline_s - users.start_s, 0.1)[:, None]
    speed = (users.f_max_hz * users.flop_per_cycle)[:, None]
    work = catalogue.layer_flop.sum(axis=1) / speed
    rate = catalogue.layer_bits.sum(axis=1) / np.maximum(time - work, 0.2 * time)
    fits = users.task[:, None] == catalogue.task
    fits = fits | ~fits.any(axis=1, keepdims=True)
    efficiency = np.maximum(users.spectral_efficiency_bps_hz, 1.0)
    needs = np.sort(np.where(fits, rate, np.inf).min(axis=1) / efficiency)
    # A whole number of equal users and a half: no fit hangs on rounding.
    half = problem.num_users // 2
    spectrum = needs[:half].sum() + rng.uniform(0.4, 0.9) * needs[half]
    return dataclasses.replace(problem, bandwidth_hz=np.float64(spectrum))


def _exact_fit(rng: np.random.Generator, users: int, models: int, layers: int, rate_model: str) -> Problem:
    """Returns a problem in which everything just fits, or just fails, in numbers that binary holds exactly.

    Each user meets one of its constraints with equality for some model: deadline, energy at the lowest
    clock, memory, or accuracy. The spectrum is the sum of the least bandwidths of the cheapest half.
    """
    hertz, flop_per_cycle, kappa = 2.0**30, 2.0**10, 2.0**-90
    catalogue = []
    for i in range(models):
        number = int(rng.integers(1, layers + 1))
        bits, flop = rng.integers(0, 5, (2, number)).astype(float)
        catalogue.append(
            {
                "name": f"model{i}",
                "task": TASKS[0],
                "accuracy": float(rng.choice([0.5, 0.75])),
                "layers": [
                    {"bits": b * 2.0**20, "flop": f * hertz * flop_per_cycle / 8}
                    for b, f in zip(bits.tolist(), flop.tolist(), strict=True)
                ],
            }
        )
    model = rng.integers(models, size=users)
    bits, flop = (
        np.array([sum(layer[key] for layer in m["layers"]) for m in catalogue])[model]
        for key in ("bits", "flop")
    )
    kind = rng.integers(4, size=users)
    start = rng.integers(0, 2, users) / 2
    cycles = flop / flop_per_cycle
    # At the lowest clock, half of the highest, the work takes twice its time.
    work_s = cycles / hertz
    columns = Users(
        task=np.zeros(users, np.int32),
        min_accuracy=np.where(kind == 0, 0.75, 0.0),
        deadline_s=start
        + work_s * np.where(kind == 2, 2, 1)
        + np.where(kind == 1, 0.0, rng.choice([0.5, 1, 2], users)),
        start_s=start,
        energy_j=np.where(kind == 2, kappa * (hertz / 2) ** 2 * cycles, np.inf),
        spectral_efficiency_bps_hz=rng.choice([1.0, 2.0, 4.0], users),
        snr_hz=rng.choice([2.0**24, 2.0**26], users),
        f_min_hz=hertz / 2,
        f_max_hz=hertz,
        flop_per_cycle=flop_per_cycle,
        kappa_j_per_hz2_cycle=kappa,
        static_power_w=0.0,
        memory_bits=np.where(kind == 3, bits, np.inf),
    )
    problem = make_problem(catalogue, columns, 0.0, rate_model, tasks=TASKS)
    least = np.sort(least_bandwidth(problem).min(axis=1))
    least = least[np.isfinite(least)]
    spectrum = math.fsum(least[: math.ceil(least.size / 2)])
    return dataclasses.replace(problem, bandwidth_hz=np.float64(spectrum))


def scenario(num_users: int = 2, rate_model: str = "linear") -> dict:
    """Returns a scenario in which every field stands."""
    layers = [{"bits": 3e5, "flop": 2e8}, {"bits": 0, "flop": 1e8}]
    user = {
        "task": "vision",
        "min_accuracy": 0.6,
        "deadline_s": 2.0,
        "start_s": 0.5,
        "energy_j": 5.0,
        "spectral_efficiency_bps_hz": 4.2,
        "snr_hz": 3e9,
        "device": {
            "f_min_hz": 3e8,
            "f_max_hz": 1.3e9,
            "flop_per_cycle": 2048,
            "kappa_j_per_hz2_cycle": 1e-28,
            "static_power_w": 0.25,
            "memory_bits": 8e9,
        },
    }
    content = {
        "bandwidth_hz": 1e8,
        "rate_model": rate_model,
        "models": [
            {"name": "small", "task": "vision", "accuracy": 0.7, "layers": layers},
            {"name": "chat", "task": "language", "accuracy": 1, "layers": layers[:1]},
        ],
        "users": [{"id": f"a{k}", **user} for k in range(num_users)],
    }
    # Through JSON, so that no two parts are one object.
    return json.loads(json.dumps(content))


def put(content: dict, path: tuple, value) -> None:
    """Sets the entry at a path of keys and indices; the value `delete` removes it."""
    for key in path[:-1]:
        content = content[key]
    if value is delete:
        del content[path[-1]]
    else:
        content[path[-1]] = value


def delete():
    """Stands for the removal of an entry; it is never called."""


def with_layers(problem: Problem, layers: int) -> Problem:
    """Pads the layers to a number, so that one compiled program serves."""
    padding = ((0, 0), (0, layers - problem.catalogue.layer_bits.shape[1]))
    catalogue = dataclasses.replace(
        problem.catalogue,
        layer_bits=np.pad(problem.catalogue.layer_bits, padding),
        layer_flop=np.pad(problem.catalogue.layer_flop, padding),
    )
    return dataclasses.replace(problem, catalogue=catalogue)


def hull_of(problem: Problem) -> Hull:
    return convex_hull(problem.catalogue.layer_bits, problem.catalogue.layer_flop)
