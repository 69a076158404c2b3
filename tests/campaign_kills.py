"""Runs that are killed, interrupted or lose their storage: given again, each must end with the same bits.

    python tests/campaign_kills.py --kills 100 --signals 30 --faults 30 --rounds 2000
    python tests/campaign_kills.py --faults 1 --first 17    # one case again

A case is a seed. The instants are random, but what a machine does in a second is not always the same: a case
that is repeated may be hit at another instruction.
"""

import argparse
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import campaign_faults  # noqa: E402
import campaign_steady  # noqa: E402
from campaign_run import Campaign  # noqa: E402

from launch.run.progress import print_table  # noqa: E402

HITS = 10  # of a case, before its run may end
INTERRUPTED = 130

Case = tuple[list[str], list[str]]
"""What a case was, once for each hit, and what is wrong with how it ended."""


def hit(campaign: Campaign, seed: int, name: str, signals: list[signal.Signals]) -> Case:
    """Starts a run again and again, hits it with the signals, lets it end, and compares it."""
    rng = random.Random(f"{name} {seed}")
    workdir = campaign.folder / "run"
    struck, wrong = [], []
    for each in signals:
        child = campaign.start(workdir)
        phase = child.wait_until(campaign.instant(rng))
        if phase:
            child.process.send_signal(each)
        code, err = child.end()
        struck.append(f"{each.name} in {phase}" if phase else "ended before the signal")
        wrong += [f"{struck[-1]}: {fault}" for fault in ill_ended(each, phase, code, err)]
        if phase is None and code == 0:  # it begins anew
            wrong += campaign.differences(workdir)
            shutil.rmtree(workdir)
    return struck, wrong + campaign.ended(campaign.start(workdir))


def ill_ended(number: signal.Signals, phase: str | None, code: int, err: str) -> list[str]:
    """Returns what is wrong with how a process ended after a signal."""
    if number == signal.SIGKILL:
        return [] if err == "" and code in (0, -number) else [f"code {code}, {err[-2000:]!r}"]
    if phase == "Python's own start":  # before the program's first line
        return [] if code in (0, 1, -number, INTERRUPTED) else [f"code {code}, {err[-2000:]!r}"]
    lines = {0: 0, INTERRUPTED: 1}.get(code)
    if phase is None and code == 0 and err == "":
        return []
    return [] if lines == len(err.splitlines()) else [f"code {code}, {err[-2000:]!r}"]


def kills(campaign: Campaign, seed: int) -> Case:
    """Hits a run with SIGKILL."""
    return hit(campaign, seed, "kill", [signal.SIGKILL] * HITS)


def signals(campaign: Campaign, seed: int) -> Case:
    """Hits a run with SIGTERM and SIGINT."""
    chosen = random.Random(seed).choices([signal.SIGTERM, signal.SIGINT], k=HITS)
    return hit(campaign, seed, "signal", chosen)


def run_cases(
    campaign: Campaign, name: str, case: Callable[[Campaign, int], Case], seeds: Iterable[int]
) -> int:
    """Runs the cases of a kind, prints every failure and a table, and returns how many failed."""
    count, failed = Counter(), Counter()
    begun, failures = time.monotonic(), 0
    for seed in seeds:
        struck, wrong = case(campaign, seed)
        count.update(struck)
        for fault in wrong:
            failed.update([what for what in struck if fault.startswith(what)] or struck[-1:])
            print(f"--{name} 1 --first {seed}: {', '.join(struck)}\n    {fault}", flush=True)
        failures += bool(wrong)
        shutil.rmtree(campaign.folder / "run", ignore_errors=True)
        shutil.rmtree(campaign.folder / "run_compiled", ignore_errors=True)
    for line, times in campaign.said.most_common():
        print(f"{times:4} x {line}")
    campaign.said.clear()
    rows = [[what, str(count[what]), str(failed[what])] for what in sorted(count)]
    rows.append(["in all", str(count.total()), str(failures)])
    title = f"{name.capitalize()}, {time.monotonic() - begun:.0f} s"
    print_table(title, ["what and when", "hits", "failed"], rows)
    sys.stdout.flush()
    return failures


def main() -> int:
    """Runs what the command line asks for, and returns how many cases failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=0, help=f"SIGKILLs, {HITS} a run")
    parser.add_argument("--signals", type=int, default=0, help=f"SIGTERMs and SIGINTs, {HITS} a run")
    parser.add_argument("--faults", type=int, default=0, help="faults of the storage, one a run")
    parser.add_argument("--rounds", type=int, default=0, help="of the run that must hold steady")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        campaign = Campaign(pathlib.Path(name))
        print(f"an undisturbed run takes {campaign.seconds:.1f} s after its start-up", flush=True)
        failures = 0
        for name, case, hits in (
            ("kills", kills, HITS), ("signals", signals, HITS), ("faults", campaign_faults.fault, 1),
        ):  # fmt: skip
            if count := -(-getattr(given, name) // hits):
                failures += run_cases(campaign, name, case, range(given.first, given.first + count))
        if given.rounds:
            failures += campaign_steady.steady(campaign, given.rounds)
    print(f"{failures} failed")
    return failures


if __name__ == "__main__":
    sys.exit(main() > 0)
