import errno
import fcntl
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError
from launch.run.workdir import Fingerprint, default_workdir, hold_workdir, open_workdir, versions, write_json

CONFIG = {"seed": 0, "data": {"source": "bbc", "lengths": (1, 2)}, "rate": 0.1}


def test_new_directory_gets_the_config(tmp_path):
    directory = open_workdir(tmp_path / "a" / "b", CONFIG)
    assert json.loads((directory / "config.json").read_text()) == {
        **CONFIG,
        "data": {"source": "bbc", "lengths": [1, 2]},
    }
    assert [path.name for path in directory.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "name",
    ["checkpoints", "checkpoints_unusable", "figures", "tensorboard", "compiled", "model", "metrics.csv",
     "report.html", "summary.json", ".metrics.csv.tmp", "figures/learning.png"],
)  # fmt: skip
@pytest.mark.parametrize("link", [False, True])
def test_something_else_in_place_of_a_file_or_directory_is_refused_before_the_run(tmp_path, name, link):
    directory = open_workdir(tmp_path / "run", CONFIG)
    path, is_file = directory / name, "." in name
    path.parent.mkdir(exist_ok=True)
    if link:  # a link without an end takes the place of a directory, not of a file
        path.symlink_to(tmp_path / "nothing")
    elif is_file:
        path.mkdir()
    else:
        path.write_text("")
    if link and is_file:
        open_workdir(directory, CONFIG)
        return
    with pytest.raises(InputError, match=f"{re.escape(str(path))} should be a .* and is none; move it away"):
        open_workdir(directory, CONFIG)


@pytest.mark.parametrize("name", [".lock", "metrics.csv", "tokenizer.json", "config.json", "figures"])
def test_a_pipe_or_a_socket_is_refused_and_not_waited_for(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    for make in (os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(path)):
        make(name)
        with (
            pytest.raises(InputError, match=f"{re.escape(name)} should be a .* and is none"),
            hold_workdir("."),
        ):
            pass
        os.unlink(name)


def test_same_config_opens_again_and_changes_nothing(tmp_path):
    directory = open_workdir(tmp_path, CONFIG)
    before = (directory / "config.json").stat().st_mtime_ns
    (directory / "metrics.csv").write_text("round\n")
    assert open_workdir(tmp_path, CONFIG) == directory
    assert (directory / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({**CONFIG, "seed": 1}, "seed=1: the run in DIR was started with 0; give"),
        (
            {**CONFIG, "seed": 1, "rate": 0.2},
            "rate=0.2: the run in DIR was started with 0.1 (1 more field differs)",
        ),
        (
            {**CONFIG, "data": {"source": "file", "lengths": (1, 2)}},
            "data.source='file': the run in DIR was started with 'bbc'",
        ),
        ({**CONFIG, "extra": 3}, "extra=3: the run in DIR was started with no such field"),
        (
            {"seed": 0, "rate": 0.1},
            "data.lengths=None: the run in DIR was started with [1, 2] (1 more field differs)",
        ),
    ],
)
def test_conflicting_config_names_the_field_and_both_values(tmp_path, config, text):
    open_workdir(tmp_path, CONFIG)
    with pytest.raises(InputError, match="--workdir") as error:
        open_workdir(tmp_path, config)
    assert str(error.value).startswith(text.replace("DIR", str(tmp_path)))
    open_workdir(tmp_path, CONFIG)


PRINTS = [Fingerprint("config", "mine.py", "its text", "aa"), Fingerprint("data.path", "x", "the rows", "bb")]


