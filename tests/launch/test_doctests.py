import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["checkpoints", "figures", "main", "progress", "workdir"])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"launch.{name}"))
    assert result.attempted > 0 and result.failed == 0
