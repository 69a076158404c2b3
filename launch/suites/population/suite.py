"""The suite `population`: cost of a federated round by chunk, cohort, budget, score refresh and devices.

All tables except those of `launch.suites.population.scaling` are measured in this process; the rows of a
table take turns.
"""

# pyright: reportMissingImports=false

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hfedmoe_jax.mesh import BY_CLIENT, CLIENTS, make_mesh
from hfedmoe_jax.models import RouterRule, Routing, own_choice
from hfedmoe_jax.scoring import SeenBatch, build_scoring
from launch.hosts.compiled import total_flop
from launch.suites.population.comparison import peers_table
from launch.suites.population.rounds import SEED, SHARE, Rounds, Size
from launch.suites.population.scaling import MEGABYTE, compile_table, memory_table, scaling_table
from launch.suites.timing import Table, each_of, rate, ratio, time_together

GIGA = 1e9
SMALL = Size("small", width=128, hidden=256, num_experts=8, top_k=1)
HEAVY = Size("heavy", width=256, hidden=1024, num_experts=16, top_k=2)
MOST_DEVICES = 16
SCORE = "information_bottleneck"
BUDGETS = (
    ("routed", "previous", 0.5),
    ("routed", "previous", 0.25),
    ("active", "previous", 0.25),
    ("active", "round", 0.5),
    ("active", "round", 0.25),
)
"""fl.forward, importance.refresh and the budget as a share of the experts; compared with all experts."""
ALL = ("all", "-", 1.0)
LONG_REPEATS = 5  # the most repeats of rounds that take seconds
MOMENTS = tuple(
    (forward, refresh)
    for forward, moments in {"routed": ("step", "previous", "round"), "active": ("previous", "round")}.items()
    for refresh in moments
)
SELECTIONS = 64  # in sequence, in the program that times them


class Scale(NamedTuple):
    """Sizes of the measurements on a kind of machine.

    Attributes:
      small, heavy: models; most of the heavy one's work is in its experts.
      clients: clients a round of the small model.
      heavy_clients: clients a round of the heavy model, on each device.
      chunks: numbers of clients computed together on a device.
      cohorts: numbers of clients a round.
      memory_cohorts: numbers of clients a round in the table of memory.
      devices: numbers of devices.
      product: rows of the square matrices whose product gives the peak rate.
    """

    small: Size = SMALL
    heavy: Size = HEAVY
    clients: int = 16
    heavy_clients: int = 8
    chunks: tuple[int, ...] = (1, 2, 4)
    cohorts: tuple[int, ...] = (4, 16, 64)
    memory_cohorts: tuple[int, ...] = (16, 256, 4096)
    devices: tuple[int, ...] = (1, 2, 4)
    product: int = 1024


SCALES = {
    "cpu": Scale(),
    "accelerator": Scale(
        heavy=HEAVY._replace(precision="bfloat16"),
        clients=256,
        heavy_clients=64,
        chunks=(16, 32, 64),
        cohorts=(64, 256),
        product=8192,
    ),
}


def measure(repeats: int, peers: bool = False) -> Iterator[Table]:
    """Yields the tables of the suite, each as soon as it is measured.

    Args:
      repeats: of each call.
      peers: whether to compare with other packages.
    """
    # Leaves GPU memory for the processes that some tables start. JAX reads it when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    scale = SCALES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    mesh = make_mesh()
    yield chunk_table(scale, mesh, repeats)
    yield from budget_tables(scale, mesh, repeats)
    yield refresh_table(scale, mesh, repeats)
    yield memory_table(scale.small, scale.memory_cohorts, MOST_DEVICES)
    yield scaling_table(scale.small, scale.clients, scale.devices, repeats)
    yield compile_table(scale.small, MOST_DEVICES)
    if peers:
        yield peers_table(scale.small, scale.clients, mesh, repeats)


def chunk_table(scale: Scale, mesh: Mesh, repeats: int) -> Table:
    """Compares chunk sizes and cohorts."""
    size = scale.small
    calls, steps = {}, {}
    for chunk in scale.chunks:
        rounds = Rounds(size, max(scale.cohorts), mesh, chunk)
        for cohort in scale.cohorts:
            calls[f"{chunk} {cohort}"] = rounds.call(cohort)
            steps[f"{chunk} {cohort}"] = cohort * size.steps
    repeats = min(repeats, LONG_REPEATS)
    times = time_together(repeats, **calls)
    rows = [[*map(int, name.split()), rate(time_s, steps[name])] for name, time_s in times.items()]
    return Table(
        f"Chunk and cohort, {_describe(size)}; client-steps/s",
        ["clients at once on a device", "clients a round", "client-steps/s"],
        rows,
        f"fedavg on {mesh.shape[CLIENTS]} devices; {repeats} repeats.",
    )


