import math
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from launch.run.writers import MetricWriter, read_metrics

COLUMNS = ["loss", "accuracy", "count"]


def write_rounds(directory, rounds, kept="", scale=1.0) -> str:
    """Returns the text of the file, as a checkpoint keeps it."""
    with MetricWriter(directory, COLUMNS, kept) as writer:
        for number in rounds:
            writer.write(number, {"loss": scale / number, "count": number})
        return writer.text


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
    with MetricWriter(tmp_path, COLUMNS) as writer:
        writer.write(1, row)
        writer.write(2, {"loss": jnp.float32(1e-30), "accuracy": None})
        writer.write(3, {"loss": math.inf})
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[0] == {"round": 1, "loss": 1 / 3, "accuracy": float(np.float32(0.1)), "count": 2**60}
    assert isinstance(rows[0]["count"], int) and isinstance(rows[0]["loss"], float)
    assert rows[1] == {"round": 2, "loss": float(np.float32(1e-30)), "accuracy": None, "count": None}
    assert rows[2]["loss"] == math.inf


def test_rows_are_visible_at_once(tmp_path):
    with MetricWriter(tmp_path, COLUMNS) as writer:
        writer.write(1, {"loss": 0.5})
        assert (tmp_path / "metrics.csv").read_text() == "round,loss,accuracy,count\n1,0.5,,\n"


def test_the_first_column_is_what_the_rows_count(tmp_path):
    with MetricWriter(tmp_path, ["users"], index="point") as writer:
        writer.write(1, {"users": 10})
        kept = writer.text
        writer.write(2, {"users": 7})
    with MetricWriter(tmp_path, ["users"], kept, index="point") as writer:
        writer.write(2, {"users": 20})
    assert read_metrics(tmp_path / "metrics.csv") == [{"point": n, "users": 10 * n} for n in (1, 2)]


def test_unknown_column_is_refused(tmp_path):
    with MetricWriter(tmp_path, COLUMNS) as writer, pytest.raises(ValueError, match="los"):
        writer.write(1, {"los": 1.0})


def test_resumed_file_equals_an_uninterrupted_one(tmp_path, capsys):
    """Also where the killed process got further than its checkpoint, in the midst of a line."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = write_rounds(tmp_path / "whole", range(1, 7))
    path = tmp_path / "parts" / "metrics.csv"
    kept = write_rounds(tmp_path / "parts", range(1, 4))
    write_rounds(tmp_path / "parts", range(4, 6), kept)
    path.write_text(path.read_text()[:-3])
    assert [row["round"] for row in read_metrics(path)] == [1, 2, 3, 4]  # a torn line is not read
    assert write_rounds(tmp_path / "parts", range(4, 7), kept) == path.read_text() == whole
    assert (tmp_path / "whole" / "metrics.csv").read_text() == whole
    assert capsys.readouterr().err == ""


def lines_of(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda c: None, "was missing"),
        (lambda c: b"", "was missing"),
        (lambda c: b"".join(lines_of(c)[:3]), "lacks rows from line 4 on"),
        (lambda c: b"".join(lines_of(c)[:3])[:-4], "lacks rows from line 3 on"),
        (lambda c: b"".join(lines_of(c)[:3] + lines_of(c)[4:]), "was changed in line 4"),
        (lambda c: b"".join(lines_of(c)[:3] + lines_of(c)[2:]), "was changed in line 4"),
        (lambda c: c.replace(b"0.5", b"0.6"), "was changed in line 3"),
        (lambda c: c.replace(b"0.5", b"0.\xff"), "was changed in line 3"),
        (lambda c: c.decode().encode("utf-16"), "was changed in line 1"),
        (lambda c: c.replace(b",", b";"), "was changed in line 1"),
        (lambda c: b"\xef\xbb\xbf" + c.replace(b"\n", b"\r\n"), ""),
    ],
)
def test_lost_rows_come_back_and_edited_ones_are_told_and_put_aside(tmp_path, capsys, damage, told):
    kept = write_rounds(tmp_path, range(1, 6))
    path, aside = tmp_path / "metrics.csv", tmp_path / "metrics_changed.csv"
    damaged = damage(path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    text = write_rounds(tmp_path, [6], kept)
    assert path.read_text() == text == kept + "6,0.16666666666666666,,6\n"
    err = capsys.readouterr().err
    assert err.count("\n") == bool(told) and told in err
    assert aside.exists() == ("was changed" in told)
    assert not aside.exists() or aside.read_bytes() == damaged


def test_a_file_removed_or_cut_during_the_run_is_written_again(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    with MetricWriter(tmp_path, COLUMNS) as writer:
        for number in range(1, 5):
            writer.write(number, {"loss": 1.0, "count": number})
            assert path.read_text() == writer.text
            if number == 2:
                path.unlink()
            if number == 3:
                path.write_text("round,loss,accuracy,count\n")
        path.unlink()
    assert path.read_text() == writer.text
    assert [row["round"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_last_evaluation_is_forgotten(tmp_path):
    columns = ["train_loss", "validation_loss", "client_accuracy_mean", "clients_ok"]
    with MetricWriter(tmp_path, columns) as writer:
        writer.write(1, {name: 0.5 for name in columns})
        writer.write(2, {name: 1 / 3 for name in columns})
        writer.forget_evaluation()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"round": 1} | {name: 0.5 for name in columns},
        {"round": 2, "train_loss": 1 / 3, "validation_loss": None, "client_accuracy_mean": None,
         "clients_ok": 1 / 3},
    ]  # fmt: skip


def test_fresh_start_forgets_earlier_rows(tmp_path):
    write_rounds(tmp_path, range(1, 4))
    write_rounds(tmp_path, [1], scale=2.0)
    assert read_metrics(tmp_path / "metrics.csv") == [{"round": 1, "loss": 2.0, "accuracy": None, "count": 1}]


def test_tensorboard_gets_every_finite_number_and_the_step_to_purge_from(tmp_path):
    with MetricWriter(tmp_path, COLUMNS) as writer:
        writer.write(1, {"loss": 0.5, "accuracy": None, "count": 3})
        kept = writer.text
        writer.write(2, {"loss": math.nan})
    write_rounds(tmp_path, [2], kept)
    events = read_events(tmp_path)
    scalars = [
        (event.step, value.tag, value.simple_value) for event in events for value in event.summary.value
    ]
    assert scalars == [(1, "loss", 0.5), (1, "count", 3.0), (2, "loss", 0.5), (2, "count", 2.0)]
    assert [event.step for event in events if event.session_log.status] == [0, 2]


def test_an_edit_of_the_same_length_is_found_at_the_end(tmp_path, capsys):
    with MetricWriter(tmp_path, COLUMNS) as writer:
        writer.write(1, {"loss": 1.0})
        edited = writer.text.replace(",", ";")
        (tmp_path / "metrics.csv").write_text(edited)
    assert (tmp_path / "metrics.csv").read_text() == writer.text
    assert (tmp_path / "metrics_changed.csv").read_text() == edited
    assert capsys.readouterr().err.count("\n") == 1


def test_a_removed_directory_is_an_error_and_not_a_warning(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="run"), MetricWriter(tmp_path / "run", COLUMNS) as writer:
        shutil.rmtree(tmp_path / "run")
        writer.write(1, {"loss": 1.0})
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_missing_file_is_an_error_of_the_storage(tmp_path):
    """Not a run without rounds, of which there is nothing to draw."""
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_metrics(tmp_path / "none.csv")
