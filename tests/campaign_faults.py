"""Faults of the storage under a run of the campaign."""

import contextlib
import pathlib
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator

from campaign_run import Campaign

OBEYING = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Starts a command that permissions bind, though it is root's."""

Case = tuple[list[str], list[str]]


def fault(campaign: Campaign, seed: int) -> Case:
    """Runs the case of a seed: the kinds take turns."""
    kind = KINDS[seed % len(KINDS)]
    struck: list[str] = []
    campaign.codes.clear()
    wrong = kind(campaign, random.Random(f"fault {seed}"), campaign.folder / "run", struck)
    return [f"{kind.__name__}, code {campaign.codes[0]}"], [f"{' '.join(struck)}: {each}" for each in wrong]


def full_disk(campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]) -> list[str]:
    """The work directory lies on a small file system, in half of the cases with the compiled programs."""
    size = rng.choice([16, 64, 128, 256, 384, 512, 768, 1024, 1400])
    with mounted(place, size):
        compiled = campaign.compiled
        if rng.random() < 0.5:
            compiled = some_compiled(rng, campaign, place / "compiled")
            struck.append("with programs")
        struck.append(f"of {size} kB")
        child = campaign.start(place / "w", compiled=compiled)
        wrong = campaign.unclear(child)
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        wrong += campaign.ended(campaign.start(child.workdir, compiled=compiled))
    return wrong


def file_size(campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]) -> list[str]:
    """No file may be larger than some kB, from the start or from an instant on."""
    most = int(10 ** rng.uniform(2.3, 5.3))
    return limited(campaign, rng, place, struck, "fsize", most)


def descriptors(campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]) -> list[str]:
    """Only some files may be open, from the start or from an instant on."""
    return limited(campaign, rng, place, struck, "nofile", rng.randint(8, 40))


def limited(
    campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str], kind: str, most: int
) -> list[str]:
    """Sets a limit of the process, then starts it again without."""
    compiled = campaign.compiled
    if rng.random() < 0.3:
        compiled = some_compiled(rng, campaign, place.with_name("run_compiled"))
        struck.append("with programs")
    if rng.random() < 0.5:
        child = campaign.start(place, compiled=compiled, prefix=["prlimit", f"--{kind}={most}:"])
        struck.append(f"{most} from the start")
    else:
        child = campaign.start(place, compiled=compiled)
        phase = child.wait_until(campaign.instant(rng))
        if phase:
            subprocess.run(["prlimit", f"--pid={child.process.pid}", f"--{kind}={most}:"], check=False)
        struck.append(f"{most} in {phase}")
    return campaign.unclear(child) + campaign.ended(campaign.start(place, compiled=compiled))


def removed(campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]) -> list[str]:
    """A directory or file is removed during the run."""
    child = campaign.start(place)
    phase = child.wait_until(instant_of_work(campaign, rng))
    name = rng.choice([".", "checkpoints", "figures", "tensorboard", "*.*", "checkpoints/*"])
    paths = [place] if name == "." else sorted(place.glob(name))
    path = rng.choice(paths) if paths else place
    struck.append(f"{path.name} in {phase}")
    for _ in range(5):  # the run may be writing there
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()
    wrong = campaign.unclear(child)
    if place.exists() and not (place / "config.json").exists():  # Orbax has made a directory again
        code, err = campaign.start(place).end()
        if code != 2 or "no config.json; give a new or empty --workdir" not in err:
            wrong.append(f"code {code}, {err!r}")
        shutil.rmtree(place, ignore_errors=True)
    return wrong + ended_after_damage(campaign, place)


def read_only(campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]) -> list[str]:
    """A directory may not be written, from the start or from an instant on."""
    name = rng.choice([".", ".", "checkpoints", "figures", "tensorboard"])
    path = place / name
    if rng.random() < 0.4:
        path.mkdir(parents=True) if name == "." else shutil.copytree(campaign.half, place)
        path.mkdir(exist_ok=True)
        path.chmod(0o555)
        child, phase = campaign.start(place, OBEYING), "the start"
    else:
        child = campaign.start(place, OBEYING)
        phase = child.wait_until(instant_of_work(campaign, rng))
        if path.exists():
            path.chmod(0o555)
    struck.append(f"{path.name} from {phase}")
    wrong = campaign.unclear(child)
    for each in (place, path):
        if each.exists():
            each.chmod(0o755)
    return wrong + campaign.ended(campaign.start(place))