def test_a_directory_belongs_to_what_its_run_was_made_of(tmp_path):
    open_workdir(tmp_path, CONFIG, PRINTS)
    assert json.loads((tmp_path / "fingerprints.json").read_text()) == {"its text": "aa", "the rows": "bb"}
    open_workdir(tmp_path, CONFIG, PRINTS)
    with pytest.raises(InputError) as error:
        open_workdir(tmp_path, CONFIG, [PRINTS[0], PRINTS[1]._replace(value="y", digest="cc")])
    assert str(error.value) == (
        f"data.path='y': the rows changed since the run in {tmp_path} was started; restore them, "
        "or give another --workdir"
    )
    (tmp_path / "fingerprints.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"fingerprints\.json cannot be read; give another --workdir"):
        open_workdir(tmp_path, CONFIG, PRINTS)
    (tmp_path / "fingerprints.json").unlink()  # of a version that had none
    open_workdir(tmp_path, CONFIG, PRINTS)


def test_a_raisable_number_may_grow_and_nothing_else_may(tmp_path):
    open_workdir(tmp_path, {"fl": {"rounds": 4}, "seed": 1})
    open_workdir(tmp_path, {"fl": {"rounds": 6}, "seed": 1}, raisable=["fl.rounds"])
    assert json.loads((tmp_path / "config.json").read_text())["fl"] == {"rounds": 6}
    for rounds, seed, error in ((5, 1, "fl.rounds=5: .*with 6; give that value again or a larger one"),
                                (7, 2, "seed=2: .*started with 1; give that value again, or"),
                                ("7", 1, "fl.rounds='7'")):  # fmt: skip
        with pytest.raises(InputError, match=error):
            open_workdir(tmp_path, {"fl": {"rounds": rounds}, "seed": seed}, raisable=["fl.rounds"])
    assert json.loads((tmp_path / "config.json").read_text()) == {"fl": {"rounds": 6}, "seed": 1}


def test_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"workdir=.*holds other files"):
        open_workdir(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_run_killed_while_writing_its_config_starts_again(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"se')
    open_workdir(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/none"])
def test_path_that_cannot_be_a_directory(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"workdir=.*no directory that can be written.*another --workdir"):
        open_workdir(tmp_path / path, CONFIG)


def test_unreadable_config_is_an_input_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        open_workdir(tmp_path, CONFIG)


def test_write_json_takes_arrays_and_turns_nan_into_null(tmp_path):
    value = {
        "nan": math.nan,
        "arrays": (np.array([1.5, np.inf]), jnp.arange(2)),
        "scalars": [np.float32(0.5), np.int64(3), np.bool_(True), jnp.float32(2)],
        "path": tmp_path,
        3: None,
    }
    write_json(tmp_path / "s.json", value)
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "nan": None,
        "arrays": [[1.5, None], [0, 1]],
        "scalars": [0.5, 3, True, 2.0],
        "path": str(tmp_path),
        "3": None,
    }


def test_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "s.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "s.json", {"new": object()})
    assert json.loads((tmp_path / "s.json").read_text()) == {"old": 1}


def test_default_workdir_depends_on_every_field_and_only_on_the_config():
    def config(**change):
        return ConfigDict(
            {"experiment": "hfedmoe", "seed": 1, "data": {"source": "hub:a/b"}, "fl": {"algorithm": "random"}}
            | change
        )

    path = default_workdir(config(), "hfedmoe")
    assert path.parent == pathlib.Path("runs")
    assert path.name.startswith("hfedmoe-hub_a_b-random-seed1-")
    assert path == default_workdir(config(), "hfedmoe")
    assert path != default_workdir(config(rate=0.1), "hfedmoe")
    assert default_workdir(config(), "hfedmoe", "smoke").name.startswith("hfedmoe-smoke-random-seed1-")


def test_default_workdir_of_an_experiment_without_data_or_federation():
    assert default_workdir(ConfigDict({"users": 5}), "slide").name.startswith("slide-")


def test_versions_are_text():
    found = versions()
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "platform", "device"} <= set(
        found
    )
    assert all(isinstance(value, str) and value for value in found.values())


HOLDER = """
import sys
from launch.run.workdir import hold_workdir
with hold_workdir(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_told_who_holds_the_directory_until_that_process_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a" / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout and child.stdout.readline() == b"held\n"
        with pytest.raises(InputError) as error, hold_workdir(tmp_path / "a" / "run"):
            pass
        child.kill()
    holder = f"process {child.pid} on {re.escape(socket.gethostname())}, since 20[-0-9]+ [0-9:+-]+"
    assert error.value.field == "workdir"
    assert re.fullmatch(f"is in use by {holder}", error.value.problem)
    with hold_workdir(tmp_path / "a" / "run"):
        pass


def test_a_held_directory_is_free_again_and_becomes_a_work_directory(tmp_path):
    for _ in range(2):
        with hold_workdir(tmp_path):
            open_workdir(tmp_path, CONFIG)
            with pytest.raises(InputError, match=f"process {os.getpid()} on"), hold_workdir(tmp_path):
                pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


def test_nothing_is_left_in_a_directory_of_others(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other files"), hold_workdir(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_without_locks_of_the_file_system_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys):
    def fail(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with hold_workdir(tmp_path):
        open_workdir(tmp_path, CONFIG)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {tmp_path} cannot be locked (No locks available): start no second run in it"


def test_errors_of_the_system_name_the_directory_unless_they_name_a_file(tmp_path):
    for given, named in ((None, str(tmp_path)), ("metrics.csv", "metrics.csv")):
        with pytest.raises(OSError) as error, hold_workdir(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device", given)
        assert error.value.filename == named


def test_a_disk_that_is_full_for_the_lock_already_is_told_with_the_directory(tmp_path, monkeypatch):
    def full(path):
        return open("/dev/full", "r+")

    monkeypatch.setattr("launch.run.workdir._open_lock", full)
    with pytest.raises(OSError) as failed, hold_workdir(tmp_path):
        pass
    assert failed.value.filename == str(tmp_path)


def test_fingerprints_that_were_removed_are_written_again(tmp_path, capsys):
    was = Fingerprint("data.train_path", "a.csv", "the texts or labels", "1")
    open_workdir(tmp_path, {"seed": 0}, [was])
    (tmp_path / "fingerprints.json").unlink()
    open_workdir(tmp_path, {"seed": 0}, [was])
    assert "fingerprints.json was missing: data and config file are taken" in capsys.readouterr().err
    with pytest.raises(InputError, match="the texts or labels changed"):
        open_workdir(tmp_path, {"seed": 0}, [was._replace(digest="2")])


def test_fingerprints_that_were_removed_are_those_of_the_checkpoint(tmp_path, capsys):
    was = Fingerprint("data.train_path", "a.csv", "the texts or labels", "1")
    open_workdir(tmp_path, {"seed": 0}, [was])
    (tmp_path / "fingerprints.json").unlink()
    saved = {was.what: "1"}
    for _ in range(2):  # the refusal leaves nothing behind
        with pytest.raises(InputError, match="the texts or labels changed since the run"):
            open_workdir(tmp_path, {"seed": 0}, [was._replace(digest="2")], saved=saved)
    open_workdir(tmp_path, {"seed": 0}, [was], saved=saved)
    assert capsys.readouterr().err.endswith("fingerprints.json was missing: written again\n")
    assert json.loads((tmp_path / "fingerprints.json").read_text()) == saved
