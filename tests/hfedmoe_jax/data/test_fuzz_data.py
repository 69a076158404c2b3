"""A hundred of the data files of tests/fuzz_data.py."""

import fuzz_data
import pytest


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_no_file_ends_in_a_traceback(tmp_path, start):
    read = 0
    for seed in range(start, start + 25):
        folder = tmp_path / str(seed)
        folder.mkdir()
        read += fuzz_data.check(seed, folder)
    assert 0 < read < 25