def damaged_checkpoints(
    campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]
) -> list[str]:
    """Files of the newest checkpoint, of several or of all are damaged after a kill."""
    shutil.copytree(campaign.half, place)
    steps = sorted(place.glob("checkpoints/*"))
    for step in steps if rng.random() < 0.4 else steps[-1:]:
        files = sorted(path for path in step.rglob("*") if path.is_file())
        for path in rng.sample(files, rng.choice([1, 1, 3, len(files)])):
            struck.append(f"{damage(rng, path)} {path.relative_to(place)}")
    return ended_after_damage(campaign, place)


def damaged_metrics(
    campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]
) -> list[str]:
    """metrics.csv is damaged or edited, after a kill or during the run."""
    if rng.random() < 0.5:
        shutil.copytree(campaign.half, place)
        child = None
    else:
        child = campaign.start(place)
        child.wait_until(("rounds", rng.uniform(0, 1)))
    path = place / "metrics.csv"
    if not path.exists():
        struck.append("nothing")
    elif rng.random() < 0.5:
        struck.append(damage(rng, path))
    else:
        struck.append("edited")
        content = path.read_bytes()
        edits = [
            content.replace(b"0.", b"1.", 3), content + b"7,8,9\n", content.replace(b",", b";"),
            b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"), content[: len(content) // 2] * 2,
        ]  # fmt: skip
        path.write_bytes(rng.choice(edits))
    wrong = campaign.unclear(child) if child else []
    return wrong + ended_after_damage(campaign, place)


def damaged_files(
    campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]
) -> list[str]:
    """Another file of the work directory is damaged after a kill; a refusal ends with the file put back."""
    shutil.copytree(campaign.half, place)
    path = place / rng.choice(["config.json", "fingerprints.json", "tokenizer.json", ".lock"])
    before = path.read_bytes()
    struck.append(f"{damage(rng, path)} {path.name}")
    child = campaign.start(place)
    wrong = campaign.unclear(child)
    if child.process.returncode == 0:
        return wrong + campaign.differences(child.workdir)
    path.write_bytes(before)
    return wrong + campaign.ended(campaign.start(place))


def damaged_programs(
    campaign: Campaign, rng: random.Random, place: pathlib.Path, struck: list[str]
) -> list[str]:
    """Files of compiled programs are damaged: they are compiled again."""
    compiled = some_compiled(rng, campaign, place.with_name("run_compiled"))
    struck.append(f"{len(list(compiled.iterdir()))} left")
    return campaign.ended(campaign.start(place, compiled=compiled))


KINDS: list[Callable[[Campaign, random.Random, pathlib.Path, list[str]], list[str]]] = [
    full_disk, file_size, descriptors, removed, read_only,
    damaged_checkpoints, damaged_metrics, damaged_files, damaged_programs,
]  # fmt: skip


def instant_of_work(campaign: Campaign, rng: random.Random) -> tuple[str, float]:
    """Returns a random instant at which the work directory is there."""
    phase = rng.choice(["first round", "rounds", "checkpoint", "evaluation", "figures"])
    return phase, rng.uniform(0, 4 if phase == "first round" else 1)


def ended_after_damage(campaign: Campaign, place: pathlib.Path) -> list[str]:
    """Returns what is wrong with a run that finds damage: at most a line tells, and the bits are the same."""
    return campaign.ended(campaign.start(place), lines=1)


def damage(rng: random.Random, path: pathlib.Path) -> str:
    """Damages a file and says how."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["truncated", "zeroed", "flipped", "emptied", "removed"])
    if how == "removed":
        path.unlink()
        return how
    if how == "truncated":
        content = content[: rng.randrange(len(content) + 1)]
    elif how == "zeroed":
        content = bytearray(len(content))
    elif how == "emptied":
        content = bytearray()
    elif content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return how


def some_compiled(rng: random.Random, campaign: Campaign, directory: pathlib.Path) -> pathlib.Path:
    """Copies the compiled programs, some of them damaged, and returns the directory."""
    directory.mkdir()
    with contextlib.suppress(OSError):  # a full disk takes some
        for path in sorted(campaign.compiled.iterdir()):
            shutil.copy(path, directory)
    for path in sorted(directory.iterdir()):
        if rng.random() < 0.2:
            damage(rng, path)
    return directory


@contextlib.contextmanager
def mounted(place: pathlib.Path, kilobytes: int) -> Iterator[None]:
    """Mounts an empty file system of a size."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "campaign", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)
