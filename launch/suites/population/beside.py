"""The suite `population` beside other packages: one model, data and mathematics, losses compared."""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.params import merge_params
from launch.suites.population.peers import ARRANGEMENTS, require
from launch.suites.population.rounds import LEARNING_RATE, SHARE, Rounds, Size
from launch.suites.population.torch_step import Loop, Settings, Task
from launch.suites.timing import Table, Timing, rate, ratio, time_together

COMPARED_ROUNDS = 5
LARGEST_DIFFERENCE = 1e-3  # nats, of a round's mean loss
REFERENCE = "PyTorch"
PACKAGES = {"PyTorch": "torch", "pfl-research": "pfl", "Flower": "flwr"}
OURS, OURS_ACTIVE = "ours", f"ours, {SHARE:.0%} of the experts, active"


def peers_table(size: Size, clients: int, mesh: Mesh, repeats: int) -> Table:
    """Compares the engine with every peer.

    Raises:
      InputError: a package is missing.
      AssertionError: a peer's losses are not ours.
    """
    ours = Rounds(size, clients, mesh)
    task = make_task(ours)
    active = Rounds(
        size, clients, mesh, budgets=(SHARE,),
        fl=dict(algorithm="hfedmoe", forward="active"), importance=dict(refresh="previous"),
    )  # fmt: skip
    own = {OURS: ours.of(clients), OURS_ACTIVE: active.of(clients)}
    peers = arrangements()
    losses: dict[str, list[np.ndarray]] = {name: [] for name in peers}
    rows = []

    def call(name, peer):
        return lambda: losses[name].append(peer.round())

    def row(name: str, times: dict[str, Timing], fastest: str) -> list:
        apart = difference(losses[name], ours.losses) if name in losses else None
        over = ratio(times[fastest], times[name]), ratio(times[name], times[OURS])
        return [name, rate(times[name], task.client_steps), *over, apart]

    # Not all at once: each peer has processes with a copy of its libraries.
    names = [name for name in peers if name.split(",")[0] == REFERENCE]
    with contextlib.ExitStack() as stack:
        opened = {name: call(name, stack.enter_context(peers[name](task))) for name in names}
        times = time_together(repeats, **own, **opened)
        fastest = min(opened, key=lambda name: times[name].median_s)
        rows += [row(name, times, fastest) for name in times]
    others = sorted({name.split(",")[0] for name in peers} - {REFERENCE})
    for other in others:
        names = [fastest, *(name for name in peers if name.split(",")[0] == other)]
        losses[fastest] = []
        with contextlib.ExitStack() as stack:
            opened = {name: call(name, stack.enter_context(peers[name](task))) for name in names}
            times = time_together(repeats, **own, **opened)
            rows += [row(name, times, fastest) for name in names[1:]]
    largest = max(value for *_, value in rows if value is not None)
    compared = ours.losses[:COMPARED_ROUNDS]
    fall = np.mean(compared[0]) - np.mean(compared[-1])
    return Table(
        f"Beside other packages, {clients} clients of the {size.name} model, fedavg; client-steps/s",
        ["who", "client-steps/s", f"over {fastest}", "ours over it", "largest difference of a loss"],
        rows,
        f"Mean losses of a round apart from ours, over the first {len(compared)} rounds: at most "
        f"{largest:.1e} nats ({LARGEST_DIFFERENCE:g} would have stopped the suite); they fell by "
        f"{fall:.2g}. The packages take turns in groups, with ours and {fastest} in each; a ratio is of its "
        f"group. At {SHARE:.0%} "
        f"{np.mean(active.report.trained_size):.3g} of {size.all_experts} experts were trained."
        + "".join(f" {package} is not installed." for package in absent()),
    )


def make_task(ours: Rounds) -> Task:
    """Returns what `ours` computes in a round, for peers."""
    size = ours.size
    data = ours.client_data(np.arange(len(ours.budget)))
    return Task(
        params=merge_params(jax.device_get(ours.params)),
        tokens=data.tokens,
        labels=data.labels,
        num_examples=100 * data.size,  # all alike; packages count examples in whole numbers
        num_heads=size.num_heads,
        capacity=size.capacity,
        learning_rate=LEARNING_RATE,
    )


def package_of(name: str) -> str:
    """Returns the package that an arrangement needs."""
    return PACKAGES[name.split(",")[0]]


def absent() -> list[str]:
    """Returns the packages that are not installed; they are left out, and the table says so."""
    return [package for package in PACKAGES.values() if importlib.util.find_spec(package) is None]


def arrangements() -> dict[str, Callable]:
    """Returns the peers of this machine: on a GPU that PyTorch can use its loop there, else all on the CPU.

    Raises:
      InputError: PyTorch is not installed, or JAX computes on an accelerator that PyTorch cannot use.
    """
    if jax.default_backend() == "cpu":
        missing = absent()
        if PACKAGES[REFERENCE] in missing:
            require(PACKAGES[REFERENCE])
        return {name: peer for name, peer in ARRANGEMENTS.items() if package_of(name) not in missing}
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            settings = {REFERENCE: Settings(False, "mkl"), f"{REFERENCE}, compiled": Settings(True, "mkl")}
            return {
                name: functools.partial(Loop, settings=each, device="cuda") for name, each in settings.items()
            }
    problem = f"needs PyTorch on the {jax.default_backend()} that JAX uses"
    raise InputError("peers", True, problem, "install PyTorch for it, or leave --peers away")


def difference(theirs: Sequence[Float[np.ndarray, " clients"]], ours: Sequence) -> float:
    """Returns the largest difference between the mean losses of a round.

    A client's own loss may differ by more after a few rounds: rounding sends a token to another expert.

    Raises:
      AssertionError: it is not below `LARGEST_DIFFERENCE`.
    """
    rounds = min(COMPARED_ROUNDS, len(theirs), len(ours))
    apart = np.mean(np.array(theirs[:rounds]) - np.array(ours[:rounds]), axis=-1)
    largest = float(np.max(np.abs(apart)))
    if not largest < LARGEST_DIFFERENCE:
        raise AssertionError(
            f"losses of equal mathematics differ by {largest:.1e} nats within {rounds} rounds"
        )
    return largest
