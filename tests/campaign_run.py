"""The tiny run of the campaign against kills and faults: how it is started, hit, and compared."""

import filecmp
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import tiny_run

ROUNDS = 6
# Experts are chosen by chance, so that the keys of every round matter too.
FIELDS = {"fl__algorithm": "random", "fl__rounds": ROUNDS, "model__num_layers": 1, "checkpoint__every": 1}
COMPARED_OTHERWISE = (".lock", "metrics.csv", "report.html", "summary.json")
"""Files with times in them; `tiny_run.assert_same_results` compares the second and the last without."""
HANGS_S = 180


class Child:
    """A started command: its process, and what it has printed so far."""

    def __init__(self, command: list[str], workdir: pathlib.Path, logs: pathlib.Path, prefix: list[str]):
        self.workdir, self._out, self._err = workdir, logs / "out.txt", logs / "err.txt"
        self.begun = time.time()
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {
            "PYTHONPATH": str(tiny_run.ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
            "JAX_PLATFORMS": "cpu",
        }
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "launch.main", *command],
                env=environment,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def phase(self) -> str:
        """Returns what the process is doing, as far as its output and files tell."""
        out = self.out
        if "compiling" not in out:
            return "start-up" if self.has_handlers() else "Python's own start"
        if "Summary" in out:
            return "exit"
        if any(path.stat().st_mtime > self.begun for path in self.workdir.glob("figures/*")):
            return "figures"
        if list(self.workdir.glob("checkpoints/*tmp*")):
            return "checkpoint"
        if "finished" in out or f"rounds {ROUNDS}/" in out:
            return "evaluation"
        return "rounds" if "rounds " in out else "first round"

    def has_handlers(self) -> bool:
        """Says whether the program has begun to handle signals: SIGTERM, which Python leaves alone."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s*(\w+)", status)
        return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    def wait_until(self, instant: tuple[str, float]) -> str | None:
        """Waits for a phase and so many seconds more; returns the phase then, None if the process ended."""
        phase, seconds = instant
        deadline = time.time() + HANGS_S
        while phase and self.process.poll() is None and self.phase() != phase and time.time() < deadline:
            time.sleep(0.003)
        end = time.time() + seconds
        while self.process.poll() is None and time.time() < end:
            time.sleep(0.003)
        return self.phase() if self.process.poll() is None else None

    def end(self) -> tuple[int, str]:
        """Returns the exit code and what stderr holds; a process that hangs is killed."""
        try:
            self.process.wait(HANGS_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return self.process.returncode, f"it hung for {HANGS_S} s\n{self.err}"
        return self.process.returncode, self.err


class Campaign:
    """Starts runs in a folder and compares them with one that nothing disturbed.

    Attributes:
      said: how often each line came on stderr, without its numbers.
      codes: exit codes of the runs since they were last cleared.
      seconds: that the undisturbed run took.
      half: a work directory of a run killed after its third round.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.said, self.codes = folder, Counter(), []
        self.train = tiny_run.write_jsonl(folder / "train.jsonl", tiny_run.texts(60))
        self.compiled, self.whole, self.half = (folder / name for name in ("compiled", "whole", "half"))
        for workdir in (folder / "compiling", self.whole):
            code, err = self.start(workdir).end()
            assert (code, err) == (0, ""), err
        self.seconds = self.whole.joinpath("summary.json").stat().st_mtime - (
            self.whole.joinpath("config.json").stat().st_mtime
        )
        child = self.start(self.half)
        while not (self.half / "checkpoints" / "3").exists():
            assert child.process.poll() is None, child.err
            time.sleep(0.003)
        child.process.kill()
        child.end()

    def start(self, workdir: pathlib.Path, prefix: Sequence[str] = (), **fields: Any) -> Child:
        """Starts the run in a work directory, or continues it.

        Args:
          prefix: a program that limits the command, with its arguments.
          fields: of the command, beside or instead of `FIELDS`; `compiled` is that flag.
        """
        compiled = fields.pop("compiled", self.compiled)
        command = tiny_run.arguments(workdir, self.train, **FIELDS | fields)
        return Child([*command, f"--compiled={compiled}"], workdir, self.folder, list(prefix))

    def instant(self, rng: random.Random) -> tuple[str, float]:
        """Returns a random instant of a run: any at all, or one soon after a phase begins."""
        phase = rng.choice(["", "", "", "start-up", "checkpoint", "checkpoint", "evaluation", "figures"])
        return phase, rng.uniform(0, 0.25 if phase else self.seconds + 2)

    def unclear(self, child: Child) -> list[str]:
        """Returns what is wrong with how a disturbed run ends: a failure is a line with path and remedy."""
        code, err = child.end()
        self.codes.append(code)
        lines = self._note(err)
        if code not in (0, 1, 2) or "Traceback" in err or len(lines) > 1:
            return [f"code {code}, {err[-2000:]!r}"]
        if code and not (lines and re.match(r"error: .+[:=].+; .+", err) and "/" in err):
            return [f"code {code}, no path or remedy: {err!r}"]
        return []

    def ended(self, child: Child, lines: int = 0) -> list[str]:
        """Returns what is wrong with a run that nothing disturbs any more: it must end like the whole one.

        Args:
          lines: on stderr, at most.
        """
        code, err = child.end()
        self.codes.append(code)
        if code or "Traceback" in err or len(self._note(err)) > lines:
            return [f"the last run ended with code {code} and {err[-2000:]!r}"]
        return self.differences(child.workdir)

    def _note(self, err: str) -> list[str]:
        """Counts and returns the lines of stderr."""
        lines = err.splitlines()
        plain = [re.sub(r"[0-9a-f]{32}", "HASH", line.replace(f"{self.folder}/", "")) for line in lines]
        self.said.update(re.sub(r"\d+", "N", line) for line in plain)
        return lines

    def differences(self, workdir: pathlib.Path) -> list[str]:
        """Returns in what a finished work directory differs from the undisturbed one, times apart."""
        found = []
        try:
            tiny_run.assert_same_results(workdir, self.whole)
        except Exception as error:
            found.append(f"other results: {type(error).__name__}: {str(error)[:300]}")
        files, expected = (_files(each) for each in (workdir, self.whole))
        if files != expected:
            found.append(f"other files: {sorted(files ^ expected)}")
        same = [name for name in files & expected if name not in COMPARED_OTHERWISE]
        changed = filecmp.cmpfiles(workdir, self.whole, same, shallow=False)[1:]
        found += [f"{name} differs" for names in changed for name in names]
        return found


def _files(workdir: pathlib.Path) -> set[str]:
    """Returns the files of a work directory, but those of checkpoints, events and files put aside."""
    paths = {path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()}
    apart = ("checkpoints", "checkpoints_unusable", "tensorboard", "metrics_changed.csv")
    return {str(path) for path in paths if path.parts[0] not in apart}
