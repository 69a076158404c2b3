"""The suite `population`, comparison with other packages on the same model, data and batches."""

# pyright: reportMissingImports=false

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import Params, merge_params
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
    """Compares the engine with every peer: PyTorch's arrangements first, then each package with the fastest.

    Raises:
      InputError: a package is missing.
      AssertionError: a peer's losses differ from ours.
    """
    ours = Rounds(size, clients, mesh)
    active = Rounds(
        size, clients, mesh, budgets=(SHARE,),
        fl=dict(algorithm="hfedmoe", forward="active"), importance=dict(refresh="previous"),
    )  # fmt: skip
    task, peers = make_task(ours), arrangements()
    own = {OURS: ours.call(clients), OURS_ACTIVE: active.call(clients)}
    groups: dict[str, list[str]] = {REFERENCE: []}
    for name in peers:
        groups.setdefault(name.split(",")[0], []).append(name)
    rows, fastest = [], ""
    for names in groups.values():
        together = [*names, *([fastest] if fastest else [])]
        times, losses = time_peers({name: peers[name] for name in together}, task, own, repeats)
        shown = names if fastest else [*own, *names]
        fastest = fastest or min(names, key=lambda name: times[name].median_s)
        for name in shown:
            apart = difference(losses[name], ours.losses) if name in losses else None
            over = ratio(times[fastest], times[name]), ratio(times[name], times[OURS])
            rows.append([name, rate(times[name], task.client_steps), *over, apart])
    return Table(
        f"Other packages, {clients} clients of the {size.name} model, fedavg; client-steps/s",
        ["who", "client-steps/s", f"over {fastest}", "ours over it", "largest difference of a loss"],
        rows,
        peers_note(rows, ours, active, fastest),
    )


def time_peers(
    peers: Mapping[str, Callable], task: Task, own: Mapping[str, Callable[[], None]], repeats: int
) -> tuple[dict[str, Timing], dict[str, list[np.ndarray]]]:
    """Returns the times of a round of our engine and of peers, which take turns, and the peers' losses.

    Only these peers are open at the same time: each has processes with a copy of its libraries.
    """
    losses: dict[str, list[np.ndarray]] = {name: [] for name in peers}

    def call(name, peer):
        return lambda: losses[name].append(peer.round())

    with contextlib.ExitStack() as stack:
        opened = {name: call(name, stack.enter_context(peer(task))) for name, peer in peers.items()}
        return time_together(repeats, **own, **opened), losses


def peers_note(rows: Sequence[list], ours: Rounds, active: Rounds, fastest: str) -> str:
    """Returns the note of the table: how far losses are apart, how it was timed, and what is missing."""
    largest = max(value for *_, value in rows if value is not None)
    compared = ours.losses[:COMPARED_ROUNDS]
    fall = np.mean(compared[0]) - np.mean(compared[-1])
    trained = np.mean(active.report.trained_size)
    return (
        f"Mean losses of a round differ from ours, over the first {len(compared)} rounds, by at most "
        f"{largest:.1e} nats ({LARGEST_DIFFERENCE:g} would have stopped the suite); they fell by "
        f"{fall:.2g}. The packages take turns in groups, with ours and {fastest} in each; a ratio is of its "
        f"group. At {SHARE:.0%}, {trained:.3g} of {ours.size.all_experts} experts were trained."
        + "".join(f" {package} is not installed." for package in absent())
    )


def make_task(ours: Rounds) -> Task:
    """Returns the parameters, data and settings of a round of `ours`, for the peers."""
    size = ours.size
    data = ours.client_data(np.arange(len(ours.budget)))
    return Task(
        params=module_params(jax.device_get(ours.params)),
        tokens=data.batch["tokens"],
        labels=data.batch["labels"],
        num_examples=100 * data.size,  # all equal; the packages want integers
        num_heads=size.num_heads,
        capacity=size.capacity,
        learning_rate=LEARNING_RATE,
    )


def module_params(params: Params) -> dict[str, Any]:
    """Returns parameters as the Flax module names them."""
    return merge_params(params.router, params.shared) | {"experts": params.experts}


def package_of(name: str) -> str:
    """Returns the package that an arrangement needs."""
    return PACKAGES[name.split(",")[0]]


def absent() -> list[str]:
    """Returns the packages that are not installed; the table leaves them out and names them."""
    return [package for package in PACKAGES.values() if importlib.util.find_spec(package) is None]


def arrangements() -> dict[str, Callable]:
    """Returns the peers that this machine can run: all of them on a CPU, PyTorch alone on a GPU.

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
    raise InputError("peers", True, problem, "install PyTorch for it, or leave out --peers")


def difference(theirs: Sequence[Float[np.ndarray, " clients"]], ours: Sequence) -> float:
    """Returns the largest difference between the mean losses of a round, over the first rounds.

    The loss of one client may differ by more after a few rounds, when rounding routes a token differently.

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
