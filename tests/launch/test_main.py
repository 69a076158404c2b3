import errno
import os
import signal
import subprocess
import sys
import types

import pytest

from hfedmoe_jax.errors import InputError
from launch import main as front_door
from launch.experiments import run_experiment
from launch.run.command import apply_overrides, load_config
from launch.run.program import NothingTrainedError
from slide_jax.errors import InputError as SlideInputError

CONFIG_FILE = """
from ml_collections import ConfigDict
from hfedmoe_jax.errors import InputError

def get_config(preset="default"):
    if preset not in ("default", "small"):
        raise InputError("config", preset, "unknown preset", "use default or small")
    config = ConfigDict()
    config.experiment = "hfedmoe"
    config.seed = 0
    config.fl = ConfigDict({"rounds": 3, "algorithm": "hfedmoe", "adaptive": False})
    config.data = ConfigDict({"source": "bbc_news", "alpha": 0.5, "shape": (1, 2)})
    if preset == "small":
        config.fl.rounds = 1
    return config
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty directory with a config file in it, an experiment that only notes its calls, and they."""
    calls = []
    module = types.ModuleType("launch.hfedmoe.experiment")
    module.run_experiment = lambda config, workdir, host, source: calls.append((config, workdir))
    monkeypatch.setitem(sys.modules, "launch.hfedmoe.experiment", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "surrogate.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(preset=''):\n    return ConfigDict({'device': {'\\udcff': 'x\\udcff'}})"
    )
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "refuses.py").write_text(
        "def get_config(preset=''):\n    raise ValueError('no such\\npreset')"
    )
    (tmp_path / "text.txt").write_text("")
    return calls


def test_runs_the_experiment_with_the_overrides(runs, tmp_path):
    arguments = [
        "--config=config.py",
        "--config.fl.rounds=7",
        "--config.data.alpha",
        "1",
        "--config.fl.adaptive",
    ]
    assert front_door.main([*arguments, "--config.data.shape=(3,4)", f"--workdir={tmp_path}/w"]) == 0
    ((config, workdir),) = runs
    assert (config.fl.rounds, config.data.alpha, config.fl.adaptive) == (7, 1.0, True)
    assert (config.data.shape, config.data.source) == ((3, 4), "bbc_news")
    assert workdir == tmp_path / "w"
    with pytest.raises(AttributeError):
        config.fl.new_field = 1


def test_flags_may_come_in_any_order(runs):
    assert front_door.main(["--config.seed=4", "--config", "config.py:small"]) == 0
    ((config, _),) = runs
    assert (config.seed, config.fl.rounds) == (4, 1)


