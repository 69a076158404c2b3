"""The README's examples run, and it documents every field of the config."""

import importlib
import json
import pathlib
import re

import pytest
from test_configs import fields

import slide_jax
from configs import hfedmoe, slide
from hfedmoe_jax import score_rules
from launch.main import main, read_command
from slide_jax.profiles import PROFILES
from slide_jax.settings import read_setting, sample_drop

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
TINY = [
    f"--config.{field}"
    for field in (
        "model.width=8",
        "model.num_heads=2",
        "model.hidden=8",
        "data.vocab_size=300",
        "data.seq_len=16",
        "fl.rounds=1",
        "eval.max_examples=64",
    )
]


def block(first_line: str) -> str:
    (text,) = [text for text in BLOCKS if text.startswith(first_line)]
    return text


def test_the_selector_is_twenty_lines_and_runs(tmp_path):
    text = block("# configs/margin.py")
    assert len([line for line in text.splitlines() if line.strip()]) <= 20
    path = tmp_path / "margin.py"
    path.write_text(text)
    assert main([f"--config={path}:smoke", f"--workdir={tmp_path / 'run'}", *TINY]) == 0
    assert "margin" in score_rules
    assert (tmp_path / "run" / "report.html").exists()


def test_the_devices_are_read(tmp_path):
    path = tmp_path / "jetson.py"
    path.write_text(block("# configs/jetson.py"))
    config, *_ = read_command([f"--config={path}"])
    assert set(config.devices) == {"nano", "orin"}


def test_the_notebook_example_runs(capsys):
    exec(block("from configs import hfedmoe"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def test_the_new_solver_is_twenty_lines_and_in_table_and_sweeps(tmp_path, monkeypatch):
    text = block("# configs/undemanding.py")
    assert len([line for line in text.splitlines() if line.strip()]) <= 20
    monkeypatch.setitem(slide_jax.SOLVERS, "undemanding_first", None)  # taken away again after the test
    path = tmp_path / "undemanding.py"
    path.write_text(text)
    config, *_ = read_command([f"--config={path}:smoke"])
    problem = sample_drop(config)
    allocation = slide_jax.solve(problem, "undemanding_first")
    assert slide_jax.verify(problem, allocation) == []
    assert 0 < allocation.throughput <= slide_jax.solve(problem).throughput
    sweep = slide_jax.run_sweep(
        [read_setting(config)], problem.catalogue, drops=2, seed=0, solvers=["undemanding_first"]
    )
    assert sweep.served["undemanding_first"].shape == (1, 2)


def test_the_slide_example_runs(capsys):
    exec(block("# What would another megahertz"), {})
    served, spectrum, deadline = capsys.readouterr().out.splitlines()
    assert served.endswith("[]") and int(served.split()[0]) > 0
    assert 0 < float(spectrum.split()[0]) < 10 and float(deadline.split()[0]) < 0


def test_the_scenario_is_read():
    (text,) = re.findall(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    problem = slide_jax.read_scenario(json.loads(text))
    assert slide_jax.solve(problem).throughput == 1


def test_every_solver_and_profile_is_named():
    text = README.read_text(encoding="utf-8")
    assert [name for name in (*slide_jax.SOLVERS, *PROFILES) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("config", [hfedmoe, slide])
def test_every_config_field_is_documented(config):
    documented = set(re.findall(r"`([a-z0-9_.NAME]+)`", README.read_text(encoding="utf-8")))
    names = {name for name in fields(config.get_config()) if not name.startswith("devices.")}
    assert names - documented == set()


def test_every_field_of_a_device_is_documented():
    documented = set(re.findall(r"`([a-z0-9_.NAME]+)`", README.read_text(encoding="utf-8")))
    for device in hfedmoe.get_config().devices.values():
        assert {f"devices.NAME.{name}" for name in device} <= documented


@pytest.mark.parametrize(
    "name",
    sorted(set(re.findall(r"`((?:hfedmoe|slide)_jax\.[a-z_.]+)`", README.read_text(encoding="utf-8")))),
)
def test_every_function_that_the_readme_names_exists(name):
    package, *parts = name.split(".")
    module = importlib.import_module(package)
    for position, part in enumerate(parts):
        if not hasattr(module, part):
            importlib.import_module(".".join([package, *parts[: position + 1]]))
        module = getattr(module, part)
