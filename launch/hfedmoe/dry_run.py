"""What a run would cost, from shapes alone: nothing is trained, and nothing is written."""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hfedmoe_jax import Experiment, make_mesh
from hfedmoe_jax.checks import check_config
from hfedmoe_jax.data import FederatedData, load_federated
from hfedmoe_jax.devices import compute_seconds, memory_needed, transfer_seconds
from hfedmoe_jax.models import tree_bytes
from hfedmoe_jax.models.frozen import as_floats
from hfedmoe_jax.published import PUBLISHED
from hfedmoe_jax.tasks import tasks
from launch.compiling import Table, compile_programs, megabytes, program_table
from launch.hfedmoe.run_notes import print_hints
from launch.hosts.devices import configure_devices
from launch.run.progress import format_seconds, print_table
from launch.targets import Chip, read_target, target_devices


def dry_run(config: ConfigDict, target: str | None) -> None:
    """Prints what a run of `config` would cost, and with a target whether its programs fit.

    Args:
      target: see `read_target`; None: what follows from shapes alone.

    Raises:
      InputError: the config, the data or the target cannot be used.
    """
    check_config(config)
    chip = None if target is None else read_target(target)
    experts = config.mesh.experts
    configure_devices(config.fl.clients_per_round * experts, experts)
    devices = None if target is None else target_devices(target)
    mesh = make_mesh(devices, experts)
    published = config.model.source in PUBLISHED
    memory_bytes = chip.memory_bytes if chip else math.inf if published else None
    data = stand_in(config) if published else None
    experiment = Experiment(config, mesh, data, memory_bytes, shapes_only=True)
    print_table(*parameters(experiment))
    print_table(*classes(experiment))
    print_hints(experiment)
    if chip is not None:
        print(f"\ncompiling for {target}, chunk {experiment.chunk} ...", flush=True)
        print_table(*program_table(compile_programs(experiment.lower()), chip))
        print_table(*roofline(experiment, chip))


def stand_in(config: ConfigDict) -> FederatedData:
    """Returns the data in tokens of a tokenizer trained on them, as that of a published size is not here."""
    config = config.copy_and_resolve_references()
    config.data.tokenizer = "bpe"
    return load_federated(config, tasks[config.task.name].prepare)


def parameters(experiment: Experiment) -> Table:
    """Returns the parts of the model: parameters, bytes, and who holds them."""
    params, frozen = jax.eval_shape(experiment.model.init, jax.random.key(0))
    spread = experiment.config.mesh.experts
    where = f"a shard on each of {spread} devices" if spread > 1 else "on every device"
    base = frozen.pop("experts", {})
    parts = [
        ("adapters of experts" if base else "experts", params.experts, where),
        ("routers", params.router, "on every device"),
        ("shared", params.shared, "on every device"),
        ("frozen", frozen, "on every device, never sent"),
    ]
    if base:
        parts.append((f"frozen experts, {experiment.config.model.base}", base, f"{where}, never sent"))
    rows = [
        [
            name,
            f"{sum(x.size for x in jax.tree.leaves(jax.eval_shape(floats, tree))):,}",
            megabytes(tree_bytes(tree)),
            place,
        ]
        for name, tree, place in parts
    ]
    return "Model", ["part", "parameters", "MB", "where"], rows


def floats(tree: Any) -> Any:
    """Returns a tree whose quantised arrays are plain ones."""
    return jax.tree.map(as_floats, tree, is_leaf=lambda x: hasattr(x, "qvalue"))


