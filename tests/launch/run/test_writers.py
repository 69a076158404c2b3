import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from launch.run.writers import MetricWriter, read_metrics

COLUMNS = ["loss", "accuracy", "count"]


def write_rounds(directory, rounds, resume_after=None, scale=1.0):
    with MetricWriter(directory, COLUMNS, resume_after) as writer:
        for number in rounds:
            writer.write(number, {"loss": scale / number, "count": number})


def read_events(directory) -> list[Event]:
    events = []
    for path in sorted((directory / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:  # records: length, its checksum, data, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_numbers_come_back_bit_for_bit(tmp_path):
    row = {"loss": 1 / 3, "accuracy": np.float32(0.1), "count": np.int64(2**60)}
    with MetricWriter(tmp_path, COLUMNS, None) as writer:
        writer.write(1, row)
        writer.write(2, {"loss": jnp.float32(1e-30), "accuracy": None})
        writer.write(3, {"loss": math.inf})
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[0] == {"round": 1, "loss": 1 / 3, "accuracy": float(np.float32(0.1)), "count": 2**60}
    assert isinstance(rows[0]["count"], int) and isinstance(rows[0]["loss"], float)
    assert rows[1] == {"round": 2, "loss": float(np.float32(1e-30)), "accuracy": None, "count": None}
    assert rows[2]["loss"] == math.inf


def test_rows_are_visible_at_once(tmp_path):
    with MetricWriter(tmp_path, COLUMNS, None) as writer:
        writer.write(1, {"loss": 0.5})
        assert (tmp_path / "metrics.csv").read_text() == "round,loss,accuracy,count\n1,0.5,,\n"


def test_the_first_column_is_what_the_rows_count(tmp_path):
    for last, resume_after in ((3, None), (2, 1)):
        with MetricWriter(tmp_path, ["users"], resume_after, index="point") as writer:
            for number in range((resume_after or 0) + 1, last + 1):
                writer.write(number, {"users": 10 * number})
    assert read_metrics(tmp_path / "metrics.csv") == [{"point": n, "users": 10 * n} for n in (1, 2)]


def test_unknown_column_is_refused(tmp_path):
    with MetricWriter(tmp_path, COLUMNS, None) as writer, pytest.raises(ValueError, match="los"):
        writer.write(1, {"los": 1.0})


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    write_rounds(tmp_path / "whole", range(1, 7))
    write_rounds(tmp_path / "parts", range(1, 6), scale=1.0)
    write_rounds(tmp_path / "parts", range(4, 7), resume_after=3)
    whole, parts = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts"))
    assert parts == whole


def test_torn_last_line_is_dropped(tmp_path):
    write_rounds(tmp_path, range(1, 4))
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-3])  # "3,0.3333,,3" loses its end and would still parse
    assert [row["round"] for row in read_metrics(path)] == [1, 2]
    write_rounds(tmp_path, [4], resume_after=3)
    assert [row["round"] for row in read_metrics(path)] == [1, 2, 4]


def test_fresh_start_forgets_earlier_rows(tmp_path):
    write_rounds(tmp_path, range(1, 4))
    write_rounds(tmp_path, [1], scale=2.0)
    assert read_metrics(tmp_path / "metrics.csv") == [{"round": 1, "loss": 2.0, "accuracy": None, "count": 1}]


def test_resuming_without_a_file_starts_one(tmp_path):
    write_rounds(tmp_path, [5], resume_after=4)
    assert [row["round"] for row in read_metrics(tmp_path / "metrics.csv")] == [5]


def test_tensorboard_gets_every_finite_number_and_the_step_to_purge_from(tmp_path):
    with MetricWriter(tmp_path, COLUMNS, None) as writer:
        writer.write(1, {"loss": 0.5, "accuracy": None, "count": 3})
        writer.write(2, {"loss": math.nan})
    write_rounds(tmp_path, [2], resume_after=1)
    events = read_events(tmp_path)
    scalars = [
        (event.step, value.tag, value.simple_value) for event in events for value in event.summary.value
    ]
    assert scalars == [(1, "loss", 0.5), (1, "count", 3.0), (2, "loss", 0.5), (2, "count", 2.0)]
    assert [event.step for event in events if event.session_log.status] == [0, 2]


def test_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "none.csv") == []
