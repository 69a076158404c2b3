"""Tables of the suite `population` that need a fresh process: memory, number of devices, compilation."""

import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from hfedmoe_jax.mesh import make_mesh
from launch.hosts.devices import configure_devices, use_compilation_cache
from launch.suites.population.rounds import Rounds, Size
from launch.suites.timing import Table, Timing, rate, ratio, time_together

PEAK_FILE = pathlib.Path("/proc/self/status")
MEGABYTE = 1e6
SHARES = (1.0, 0.5, 0.25)  # of the experts, a tier each


def call_in_process(function: Callable, *arguments: Any) -> Any:
    """Calls a function in a new process; on a TPU, which only one process can use, in this process."""
    if jax.default_backend() == "tpu":
        return function(*arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes() -> int | None:
    """Returns the peak memory of this process: of its first accelerator, on a CPU resident memory.

    None if the system does not report it.
    """
    on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if on_device is not None or not PEAK_FILE.exists():
        return on_device
    # getrusage would include the memory of the parent when it started this process.
    (line,) = (line for line in PEAK_FILE.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def memory_table(size: Size, cohorts: Sequence[int], most_devices: int) -> Table:
    """Measures memory by cohort, with one local step, because it does not depend on their number."""
    rows = [
        [cohort, *call_in_process(run_cohort, size._replace(steps=1), cohort, most_devices)]
        for cohort in cohorts
    ]
    return Table(
        f"Memory against the clients of a round, {size.name} model, one local step; MB",
        ["clients", "program, temporary", "program, all", "most held by the process", "client-steps/s"],
        rows,
        "Of the program as XLA plans it for a device, and of a process that runs one round of so many "
        "clients, data included. The rate is of that one round, after one that compiled.",
    )


def run_cohort(size: Size, cohort: int, most_devices: int) -> list[float | None]:
    """Returns MB of a round's program, temporary and all, MB of this process, and client-steps/s."""
    configure_devices(most_devices)
    rounds = Rounds(size, cohort, make_mesh())
    first = next(rounds.portions(cohort))
    memory = rounds.compile(first)[0].memory_analysis()
    assert memory is not None  # every backend of JAX's own tells
    temporary = memory.temp_size_in_bytes
    everything = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes
    rounds.train([first])
    begun = time.perf_counter()
    rounds.train(rounds.portions(cohort))
    steps = cohort * size.steps / (time.perf_counter() - begun)
    held = peak_bytes()
    everything -= memory.alias_size_in_bytes
    return [temporary / MEGABYTE, everything / MEGABYTE, held and held / MEGABYTE, steps]


def scaling_table(size: Size, clients: int, devices: Sequence[int], repeats: int) -> Table:
    """Compares the same round on different numbers of devices."""
    times = call_in_process(run_on_devices, size, clients, devices, repeats)
    single = times[min(times)]
    rows = [
        [count, rate(time_s, clients * size.steps), ratio(single, time_s)] for count, time_s in times.items()
    ]
    return Table(
        f"Devices, {clients} clients of the {size.name} model; client-steps/s",
        ["devices", "client-steps/s", f"over {min(times)}"],
        rows,
        f"On a CPU the devices are forced and share {os.cpu_count()} cores.",
    )


def run_on_devices(size: Size, clients: int, devices: Sequence[int], repeats: int) -> dict[int, Timing]:
    """Returns the time of a round by the number of devices, for the numbers that exist."""
    # If a flag is given twice, XLA takes the last.
    flags = f"--xla_force_host_platform_device_count={max(devices)} --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    found = jax.devices()
    calls = {
        str(count): Rounds(size, clients, make_mesh(found[:count])).call(clients)
        for count in devices
        if count <= len(found)
    }
    return {int(name): time_s for name, time_s in time_together(repeats, **calls).items()}


def compile_table(size: Size, most_devices: int) -> Table:
    """Times the compilation of each tier with an empty and with a filled compilation cache."""
    with tempfile.TemporaryDirectory() as directory:
        cold, warm = (call_in_process(compile_tiers, size, directory, most_devices) for _ in range(2))
    rows = [[f"{share:g}", *cold[share], *warm[share]] for share in cold]
    return Table(
        f"Compilation of the {size.name} model's tiers, forward=active; seconds",
        ["budget", "traced", "compiled", "traced again", "compiled again, from the cache"],
        rows,
        "In two processes, one after the other, that share a compilation cache, empty at first. Once each.",
    )


def compile_tiers(size: Size, directory: str, most_devices: int) -> dict[float, tuple[float, float]]:
    """Returns seconds to trace and to compile the program of each tier, by its share of the experts."""
    configure_devices(most_devices)
    use_compilation_cache(directory)
    rounds = Rounds(
        size, len(SHARES), make_mesh(), budgets=SHARES,
        fl=dict(algorithm="hfedmoe", forward="active"), importance=dict(refresh="previous"),
    )  # fmt: skip
    found = {portion.block.tier: rounds.compile(portion)[1:] for portion in rounds.portions(len(SHARES))}
    return {tier / size.all_experts: seconds for tier, seconds in sorted(found.items(), reverse=True)}
