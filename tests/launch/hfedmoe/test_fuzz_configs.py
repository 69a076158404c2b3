"""A hundred of the configs of tests/fuzz_configs.py."""

import subprocess
import sys

import tiny_run


def test_bad_values_end_in_one_line_or_in_a_dry_run():
    """In a process of its own, whose memory is limited."""
    script = tiny_run.ROOT / "tests" / "fuzz_configs.py"
    child = subprocess.run([sys.executable, str(script), "100"], capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stdout + child.stderr[-2000:]
    assert child.stdout == "0 of 100 cases failed\n"
