import json

import pytest
from ml_collections import ConfigDict

from configs.hfedmoe import get_config


@pytest.fixture
def make_config():
    """Returns a function from data fields to a small config that reads no data yet."""

    def make(clients=4, seed=0, partition=None, **data):
        config = get_config()
        config.seed = seed
        config.fl = ConfigDict({"clients": clients})
        config.data.update({"source": "file", "vocab_size": 300, "seq_len": 8, **data})
        config.partition.update(partition or {})
        return config

    return make


@pytest.fixture
def write_rows(tmp_path):
    """Returns a function that writes rows as jsonl and gives the path."""

    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write
