"""--dry_run: what a run would cost, before it runs; and the targets that programs are compiled for."""

import math
import re

import jax
import numpy as np
import pytest
import tiny_run
import tiny_switch_t5

from hfedmoe_jax import Experiment, make_mesh, published
from launch import targets
from launch.compiling import compile_programs, program_table
from launch.hfedmoe import dry_run
from launch.run.command import read_command


@pytest.fixture(scope="module")
def train_path(tmp_path_factory):
    return tiny_run.write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", tiny_run.texts(60))


def rows_of(screen: str, title: str) -> dict[str, list[str]]:
    """Returns the cells of a table on the screen by the first of each row; cells are two spaces apart."""
    lines = screen.split(f"\n{title}", 1)[1].splitlines()[1:]
    rows = [re.split(r" {2,}", line.strip()) for line in lines[: lines.index("") if "" in lines else None]]
    return {row[0]: row[1:] for row in rows}


def test_a_dry_run_tells_what_the_run_has_and_writes_nothing(tmp_path, train_path):
    command = tiny_run.arguments(tmp_path / "run", train_path, budget__fraction=0)
    screen = tiny_run.run_main([*command, "--dry_run"])
    assert (screen.code, screen.err) == (0, "") and not (tmp_path / "run").exists()
    experiment = Experiment(read_command(command).config, make_mesh(jax.devices()[:1]))
    params = experiment.init().server.params
    parts = rows_of(screen.out, "Model")
    for name, tree in (("experts", params.experts), ("routers", params.router), ("shared", params.shared)):
        assert parts[name][0] == f"{sum(x.size for x in jax.tree.leaves(tree)):,}"
        assert float(parts[name][1]) == pytest.approx(
            sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6, rel=1e-3
        )
    classes = rows_of(screen.out, "Device classes")
    for profile, budget in zip(experiment.profiles, experiment.budgets, strict=True):
        assert classes[profile.name][1] == f"{budget} of {experiment.cost.all_experts}"
        needed, has = (float(cell) for cell in classes[profile.name][2:4])
        assert needed <= has == pytest.approx(profile.memory_bytes / 1e6)


def test_of_a_published_size_only_shapes_are_needed(tmp_path, train_path, monkeypatch):
    monkeypatch.setitem(published.PUBLISHED, "switch_base_8", tiny_switch_t5.EXPECTED["roomy/config"])
    command = tiny_run.arguments(
        tmp_path / "run", train_path, data__tokenizer="checkpoint", data__vocab_size=300
    )
    source = {"model.family": "switch_t5", "model.source": "switch_base_8", "task.name": "text_to_text"}
    command += [f"--config.{field}={value}" for field, value in source.items()]
    screen = tiny_run.run_main([*command, "--dry_run"])
    assert (screen.code, screen.err) == (0, "")
    parts = rows_of(screen.out, "Model")
    shapes = tiny_switch_t5.EXPECTED["roomy/shapes"]
    counts = {part: int(parts[part][0].replace(",", "")) for part in ("experts", "routers", "shared")}
    expected = {
        part: sum(math.prod(shape) for name, shape in shapes.items() if key in name)
        for part, key in {"experts": ".experts.", "routers": ".router.", "shared": ""}.items()
    }
    assert counts == expected | {"shared": expected["shared"] - expected["experts"] - expected["routers"]}
    assert "published size" in tiny_run.refusal(command, tmp_path)


def test_bytes_and_time_are_those_that_a_run_accounts_for(tmp_path, train_path):
    """All experts are sent, and none of the tokens dropped, so nothing depends on the routing."""
    command = tiny_run.arguments(
        tmp_path, train_path, fl__algorithm="fedavg", model__capacity_factor=3.0, fl__rounds=1
    )
    experiment = Experiment(read_command(command).config, make_mesh(jax.devices()[:1]))
    _, row, _ = experiment.step(experiment.init())
    header, table = dry_run.classes(experiment)[1:]
    down, up, time = (header.index(name) for name in ("MB down", "MB up", "simulated round"))
    members = experiment.cohort(1)
    by_class = {cells[0]: cells for cells in table}
    mine = [by_class[experiment.profiles[member].name] for member in members]
    assert sum(float(cells[down]) for cells in mine) == pytest.approx(row["bytes_down"] / 1e6, rel=1e-3)
    assert sum(float(cells[up]) for cells in mine) == pytest.approx(row["bytes_up"] / 1e6, rel=1e-3)
    slowest = max(float(cells[time].removesuffix(" s")) for cells in mine)
    assert slowest == pytest.approx(row["round_time_s"], abs=0.06)  # padding is never routed


@pytest.mark.parametrize("algorithm", ["hfedmoe", "local"])
def test_programs_and_their_roofline_on_a_chip(tmp_path, train_path, algorithm):
    """Compiled for the devices that are here, with another chip's figures."""
    command = tiny_run.arguments(tmp_path, train_path, fl__algorithm=algorithm)
    experiment = Experiment(read_command(command).config, make_mesh(jax.devices()[:1]))
    chip = targets.CHIPS["v5e"]._replace(memory_bytes=1e5)
    _, header, rows = program_table(compile_programs(experiment.lower()), chip)
    for cells in rows:
        arguments, temporaries, outputs, everything = (float(cell.replace(",", "")) for cell in cells[1:5])
        assert everything == pytest.approx(arguments + temporaries + outputs, rel=2e-3)
        left = float(cells[5].split()[0]) * (1 if cells[5].endswith("free") else -1)
        assert left == pytest.approx(0.1 - everything, rel=2e-3, abs=1e-3)
    assert any(cells[5].endswith("too much") for cells in rows)
    _, _, ((_, flop, peak, by_flop), (_, moved, rate, by_bytes)) = dry_run.roofline(experiment, chip)
    assert (peak, rate) == ("197 TFLOP/s", "819 GB/s")
    assert float(by_flop.split()[0]) == pytest.approx(float(flop.split()[0]) * 1e9 / 197e12 * 1e3, rel=1e-2)
    assert float(by_bytes.split()[0]) == pytest.approx(float(moved.split()[0]) * 1e6 / 819e9 * 1e3, rel=1e-2)


def test_a_wrong_target_is_refused_in_one_line(tmp_path, train_path, monkeypatch):
    command = tiny_run.arguments(tmp_path / "run", train_path)
    cases = {
        "--target=v5e:2x4": r"--target='v5e:2x4': is only compiled for; add --dry_run",
        "--dry_run --target=v7:2x4": r"--target='v7:2x4': unknown chip; use one of v4, v5e, v5p, .*",
        "--dry_run --target=v5e": r"--target='v5e': has no shape; write e.g. .*",
        "--dry_run --target=h100:0x8": r"--target='h100:0x8': has no shape; .*",
    }
    for flags, line in cases.items():
        screen = tiny_run.run_main([*command, *flags.split()])
        assert screen.code == 2 and re.fullmatch(f"error: {line}\n", screen.err), screen.err

    def missing(**_):
        raise RuntimeError("no libtpu\nmore")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", missing)
    screen = tiny_run.run_main([*command, "--dry_run", "--target=v5e:2x4"])
    assert screen.err == (
        "error: --target='v5e:2x4': no libtpu; pip install -e '.[tpu]', and give a shape that there is\n"
    )


def test_figures_of_chips_are_positive():
    for chip in targets.CHIPS.values():
        assert min(chip.memory_bytes, chip.bytes_per_s, *chip.flop_per_s.values()) > 0
        assert np.log10(chip.flop_per_s["bfloat16"]) == pytest.approx(14.5, abs=0.5)