def budget_tables(scale: Scale, mesh: Mesh, repeats: int) -> Iterator[Table]:
    """Yields the cost of a step by budget, and the share of a matrix product's peak rate that it reaches."""
    budgets, peaks = [], []
    for size in (scale.small, scale.heavy):
        clients = scale.clients if size is scale.small else scale.heavy_clients * mesh.shape[CLIENTS]
        rows, peak = _budget_rows(size, clients, mesh, scale.product, repeats)
        budgets += rows
        peaks.append(peak)
    yield Table(
        "Cost by budget, hfedmoe; ms of one device a client-step",
        [
            "model", "forward", "refresh", "budget", "trained", "step", "over all experts",
            "expert FLOP over all", "GFLOP of products", "temporary MB",
        ],
        budgets,
        f"{_describe(scale.small)}; {_describe(scale.heavy)}. FLOP and memory are of the compiled program; "
        'a loop over selected experts counts as if it used its budget. "all" is fedavg, which selects '
        "nothing. Trained: experts, mean over the steps of the last round. With refresh=round a client holds "
        "the experts of its budget alone, with previous those of all its steps.",
    )  # fmt: skip
    yield Table(
        "Part of the peak, all experts; GFLOP/s of all devices",
        ["model", "GFLOP of products a client-step", "reached", "peak", "part"],
        peaks,
        f"Peak: jnp.dot of {scale.product} x {scale.product} matrices in the model's precision, on all "
        "devices at once, in turn with the rounds. Of the model's operations its products alone count.",
    )


def _budget_rows(size: Size, clients: int, mesh: Mesh, product: int, repeats: int) -> tuple[list, list]:
    populations: dict[tuple, Rounds] = {ALL: Rounds(size, clients, mesh)}
    for forward, refresh, share in BUDGETS:
        populations[forward, refresh, share] = Rounds(
            size, clients, mesh, budgets=(share,),
            fl=dict(algorithm="hfedmoe", forward=forward), importance=dict(refresh=refresh),
        )  # fmt: skip
    with ThreadPoolExecutor() as pool:  # a compilation uses one core
        costs = pool.map(lambda rounds: cost(rounds, clients), populations.values())
    costs = dict(zip(populations, costs, strict=True))
    peak, peak_flop = make_peak(mesh, product, size.precision)
    calls = {" ".join(map(str, key)): rounds.call(clients) for key, rounds in populations.items()}
    times = time_together(repeats, peak=peak, **calls)
    peak_s = times.pop("peak")
    steps = clients * size.steps
    full_s, full = times[" ".join(map(str, ALL))], costs[ALL]
    rows = []
    for key, rounds in populations.items():
        round_s = times[" ".join(map(str, key))]
        flop, expert_flop, temporary_bytes = costs[key]
        trained = float(np.mean(rounds.report.trained_size))
        step_s = each_of(round_s, steps / rounds.num_devices)
        against = [ratio(round_s, full_s), expert_flop / full.expert_flop]
        sizes = [flop / GIGA, temporary_bytes / MEGABYTE]
        rows.append([size.name, *key, trained, step_s, *against, *sizes])
    reached, top = full.flop * steps / full_s.median_s, peak_flop / peak_s.median_s
    return rows, [size.name, full.flop / GIGA, reached / GIGA, top / GIGA, reached / top]


class Cost(NamedTuple):
    """Cost of a client step, from its compiled program.

    Attributes:
      flop: FLOP of all matrix products.
      expert_flop: FLOP of the products of experts.
      temporary_bytes: temporary memory of the program, which does not depend on the number of clients.
    """

    flop: float
    expert_flop: float
    temporary_bytes: int


def cost(rounds: Rounds, clients: int) -> Cost:
    """Returns the cost of a step of the first clients, who all have the same tier."""
    portion = next(rounds.portions(clients))
    program, *_ = rounds.compile(portion)
    found = rounds.step_products(program, portion)
    memory = program.memory_analysis()
    assert memory is not None  # every backend of JAX's own tells
    return Cost(total_flop(found), total_flop(found, rounds.size.expert_axes), memory.temp_size_in_bytes)


