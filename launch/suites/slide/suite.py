"""The suite `slide`: exact solver, latency kernels, relaxed optimizer and quantisation, with baselines."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.suites.slide.peers import solve_dense, solve_hull
from launch.suites.timing import Table, ratio, time_together
from slide_jax import latency
from slide_jax.checks import read_models
from slide_jax.exact import exact
from slide_jax.milp import milp
from slide_jax.problem import Catalogue, Problem, Users
from slide_jax.profiles import profile, to_model
from slide_jax.quantise import quantise
from slide_jax.relaxed import relaxed
from slide_jax.sampling import Setting, sample_problem

MODELS, LAYERS = 8, 64
USERS = (1_000, 10_000, 100_000, 1_000_000)
MILP_USERS = 1_000
SEED = 0
UNIFORM_BITS = 8
QUANTISED_USERS = 400
QUANTISED = (
    (("resnet50", "vit_b16"), (0.25, 0.55)),
    (("resnet50", "vit_b16"), (0.85, 0.99)),
    (("vit_b16",), (0.85, 0.99)),
    (("gpt2",), (0.25, 0.55)),
    (("gpt2",), (0.85, 0.99)),
    (("smollm2_135m",), (0.85, 0.99)),
)
"""Models, and the range of compute as a share of the deadline."""


def measure(repeats: int) -> Iterator[Table]:
    """Yields the tables of the suite, each as soon as it is measured."""
    yield exact_table(repeats)
    yield latency_table(repeats)
    yield relaxed_table(repeats)
    yield quantise_table(repeats)


def random_problem(users: int) -> Problem:
    """Returns a random problem with `MODELS` models of `LAYERS` layers; about a quarter of the users fit."""
    rng = np.random.default_rng(SEED)

    def layers(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (MODELS, 1)) * rng.uniform(0.5, 1.5, (MODELS, LAYERS))

    catalogue = Catalogue(
        layer_bits=layers(1e6, 8e6),
        layer_flop=layers(2e8, 2e9),
        num_layers=np.full(MODELS, LAYERS, np.int32),
        accuracy=rng.uniform(0.6, 0.9, MODELS),
        task=np.zeros(MODELS, np.int32),
    )
    same = np.ones(users)
    snr = rng.exponential(30.0, users)
    return Problem(
        catalogue,
        Users(
            task=np.zeros(users, np.int32),
            min_accuracy=rng.uniform(0.5, 0.8, users),
            deadline_s=rng.uniform(2.0, 8.0, users),
            start_s=0 * same,
            energy_j=rng.uniform(1.0, 20.0, users),
            spectral_efficiency_bps_hz=np.minimum(np.log2(1 + snr), 7.4),
            snr_hz=1e8 * snr,
            f_min_hz=3e8 * same,
            f_max_hz=rng.uniform(5e8, 1.3e9, users),
            flop_per_cycle=2048 * same,
            kappa_j_per_hz2_cycle=1e-28 * same,
            static_power_w=0 * same,
            memory_bits=np.inf * same,
        ),
        bandwidth_hz=np.float64(1e6 * users),
    )


def exact_table(repeats: int) -> Table:
    """Times the exact solver against NumPy and HiGHS, which must serve equally many users."""
    rows = []
    for users in USERS:
        problem = random_problem(users)
        served = exact(problem).throughput
        peers = {"dense": lambda p=problem: solve_dense(p), "hull": lambda p=problem: solve_hull(p)}
        answers = {name: peer()[0] for name, peer in peers.items()}
        highs = None
        if users <= MILP_USERS:
            answers["highs"] = milp(problem).throughput
            highs = time_together(3, highs=lambda p=problem: milp(p))["highs"]
        if set(answers.values()) != {served}:
            raise AssertionError(f"exact serves {served} of {users} users, its peers {answers}")
        times = time_together(repeats, ours=lambda p=problem: exact(p), **peers)
        ours = times["ours"]
        fastest = min(times["dense"], times["hull"])
        against = [ratio(fastest, ours), highs and ratio(highs, ours)]
        rows.append([users, served, ours, times["dense"], times["hull"], highs, *against])
    return Table(
        f"Exact optimum, {MODELS} models of {LAYERS} layers; milliseconds",
        [
            "users",
            "served",
            "exact",
            "NumPy dense",
            "NumPy hull",
            "HiGHS",
            "NumPy / exact",
            "HiGHS / exact",
        ],
        rows,
        "From NumPy arrays to NumPy arrays. exact also gives latencies, energies and the reason for every "
        "user that is not served; NumPy gives model, clock, bandwidth and who is served; NumPy / exact takes "
        f"the faster of the two. HiGHS solves the pair knapsack, up to {MILP_USERS:,} users, and is timed "
        "before the others, whose caches it would empty. The hull of a catalogue is kept between calls, for "
        "both.",
    )


def latency_table(repeats: int) -> Table:
    """Times the latency kernels and their gradients against reading their input once."""
    rows = []
    with jax.enable_x64(True):
        for users in USERS[:3]:
            rows += _latency_rows(users, repeats)
    return Table(
        f"Latency, {LAYERS} layers, sizes and workloads of each user's own, float64; milliseconds",
        ["kernel", "users", "forward", "gradient", "gradient / forward", "bytes read once / forward"],
        rows,
        "Bytes read once: the sums of the two tables. Gradients by all four arguments, into the memory of "
        "the call before (donated), as in the loop of an optimizer.",
    )


def _latency_rows(users: int, repeats: int) -> list[list[Any]]:
    rng = np.random.default_rng(SEED)
    tables = [jnp.asarray(rng.uniform(0.1, 1.0, (LAYERS, users))) for _ in range(2)]
    arguments = (*tables, *(jnp.asarray(rng.uniform(0.5, 2.0, users)) for _ in range(2)))
    read = jax.jit(lambda bits, flop: (jnp.sum(bits), jnp.sum(flop)))
    rows = []
    for kernel in (latency.latency, latency.latency_closed_form, latency.latency_associative):
        forward = jax.jit(kernel)
        times = time_together(
            repeats,
            read=lambda: jax.block_until_ready(read(*tables)),
            forward=lambda forward=forward: jax.block_until_ready(forward(*arguments)),
            gradient=_gradient(kernel, arguments),
        )
        against = [ratio(times["gradient"], times["forward"]), ratio(times["read"], times["forward"])]
        rows.append([kernel.__name__, users, times["forward"], times["gradient"], *against])
    return rows


def _gradient(kernel: Callable, arguments: tuple) -> Callable[[], None]:
    """Returns a call that computes the gradient into the donated memory of the previous call."""

    def gradient(earlier, *arguments):
        del earlier
        return jax.grad(lambda *args: jnp.sum(kernel(*args)), argnums=(0, 1, 2, 3))(*arguments)

    into_earlier = jax.jit(gradient, donate_argnums=0, keep_unused=True)
    held = [jax.tree.map(jnp.copy, arguments)]

    def call():
        held[0] = jax.block_until_ready(into_earlier(held[0], *arguments))

    return call


def relaxed_table(repeats: int) -> Table:
    """Times the relaxed optimizer against the exact solver, with its gap and its certified gap."""
    rows = []
    for users in USERS:
        problem = random_problem(users)
        answer, best = relaxed(problem), exact(problem)
        gaps = [best.throughput - answer.throughput, float(answer.upper_bound) - answer.throughput]
        times = time_together(repeats, relaxed=lambda p=problem: relaxed(p), exact=lambda p=problem: exact(p))
        rows.append([users, answer.throughput, *gaps, *times.values(), ratio(*times.values())])
    return Table(
        "Relaxed optimizer, from a cold start; milliseconds",
        ["users", "served", "gap to exact", "certified gap", "relaxed", "exact", "relaxed / exact"],
        rows,
    )


def quantise_table(repeats: int) -> Table:
    """Compares integer bits by layer with equal bits at the same quantisation noise, by users served."""
    rows = []
    for models, share in QUANTISED:
        gains = np.array([_quantised(models, share, seed) for seed in range(repeats)])
        uniform, smallest, climbed = gains.mean(axis=0)
        added = (gains[:, 2] - gains[:, 1]) / gains[:, 0]
        error = 1.96 * added.std(ddof=1) / np.sqrt(repeats)
        compute = "-".join(f"{end:.0%}" for end in share)
        more = [f"{value / uniform - 1:+.1%}" for value in (smallest, climbed)]
        gradient = f"{added.mean():+.1%} ± {error:.1%}"
        rows.append([f"{' + '.join(models)}, compute {compute}", f"{uniform:.1f}", *more, gradient])
    return Table(
        f"Bits by layer at the noise of {UNIFORM_BITS} everywhere, {QUANTISED_USERS} users; users served",
        ["models", "equal bits", "smallest model", "by gradient", "what the gradient adds"],
        rows,
        f"Means over {repeats} drops of the plain cell with 95% intervals, the spectrum such that half of "
        "the users fit at equal bits. Noise is the proxy of slide_jax.quantise: no model is run.",
    )


def _quantised(models: tuple[str, ...], share: tuple[float, float], seed: int) -> tuple[int, int, int]:
    """Returns users served with equal bits, with the smallest models, and with bits by gradient."""
    profiles = [profile(name) for name in models]
    catalogue, _ = read_models([to_model(found, UNIFORM_BITS) for found in profiles], None)
    parameters = np.zeros(catalogue.layer_bits.shape, np.int64)
    for i, found in enumerate(profiles):
        parameters[i, : len(found.layers)] = [layer.parameters for layer in found.layers]
    setting = Setting(users=QUANTISED_USERS, compute_min=share[0], compute_max=share[1], bandwidth_hz=1e30)
    with jax.enable_x64(True):
        drop = sample_problem(jax.random.key(seed), setting, catalogue, QUANTISED_USERS)
        drop = jax.tree.map(np.asarray, drop)
    needs = np.sort(exact(drop).bandwidth_hz)
    spectrum = needs[: QUANTISED_USERS // 2].sum()
    found = quantise(dataclasses.replace(drop, bandwidth_hz=np.float64(spectrum)), parameters, UNIFORM_BITS)
    return found.served_uniform, found.served_smallest, found.served
