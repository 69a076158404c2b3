"""Device profiles: how many experts a device can train, what it sends and how long it takes.

Everything follows from the profile and the model's real sizes. Pure functions of numbers.
Axes: L MoE layers, E experts.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax.cost import ModelCost
from hfedmoe_jax.errors import InputError


class DeviceProfile(NamedTuple):
    """What a class of devices has for training.

    Attributes:
      name: of the class.
      memory_bytes: memory free for training.
      flop_per_s: sustained compute, FLOP/s.
      uplink_bps, downlink_bps: link rates, bit/s.
    """

    name: str
    memory_bytes: float
    flop_per_s: float
    uplink_bps: float
    downlink_bps: float


MOST = 1e21
"""The largest figure of a device: a thousand exaflop/s."""


class ScoringPasses(NamedTuple):
    """What scoring adds to a client's round, in units of forward passes.

    Attributes:
      count: how many batches are scored by a pass of their own.
      shared, experts: each such pass costs as much as so many forward passes of the shared part
        and of the experts.
    """

    count: int
    shared: int
    experts: int


NO_SCORING = ScoringPasses(0, 0, 0)


def read_profiles(classes: ConfigDict) -> tuple[list[DeviceProfile], list[float]]:
    """Returns the profiles of the section `devices` in order of name, and their shares of the population.

    Raises:
      InputError: a profile with a figure out of range, or shares that sum to nothing.
    """
    profiles, shares = [], []
    for name in sorted(classes):
        entry = classes[name]
        profile = DeviceProfile(name, *(float(entry[field]) for field in DeviceProfile._fields[1:]))
        for field, value in zip(DeviceProfile._fields[1:], profile[1:], strict=True):
            if not 1 <= value <= MOST:
                problem = f"must be at least 1 and at most {MOST:g}"
                raise InputError(f"devices.{name}.{field}", value, problem, "give the device's figure")
        if not 0 <= entry.share < np.inf:
            problem = "must be finite and not negative"
            raise InputError(f"devices.{name}.share", entry.share, problem, "use 0 to leave it out")
        profiles.append(profile)
        shares.append(float(entry.share))
    if not sum(shares) > 0:
        raise InputError("devices", list(classes), "no class has a positive share", "give one a share")
    return profiles, shares


def assign_devices(num_clients: int, shares: list[float], rng: np.random.Generator) -> np.ndarray:
    """Returns each client's class, int [num_clients]: counts by largest remainder, order by chance."""
    exact = np.asarray(shares) / np.sum(shares) * num_clients
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: num_clients - counts.sum()]:
        counts[index] += 1
    return rng.permutation(np.repeat(np.arange(len(shares)), counts))


def memory_needed(cost: ModelCost, budget: int, forward: str) -> int:
    """Returns the bytes that training `budget` experts a batch takes.

    The shared part and the experts that a batch trains are held with gradients, optimizer state and
    activations. `forward=routed` also runs the other experts, so holds their parameters; `active` does
    not (our decision: the paper's forward may not fit the device it is meant for). Optimizer state of
    experts that earlier batches of the round trained is not charged: with `importance.refresh=round`
    there is none, with `step` and `previous` a device would keep it elsewhere.
    """
    resident = cost.all_experts if forward == "routed" else budget
    return (
        cost.frozen_bytes
        + cost.shared_training_bytes
        + resident * cost.expert_parameter_bytes
        + budget * cost.expert_training_bytes
    )


def expert_budget(profile: DeviceProfile, cost: ModelCost, forward: str) -> int:
    """Returns C_budget, the most experts over all layers that fit the memory; at most all.

    Raises:
      InputError: not even one expert fits; says how much memory is missing.
    """
    missing = memory_needed(cost, 1, forward) - profile.memory_bytes
    if missing > 0:
        raise InputError(
            f"devices.{profile.name}.memory_bytes",
            profile.memory_bytes,
            f"too small by {missing:,.0f} bytes for the shared part and one expert",
            "give more memory, a smaller model or batch"
            + (", or fl.forward=active" if forward == "routed" else ""),
        )
    one_more = memory_needed(cost, 2, forward) - memory_needed(cost, 1, forward)
    return int(min(cost.all_experts, 1 + -missing // one_more))


def fraction_budget(fraction: float, num_experts: int) -> int:
    """Returns the budget `floor(fraction * L * E)` that a config fixes for every client.

    Raises:
      InputError: a fraction outside (0, 1] or below one expert.
    """
    if not 0 < fraction <= 1:
        raise InputError("budget.fraction", fraction, "must be in (0, 1], or 0 to use the devices",
                         "use e.g. 0.25")  # fmt: skip
    budget = int(np.floor(fraction * num_experts + 1e-9))
    if budget < 1:
        raise InputError("budget.fraction", fraction, f"is {fraction * num_experts:.3g} of one expert",
                         f"use at least {1 / num_experts:.4g}, one of {num_experts} experts")  # fmt: skip
    return budget


def compute_seconds(
    profile: DeviceProfile,
    cost: ModelCost,
    steps: int,
    assignments: float,
    trained_assignments: float,
    scoring: ScoringPasses,
) -> float:
    """Returns how long a client computes in a round.

    Forward FLOP count once, and each of the two backward products (for the weights and for
    the input) as much again; an expert's backward counts only where it was trained.

    Args:
      steps: local steps.
      assignments, trained_assignments: token-expert pairs computed a step, all and of trained experts.
      scoring: passes beside the training steps.
    """
    expert_flop = assignments * cost.assignment_flop
    flop = steps * (3 * cost.shared_flop + expert_flop + 2 * trained_assignments * cost.assignment_flop)
    flop += scoring.count * (scoring.shared * cost.shared_flop + scoring.experts * expert_flop)
    return flop / profile.flop_per_s


def transfer_seconds(profile: DeviceProfile, bytes_down: float, bytes_up: float) -> float:
    """Returns how long a client receives and sends."""
    return 8 * bytes_down / profile.downlink_bps + 8 * bytes_up / profile.uplink_bps