def make_peak(mesh: Mesh, rows: int, dtype: str) -> tuple[Callable[[], None], float]:
    """Returns a call that multiplies square matrices on all devices at the same time, and its FLOP."""
    devices, turns = mesh.shape[CLIENTS], 32  # long enough to reach the peak rate after another call
    rng = np.random.default_rng(SEED)
    # Orthogonal, so that a chain of products neither vanishes nor overflows.
    matrix = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    matrices = np.broadcast_to(matrix.astype(np.float32), (devices, rows, rows))
    left = jax.device_put(jnp.asarray(matrices, dtype), NamedSharding(mesh, BY_CLIENT))

    def chain(x):
        return jax.lax.fori_loop(0, turns, lambda _, y: jnp.dot(x[0], y), x[0])[None]

    multiply = jax.jit(
        jax.shard_map(chain, mesh=mesh, in_specs=BY_CLIENT, out_specs=BY_CLIENT, check_vma=False)
    )
    return lambda: jax.block_until_ready(multiply(left)), 2.0 * rows**3 * turns * devices


def refresh_table(scale: Scale, mesh: Mesh, repeats: int) -> Table:
    """Compares how often a client scores its experts."""
    size, clients, share = scale.small, scale.clients, SHARE
    populations, calls = {}, {}
    for forward, refresh in MOMENTS:
        name = f"{forward} {refresh}"
        populations[name] = rounds = Rounds(
            size, clients, mesh, budgets=(share,),
            fl=dict(algorithm="hfedmoe", forward=forward), importance=dict(refresh=refresh),
        )  # fmt: skip
        calls[name] = rounds.call(clients)
        calls[f"{name} selection"] = make_selection(rounds)
    times = time_together(repeats, **calls)
    rows = []
    for name, rounds in populations.items():
        step_s = each_of(times[name], clients * size.steps / rounds.num_devices)
        selection_s = each_of(times[f"{name} selection"], SELECTIONS)
        against = ratio(times[name], times[" ".join(MOMENTS[0])])
        part, trained = ratio(selection_s, step_s), float(np.mean(rounds.report.trained_size))
        rows.append([*name.split(), trained, step_s, against, selection_s, part])
    return Table(
        f"Refresh of the scores, {share:.0%} of the experts; ms of one device a client-step",
        ["forward", "refresh", "trained", "step", "over the first", "selection", "its part"],
        rows,
        f"{_describe(size)}. Selection: score and select of {SELECTIONS} batches in a program of their own, "
        "on one device.",
    )


def make_selection(rounds: Rounds) -> Callable[[], Any]:
    """Returns a call that scores and selects `SELECTIONS` times, with the gates of different batches."""
    size, config = rounds.size, rounds.config
    scoring = build_scoring(config, SCORE)
    assert scoring is not None  # as it is for "none" alone
    experts = (size.num_layers, size.num_experts)
    mask = jnp.ones((size.batch_size, size.seq_len), bool)
    shape = (SELECTIONS, size.num_layers, mask.size, size.num_experts)
    gates = jax.nn.softmax(jax.random.normal(jax.random.key(SEED), shape))
    own = own_choice(gates, mask.reshape(-1), RouterRule(size.top_k))
    budget, key = rounds.budget[0], jax.random.key(SEED)

    def step(known, batch):
        gates, own, first = batch
        counts = jnp.zeros(experts, jnp.int32)
        layers = counts[:, 0]
        routing = Routing(gates, own, counts, counts, layers, layers.astype(jnp.float32))
        scored = SeenBatch(routing, mask, key, first)
        if scoring.routed:
            known = scoring.of_batch(known, scored)
        active = scoring.select(known, budget)
        contribution = active.astype(jnp.float32)
        known = scoring.after_batch(known, scored, contribution, None if scoring.routed else active)
        return known, active

    @jax.jit
    def select_all(gates, own):
        # The state of a client before its first batch.
        known = scoring.start(*experts)._replace(eligible=jnp.ones(experts, bool))
        return jax.lax.scan(step, known, (gates, own, jnp.arange(SELECTIONS) == 0))[1]

    return lambda: jax.block_until_ready(select_all(gates, own))


def _describe(size: Size) -> str:
    experts = f"{size.num_layers} layers of {size.num_experts} experts of {size.hidden}, top-{size.top_k}"
    batches = f"{size.steps} steps of {size.batch_size} x {size.seq_len} tokens"
    return f"{size.name} model (d {size.width}, {experts}, {size.precision}), {batches}"
