"""Tiny runs of the SLIDE experiment for the end-to-end tests."""

import json
import pathlib
from typing import Any

from tiny_run import ROOT

TINY = {
    "setting__users": 8,
    "monte_carlo__drops": 5,
    "monte_carlo__users": 6,
    "monte_carlo__bandwidth_factors": (0.5, 1.0),
    "monte_carlo__patience": (1.0,),
    "monte_carlo__user_counts": (3, 6),
    "monte_carlo__rhos": (0.25, 0.5, 2.0),
}
MEASURED = ("solve_s", "wall_s")
"""Measured by a clock, so different in two equal runs."""


def arguments(workdir: pathlib.Path, **fields: Any) -> list[str]:
    """Returns the command line of a tiny run, with `section__field=value` replaced or added."""
    fields = {**TINY, **fields}
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return [f"--config={ROOT}/configs/slide.py:smoke", f"--workdir={workdir}", *overrides]


def read(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns a JSON file of a run without the fields that a clock measured."""
    content = json.loads((workdir / f"{name}.json").read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in MEASURED}
