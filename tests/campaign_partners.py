"""Kills a process of a run over two, at random moments, and starts it again until the run is done.

    python tests/campaign_partners.py --kills=20 --seed=0

The other one must end within `OTHER_ENDS_S`, with exit code 3 and one line, or wait for the killed one if
the run had not begun: then that one alone is started again. Both use the same address every time. The
finished run must have the results of one that was left alone, bit for bit.
"""

import argparse
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_run  # noqa: E402

from launch.hosts.processes import EXIT_PROCESS_LOST  # noqa: E402

OTHER_ENDS_S = 30.0
FIELDS = {
    "fl__rounds": 12,
    "fl__clients": 8,
    "fl__clients_per_round": 4,
    "checkpoint__every": 1,
    "eval__every": 4,
}


class Pair:
    """A run over two processes, each with one device, at one address."""

    def __init__(self, workdir: pathlib.Path, texts: pathlib.Path, port: int, compiled: pathlib.Path):
        command = tiny_run.arguments(workdir, texts, **FIELDS)
        self.command = [
            *command,
            f"--compiled={compiled}",
            f"--coordinator=localhost:{port}",
            "--processes=2",
        ]
        self.children = [self.start(index) for index in range(2)]

    def start(self, index: int) -> subprocess.Popen:
        """Starts one of the two."""
        return tiny_run.start_process([*self.command, f"--process={index}"], 1)

    def begun(self) -> bool:
        """Says whether the two have met for long enough to begin."""
        return (pathlib.Path(self.command[1].split("=", 1)[1]) / "config.json").exists()


def ends(child: subprocess.Popen, limit_s: float) -> tuple[int, str] | None:
    """Returns the exit code and stderr of a process, or None if it still runs after `limit_s`."""
    try:
        _, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    return child.returncode, err


def kill_one(pair: Pair, rng: random.Random, most_s: float) -> str:
    """Kills one process of a running pair after a while, and returns what became of the other."""
    victim = rng.randrange(2)
    time.sleep(rng.uniform(0, most_s))
    if all(child.poll() is not None for child in pair.children):
        return "had ended before"
    pair.children[victim].send_signal(signal.SIGKILL)
    ends(pair.children[victim], 10)
    other = pair.children[1 - victim]
    found = ends(other, OTHER_ENDS_S if pair.begun() else 3)
    if found is not None:
        code, err = found
        if code == 0:
            return "the other was done"
        good = code == EXIT_PROCESS_LOST and len(err.splitlines()) == 1 and f"host {victim} of 2" in err
        return "the other stopped" if good else f"FAILED: exit code {code} and {err!r}"
    pair.children[victim] = pair.start(victim)
    found = [ends(child, 120) for child in pair.children]
    if [each and each[0] for each in found] == [0, 0]:
        return "the other waited for it"
    for child in pair.children:
        child.kill()
    return f"FAILED: neither ended nor went on: {found}"


def main() -> int:
    """Runs the campaign and returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, counts, failures = random.Random(given.seed), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        texts = tiny_run.write_jsonl(place / "train.jsonl", tiny_run.texts(90))
        port = rng.randrange(20_000, 30_000)
        for name in ("compiles", "alone"):
            begun = time.monotonic()
            results = [
                ends(child, 300) for child in Pair(place / name, texts, port, place / "compiled").children
            ]
            assert [each and each[0] for each in results] == [0, 0], results
            whole_s = time.monotonic() - begun
        for number in range(given.kills):
            workdir = place / f"run-{number}"
            pair = Pair(workdir, texts, port, place / "compiled")
            what = kill_one(pair, rng, whole_s)
            while "FAILED" not in what and any(child.returncode != 0 for child in pair.children):
                pair = Pair(workdir, texts, port, place / "compiled")
                found = [ends(child, 120) for child in pair.children]
                if [each and each[0] for each in found] != [0, 0]:
                    what = f"FAILED: the run did not go on: {found}"
                    for child in pair.children:
                        child.kill()
            if "FAILED" not in what:
                try:
                    tiny_run.assert_same_results(workdir, place / "alone")
                except AssertionError as error:
                    what = f"FAILED: other results: {error}"
            failures += "FAILED" in what
            counts[what] = counts.get(what, 0) + 1
            print(f"kill {number + 1}: {what}", flush=True)
    print("; ".join(f"{what}: {count}" for what, count in counts.items()))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
