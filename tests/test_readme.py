"""The README's examples run, and it documents every field of the config."""

import pathlib
import re

import pytest
from test_configs import fields

from configs import hfedmoe
from hfedmoe_jax import score_rules
from launch.main import main, read_command

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
    config, _ = read_command([f"--config={path}"])
    assert set(config.devices) == {"nano", "orin"}


def test_the_notebook_example_runs(capsys):
    exec(block("from configs import hfedmoe"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def test_every_config_field_is_documented():
    documented = set(re.findall(r"`([a-z_.NAME]+)`", README.read_text(encoding="utf-8")))
    names = {name for name in fields(hfedmoe.get_config()) if not name.startswith("devices.")}
    assert names - documented == set()
    for device in hfedmoe.get_config().devices.values():
        assert {f"devices.NAME.{name}" for name in device} <= documented


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`hfedmoe_jax\.([a-z_.]+)`", README.read_text(encoding="utf-8"))))
)
def test_every_function_that_the_equations_name_exists(name):
    import importlib

    parts = name.split(".")
    module = importlib.import_module("hfedmoe_jax")
    for position, part in enumerate(parts):
        if not hasattr(module, part):
            importlib.import_module(".".join(["hfedmoe_jax", *parts[: position + 1]]))
        module = getattr(module, part)
