"""A run belongs to its config file and to the user's own modules that the file imports."""

import sys

import pytest

from hfedmoe_jax import score_rules
from hfedmoe_jax.errors import InputError
from launch.run.command import load_config
from launch.run.source import own_sources, source_digest, told_errors

CONFIG = """
import itertools, json, sys, time
import numpy as np
from my_rules.score import rule
from ml_collections import ConfigDict
from hfedmoe_jax.registry import unknown_name
def get_config():
    import my_late
    return ConfigDict({"rule": rule, "late": my_late.VALUE})
"""


def test_a_change_of_any_own_module_tells_and_of_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "my_rules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "score.py").write_text(
        "from .parts import part\nfrom . import more\nrule = part + more.VALUE\n"
    )
    (package / "parts.py").write_text("from my_rules import score  # in a circle\npart = 1\n")
    (package / "more.py").write_text("VALUE = 2\n")
    (package / "unused.py").write_text("VALUE = 3\n")
    (tmp_path / "my_late.py").write_text("VALUE = 4\n")
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    before = set(sys.modules)
    try:
        assert load_config(str(config)).to_dict() == {"rule": 3, "late": 4}
        files = [path.relative_to(tmp_path).as_posix() for path in own_sources(config)]
        assert files[0] == "config.py"
        assert sorted(files[1:]) == ["my_late.py"] + [
            f"my_rules/{name}.py" for name in ("__init__", "more", "parts", "score")
        ]
        digests = [source_digest(str(config))]
        for file in files:
            (tmp_path / file).write_text((tmp_path / file).read_text() + "# changed\n")
            digests.append(source_digest(str(config)))
        assert len(set(digests)) == len(files) + 1
        (package / "unused.py").write_text("")
        assert source_digest(str(config)) == digests[-1]
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


MISTAKES = """
from ml_collections import ConfigDict
from hfedmoe_jax import score_rules

@score_rules.register("of test_source")
def score(evidence, importance):
    return helper(evidence)

def helper(evidence):
    return evidence.no_such_thing

def get_config():
    return ConfigDict({"helper": helper})
"""


def test_an_error_of_the_users_function_is_one_line_with_its_place(tmp_path, monkeypatch):
    config = tmp_path / "config.py"
    config.write_text(MISTAKES)
    helper = load_config(str(config)).helper
    what = "AttributeError: 'object' object has no attribute 'no_such_thing'; correct it"
    for call, field in (
        (lambda: score_rules["of test_source"](object(), None), "fl.score='of test_source'"),
        (lambda: helper(object()), f"config='{config}:small'"),
    ):
        with pytest.raises(InputError) as error, told_errors(f"{config}:small"):
            call()
        assert str(error.value).startswith(f"{field}: {config}:10: {what}")
        monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
        with pytest.raises(AttributeError), told_errors(str(config)):
            call()
        monkeypatch.delenv("JAX_TRACEBACK_FILTERING")


def test_errors_that_are_not_of_the_users_functions_stay_what_they_are(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(MISTAKES)
    for error in (
        TypeError("a fault of the program"),
        InputError("seed", -1, "too small", "use 0"),
        OSError(5),
    ):
        with pytest.raises(type(error)) as raised, told_errors(str(config)):
            raise error
        assert raised.value is error