def classes(experiment: Experiment) -> Table:
    """Returns by device class: experts, memory, FLOP, bytes and simulated time of a round.

    Tokens are taken to be spread evenly over the experts, and every assignment to be kept; clients to have
    missed one round.
    """
    config, cost, algorithm = experiment.config, experiment.cost, experiment.algorithm
    traffic, every = algorithm.traffic, np.arange(experiment.num_clients)
    trains = experiment.budgets if algorithm.selects else np.full(len(every), cost.all_experts)
    missed = round(config.fl.clients_per_round * traffic.terms(trains, every).mean())
    count = Counter(profile.name for profile in experiment.profiles)
    client_of = {profile.name: client for client, profile in enumerate(experiment.profiles)}
    rows = []
    for profile in sorted(set(experiment.profiles)):
        client = np.array([client_of[profile.name]])
        budget = int(experiment.budgets[client[0]])
        assignments, trained = assignments_of(experiment, int(trains[client[0]]))
        up = float(traffic.up(trains[client], client)[0])
        down = float(traffic.down(np.array([missed]), client)[0])
        seconds = transfer_seconds(profile, down, up) + compute_seconds(
            profile, cost, config.fl.local_steps, assignments, trained, algorithm.scoring
        )
        flop = step_flop(experiment, int(trains[client[0]]))
        rows.append(
            [
                profile.name,
                f"{count[profile.name]:,}",
                f"{budget} of {cost.all_experts}",
                megabytes(memory_needed(cost, budget, config.fl.forward)),
                megabytes(profile.memory_bytes),
                f"{flop / 1e9:,.3g}",
                megabytes(down),
                megabytes(up),
                format_seconds(seconds),
            ]
        )
    header = [
        "class", "clients", "experts", "needs, MB", "has, MB", "GFLOP a step", "MB down", "MB up",
        "simulated round",
    ]  # fmt: skip
    return "Device classes, tokens spread evenly over the experts", header, rows


def assignments_of(experiment: Experiment, budget: int) -> tuple[float, float]:
    """Returns the token-expert pairs of a step, all that are computed and those of trained experts."""
    config, model = experiment.config, experiment.model
    full = {
        name: jnp.ones((config.fl.batch_size, *rows.shape[1:]), rows.dtype)
        for name, rows in experiment.data.train.items()
    }
    mask = np.asarray(model.mask(full))
    every = model.top_k * float(np.broadcast_to(mask, (model.num_layers, *mask.shape[-2:])).sum())
    trained = every * budget / experiment.cost.all_experts
    selects = experiment.algorithm.selects
    return (trained if selects and config.fl.forward == "active" else every), trained


def step_flop(experiment: Experiment, budget: int) -> float:
    """Returns the FLOP of a local step, scoring left out: forward once, backward twice."""
    assignments, trained = assignments_of(experiment, budget)
    cost = experiment.cost
    return 3 * cost.shared_flop + (assignments + 2 * trained) * cost.assignment_flop


def roofline(experiment: Experiment, chip: Chip) -> Table:
    """Returns the least time of a round by FLOP and by bytes of memory."""
    config, cost = experiment.config, experiment.cost
    chips = experiment.mesh.size
    plan = experiment.plan(1)
    steps = config.fl.local_steps * int(max(block.count.max() for block in plan.blocks)) * len(plan.blocks)
    budget = int(max(experiment.budgets[plan.cohort]))
    flop = steps * step_flop(experiment, budget) / config.mesh.experts
    held = cost.shared_training_bytes + budget * (cost.expert_parameter_bytes + cost.expert_training_bytes)
    moved = 2 * steps * held / config.mesh.experts
    by_flop, by_bytes = flop / chip.flop_per_s[config.model.precision], moved / chip.bytes_per_s
    peaks = chip.flop_per_s[config.model.precision] / 1e12, chip.bytes_per_s / 1e9
    rows = [
        [
            "matrix products",
            f"{flop / 1e9:,.4g} GFLOP",
            f"{peaks[0]:,.4g} TFLOP/s",
            f"{by_flop * 1e3:,.3g} ms",
        ],
        ["memory", megabytes(moved) + " MB", f"{peaks[1]:,.4g} GB/s", f"{by_bytes * 1e3:,.3g} ms"],
    ]
    title = f"Roofline of a round on one of {chips} chips: an estimate"
    return title, ["limit", "of the busiest chip", "peak", "at the peak"], rows
