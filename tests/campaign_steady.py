"""A long run whose memory, threads, descriptors and files must hold steady."""

import contextlib
import os
import pathlib
import re
import time

from campaign_run import Campaign

from launch.run.progress import print_table

SAMPLES = 20
FIELDS = {
    "checkpoint__every": 10,
    "eval__every": 100,
    "fl__clients": 2,
    "fl__clients_per_round": 1,
    "fl__local_steps": 1,
}
HEADER = ("rounds", "RSS MB", "threads", "descriptors", "a checkpoint kB", "metrics, events kB", "rest kB")


def steady(campaign: Campaign, rounds: int) -> int:
    """Runs so many rounds, prints a table of samples, and returns how many of its columns grew."""
    workdir = campaign.folder / "steady"
    child = campaign.start(workdir, fl__rounds=rounds, **FIELDS)
    samples = []
    begun = time.monotonic()
    while child.process.poll() is None:
        if rows_of(workdir) >= (len(samples) + 1) * rounds // SAMPLES:
            samples.append(sample(child.process.pid, workdir))
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    code, err = child.end()
    wrong = [f"code {code}, {err[-2000:]!r}"] if (code, err) != (0, "") else []
    print_table(f"{rounds} rounds, {seconds:.0f} s", HEADER, [[f"{x:,.0f}" for x in row] for row in samples])
    wrong += growth(samples)
    for fault in wrong:
        print(f"--rounds {rounds}: {fault}")
    return len(wrong)


def sample(pid: int, workdir: pathlib.Path) -> list[float]:
    """Returns a row of the table."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    sizes = {
        name: size_of(workdir / name) for name in ("checkpoints", "metrics.csv", "tensorboard", "compiled")
    }
    steps = max(1, sum(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")))
    rest = size_of(workdir) - sum(sizes.values())
    return [
        rows_of(workdir),
        memory / 1024,
        threads,
        len(os.listdir(f"/proc/{pid}/fd")),
        sizes["checkpoints"] / steps / 1000,
        (sizes["metrics.csv"] + sizes["tensorboard"]) / 1000,
        rest / 1000,
    ]


def growth(samples: list[list[float]]) -> list[str]:
    """Returns what grew after a quarter of the run, beyond the rows that a run keeps of its rounds."""
    early, late = samples[len(samples) // 4], samples[-1]
    most = dict(zip(HEADER, (None, 0.05 * early[1], 4, 4, None, None, 5), strict=True))
    return [
        f"{name} grew from {before:,.0f} to {after:,.0f}"
        for (name, room), before, after in zip(most.items(), early, late, strict=True)
        if room is not None and after - before > room
    ]


def rows_of(workdir: pathlib.Path) -> int:
    """Returns how many rounds metrics.csv holds."""
    path = workdir / "metrics.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def size_of(path: pathlib.Path) -> int:
    """Returns the bytes of a file or of all files of a directory."""
    total = 0
    for each in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):  # a checkpoint that is replaced now
            total += each.stat().st_size if each.is_file() else 0
    return total
