"""A run belongs to its config file and to the user's own modules that the file imports."""

import sys

from launch.run.command import load_config
from launch.run.source import own_sources, source_digest

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