def test_default_workdir_follows_the_config(runs):
    for arguments in ([], [], ["--config.seed=1"]):
        assert front_door.main(["--config=config.py:small", *arguments]) == 0
    first, again, other = (str(workdir) for _, workdir in runs)
    assert first == again != other
    assert first.startswith("runs/config-small-hfedmoe-seed0-")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "config=None: missing; give e.g. --config=configs/hfedmoe.py"),
        (["--config=none.py"], "config='none.py': no file none.py; "),
        (["--config=text.txt"], "config='text.txt': not a Python file; "),
        (
            ["--config=broken.py"],
            "config='broken.py': ModuleNotFoundError: No module named 'nowhere_to_be_found'; ",
        ),
        (["--config=empty.py"], "config='empty.py': AttributeError: "),
        (["--config=refuses.py:x"], "config='refuses.py:x': no such preset; "),
        (["--config=config.py:tiny"], "config='tiny': unknown preset; use default or small"),
        (
            ["--config=config.py", "--config.fl.round=3"],
            "fl.round='3': unknown config field; did you mean fl.rounds?",
        ),
        (
            ["--config=config.py", "--config.alpha", "3"],
            "alpha='3': unknown config field; did you mean data.alpha?",
        ),
        (["--config=config.py", "--config.zzz=3"], "zzz='3': unknown config field; the config file lists"),
        (
            ["--config=config.py", "--config.fl=3"],
            "fl='3': is a group of fields; set its fields, e.g. --config.fl.",
        ),
        (
            ["--config=config.py", "--config.seed=x"],
            "seed='x': is not a whole number; give e.g. --config.seed=0",
        ),
        (["--config=config.py", "--config.seed", "1.5"], "seed='1.5': is not a whole number; "),
        (["--config=config.py", "--config.data.alpha=x"], "data.alpha='x': is not a number; "),
        (
            ["--config=config.py", "--config.fl.adaptive=perhaps"],
            "fl.adaptive='perhaps': is not true or false; ",
        ),
        (["--config=config.py", "--config.seed"], "seed='': Missing value for flag --config.seed; "),
        (["--config=config.py", "--workdirs=x"], "flag='--workdirs': unknown; did you mean --workdir?"),
        (["--config=config.py", "--seed=3"], "flag='--seed': unknown; did you mean --config.seed?"),
        (["--config=config.py", "--workdir"], "command='--config=config.py --workdir': Missing value"),
        (["--config=config.py", "seed=3"], "argument='seed=3': is no flag; "),
        (
            ["--config=config.py", "--config.data.source=\udcff"],
            "command='--config.data.source=\\udcff': is not UTF-8 text; ",
        ),
        (["--config=config.py", "--workdir=a\ud800"], "command='--workdir=a\\ud800': is not UTF-8 text; "),
        (["--config=surrogate.py"], "device.\\udcff='x\\udcff': is not UTF-8 text; "),
        (
            ["--config=config.py", "--config.experiment=hfedmo"],
            "experiment='hfedmo': unknown name; did you mean 'hfedmoe'?",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_nothing_written(runs, tmp_path, capsys, arguments, line):
    before = sorted(tmp_path.iterdir())
    assert front_door.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {line}")
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert runs == []
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_the_input_error_of_either_package_exits_with_2(runs, capsys, monkeypatch):
    for error_type in (InputError, SlideInputError):
        error = error_type("data.alpha", -1, "must be above 0", "use e.g. 0.3")
        monkeypatch.setattr(sys.modules["launch.hfedmoe.experiment"], "run_experiment", _raises(error))
        assert front_door.main(["--config=config.py"]) == 2
        assert capsys.readouterr().err == f"error: {error}\n"


def test_bugs_keep_their_traceback(runs, monkeypatch):
    class Other(ValueError):
        pass

    Other.__name__ = "InputError"  # the name alone does not make an error the user's
    experiment = sys.modules["launch.hfedmoe.experiment"]
    for error_type in (ValueError, Other):
        monkeypatch.setattr(experiment, "run_experiment", _raises(error_type("shapes do not match")))
        with pytest.raises(ValueError, match="shapes do not match"):
            front_door.main(["--config=config.py"])


ANSWERED = """
import jax
from launch.main import main
from launch.run.program import is_input_error
from hfedmoe_jax.errors import InputError
from slide_jax.errors import InputError as SlideInputError
assert all(is_input_error(error("seed", 0, "too small", "give 1")) for error in (InputError, SlideInputError))
jax.config.update("jax_num_cpu_devices", 3)  # an error once JAX has started
print(jax.device_count())
"""


def test_errors_are_told_apart_before_jax_starts():
    environment = _environment() | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", ANSWERED]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert (child.stdout, child.stderr) == ("3\n", "")


def test_a_program_can_run_several_configs(runs, tmp_path):
    for rounds in (5, 6):
        config = load_config("config.py:small")
        apply_overrides(config, [f"--config.fl.rounds={rounds}"])
        run_experiment(config, tmp_path / str(rounds))
    assert [config.fl.rounds for config, _ in runs] == [5, 6]


def _raises(error):
    def run(config, workdir, host, source):
        raise error

    return run


def test_help(capsys):
    assert front_door.main(["--help"]) == 0
    assert "--workdir=DIR" in capsys.readouterr().out


def test_the_program_exits_with_2_and_no_traceback(runs, tmp_path):
    command = [sys.executable, "-m", "launch.main", "--config=config.py", "--config.sed=1"]
    child = subprocess.run(
        command, env=_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert child.returncode == 2
    assert child.stderr == "error: sed='1': unknown config field; did you mean seed?\n"
    assert child.stdout == ""


STUB = """
import sys, types
from launch.run.starting import end_at_interrupt
end_at_interrupt()
experiment = types.ModuleType("launch.hfedmoe.experiment")
sys.modules["launch.hfedmoe.experiment"] = experiment
def run(config, workdir, host, source):
{body}
experiment.run_experiment = run
from launch.main import main
sys.exit(main(sys.argv[1:]))
"""


def _start(body: str, *arguments: str) -> subprocess.Popen:
    body = "\n".join(f"    {line}" for line in body.strip().splitlines())
    command = [sys.executable, "-c", STUB.format(body=body), *arguments]
    return subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _environment() -> dict[str, str]:
    root = os.path.dirname(os.path.dirname(front_door.__file__))
    return os.environ | {"PYTHONPATH": root}


INTERRUPTED = "interrupted: give the same command again\n"
WAIT = "import time\nprint('ready', flush=True)\ntime.sleep(60)"
IN_FINALIZER = f"""
class Slow:
    def __del__(self):
        import time
        print('ready', flush=True)
        time.sleep(60)
Slow()
{WAIT}
"""
AT_EXIT = """
import atexit, time
atexit.register(lambda: (print('ready', flush=True), time.sleep(60)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("body", "ends"),
    [(WAIT, (130, INTERRUPTED)), (IN_FINALIZER, (130, INTERRUPTED)), (AT_EXIT, (0, ""))],
    ids=["work", "finalizer", "exit"],
)
def test_interrupt_exits_with_130_and_says_how_to_go_on(runs, number, body, ends):
    """Also where Python drops exceptions; a run whose work is over is not called interrupted."""
    child = _start(body, "--config=config.py", "--workdir=w")
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, error = child.communicate(timeout=180)
    assert (child.returncode, error) == ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", ["main", "bench"])
def test_interrupt_while_the_libraries_load_is_one_line(tmp_path, program, number):
    """JAX is replaced by a module that takes long to load."""
    (tmp_path / "jax.py").write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), _environment()["PYTHONPATH"]])}
    child = subprocess.Popen(
        [sys.executable, "-m", f"launch.{program}", "--help"],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout and child.stdout.readline() == "loading\n"
    child.send_signal(number)
    _, error = child.communicate(timeout=180)
    assert (child.returncode, error) == (130, "interrupted: nothing had begun\n")


def test_interrupts_storage_that_fails_and_runs_that_train_nothing_have_codes_of_their_own(
    runs, capsys, monkeypatch
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "w/metrics.csv")
    full.add_note("it continues after round 3")
    stopped = KeyboardInterrupt()
    stopped.add_note("it continues after round 3")
    monkeypatch.setattr(sys.modules["launch.hfedmoe.experiment"], "run_experiment", _raises(stopped))
    assert front_door.main(["--config=config.py"]) == 130
    assert capsys.readouterr().err == f"{INTERRUPTED[:-1]}; it continues after round 3\n"
    for error, code, line in (
        (full, 1, "w/metrics.csv: No space left on device; make room on the file system and give the same "
                  "command again; it continues after round 3"),
        (NothingTrainedError("no round trained"), 4, "no round trained"),
        (MemoryError("Unable to allocate 30 GiB"), 1, "the memory of this machine is not enough (Unable to "
                  "allocate 30 GiB); use smaller batches or a smaller model"),
        (RuntimeError("RESOURCE_EXHAUSTED: no memory\nof a device"), 1, "the memory of this machine is not "
                  "enough (RESOURCE_EXHAUSTED: no memory); use smaller batches or a smaller model"),
    ):  # fmt: skip
        monkeypatch.setattr(sys.modules["launch.hfedmoe.experiment"], "run_experiment", _raises(error))
        assert front_door.main(["--config=config.py"]) == code
        assert capsys.readouterr().err == f"error: {line}\n"


WHOLE_RUN = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
import jax, jax.numpy as jnp
assert jax.device_count() == 3, "JAX had started before the experiment could choose its devices"
from launch.run.checkpoints import Checkpoints
from launch.run.progress import Progress
from launch.run.workdir import open_workdir
from launch.run.writers import MetricWriter
open_workdir(workdir, config.to_dict())
state = {"weight": jnp.zeros(3)}
with Checkpoints(workdir / "checkpoints", 2) as checkpoints:
    done, (state, kept) = checkpoints.restore((state, "")) or (0, (state, ""))
    writer, bar = MetricWriter(workdir, ["loss"], kept), Progress(config.fl.rounds, "rounds", done)
    with writer, bar:
        for number in range(done + 1, config.fl.rounds + 1):
            state = {"weight": state["weight"] + 1}
            writer.write(number, {"loss": 1 / number})
            checkpoints.save(number, (state, writer.text))
            bar.update(number, loss=1 / number)
print(float(state["weight"].sum()))
"""


def test_the_parts_together_leave_a_clean_screen_and_continue(runs, tmp_path):
    for lines in (["9.0"], ["9.0"]):
        out, error = (child := _start(WHOLE_RUN, "--config=config.py", "--workdir=w")).communicate(
            timeout=180
        )
        assert (child.returncode, error) == (0, "")
        assert out.splitlines()[-1:] == lines
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.csv",
        "tensorboard",
    ]
    assert len((tmp_path / "w" / "metrics.csv").read_text().splitlines()) == 4
