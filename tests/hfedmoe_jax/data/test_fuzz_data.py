"""A hundred of the data files of tests/fuzz_data.py."""

import fuzz_data


def test_no_file_ends_in_a_traceback(tmp_path):
    read = 0
    for seed in range(100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        read += fuzz_data.check(seed, folder)
    assert 10 < read < 90
