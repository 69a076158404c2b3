"""The suite `population`: its tables, and what must hold of the programs that it measures."""

import json

import jax
import numpy as np
import pytest

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.population import make_mesh
from launch import bench, bench_population, bench_population_beside, bench_population_scaling
from launch.bench_population import Scale
from launch.bench_population_rounds import Rounds, Size, texts
from launch.bench_population_torch import Loop, Settings

# Sizes that occur once, so that products are told apart; experts are most of the work.
TINY = Size(
    "tiny", width=12, hidden=40, num_experts=8, top_k=1, num_layers=1, num_heads=2, vocab_size=50, seq_len=7,
    batch_size=5,
)  # fmt: skip
ACTIVE = dict(fl=dict(algorithm="hfedmoe", forward="active"), importance=dict(refresh="previous"))
ROUTED = dict(fl=dict(algorithm="hfedmoe", forward="routed"), importance=dict(refresh="previous"))


@pytest.fixture
def tiny(monkeypatch):
    scale = Scale(
        small=TINY, heavy=TINY._replace(name="heavier", top_k=2), clients=3, chunks=(1, 2), cohorts=(2, 3),
        memory_cohorts=(1, 2), devices=(1, 64), product=8,
    )  # fmt: skip
    monkeypatch.setitem(bench_population.SCALES, "cpu", scale)
    monkeypatch.setattr(bench_population, "SHARES", (1.0, 0.25))
    monkeypatch.setattr(bench_population, "MOMENTS", (("routed", "step"), ("active", "round")))
    # Processes of their own take seconds to start; one test starts one.
    monkeypatch.setattr(bench_population_scaling, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench_population_scaling, "keep_compiled", lambda directory: None)
    monkeypatch.setattr(bench_population_scaling, "SHARES", (1.0, 0.25))
    monkeypatch.setenv("XLA_FLAGS", "")


def test_the_suite_writes_its_tables(tiny, tmp_path, capsys):
    assert bench.main(["--suite=population", "--repeats=3", f"--workdir={tmp_path}"]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    titles = [table["title"].split(",")[0] for table in record["tables"]]
    assert titles == [
        "Chunk and cohort",
        "Cost by budget",
        "Part of the peak",
        "Refresh of the scores",
        "Memory against the clients of a round",
        "Devices",
        "Compilation of the tiny model's tiers",
    ]
    chunks, budgets, peaks, moments, memory, devices, tiers = (table["rows"] for table in record["tables"])
    assert len(chunks) == 4 and all(row["client-steps/s"]["median_hz"] > 0 for row in chunks)
    assert [row["model"] for row in budgets] == 5 * ["tiny"] + 5 * ["heavier"]
    cases = [("all", 1), ("routed", 1), ("routed", 0.25), ("active", 1), ("active", 0.25)]
    assert [(row["forward"], row["budget"]) for row in budgets] == 2 * cases
    assert all(row["trained"] <= 8 * row["budget"] for row in budgets)
    assert [row["model"] for row in peaks] == ["tiny", "heavier"]
    for row in peaks:
        assert row["part"] == pytest.approx(row["reached"] / row["peak"]) and row["peak"] > 0
    assert [(row["forward"], row["refresh"]) for row in moments] == [("routed", "step"), ("active", "round")]
    assert [row["clients"] for row in memory] == [1, 2]
    assert [row["devices"] for row in devices] == [1]  # of the two that were asked for
    assert [row["budget"] for row in tiers] == ["1", "0.25"]
    assert "client-steps/s" in capsys.readouterr().out


@pytest.fixture(scope="module")
def measured():
    """FLOP of a client-step, of its experts, and temporary bytes: by forward and share of the experts."""
    found = {}
    for forward, fields in {"all": {}, "routed": ROUTED, "active": ACTIVE}.items():
        for share in (1.0,) if forward == "all" else (1.0, 0.25):
            rounds = Rounds(TINY, 1, make_mesh(), budgets=(share,), **fields)
            found[forward, share] = bench_population.cost(rounds, 1)
    return found


def test_the_products_of_all_experts_are_those_of_two_matrices_forward_and_twice_backward(measured):
    by_hand = 2 * 3 * 2 * TINY.all_experts * TINY.capacity * TINY.width * TINY.hidden
    assert measured["all", 1.0].expert_flop == by_hand
    assert measured["active", 1.0].expert_flop == pytest.approx(by_hand, rel=0.2)  # routers ahead of a round


def test_expert_flop_follow_the_budget(measured):
    full = measured["all", 1.0].expert_flop
    assert measured["active", 0.25].expert_flop <= 0.3 * full
    # Forward a third of the work, of which nothing is saved.
    assert measured["routed", 0.25].expert_flop <= (1 / 3 + 0.3 * 2 / 3) * full
    assert measured["routed", 0.25].flop < measured["all", 1.0].flop


def test_memory_follows_the_budget(measured):
    temporary = {key: each.temporary_bytes for key, each in measured.items()}
    assert temporary["active", 0.25] < temporary["active", 1.0]
    print(temporary)


def test_a_process_of_its_own_has_a_memory_of_its_own(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    here = bench_population_scaling.peak_bytes()
    ballast = np.ones(150_000_000, np.uint8)
    assert bench_population_scaling.peak_bytes() >= here
    held_mb = bench_population_scaling.alone(bench_population_scaling.run_cohort, TINY, 2, 2)[2]
    assert 50 < held_mb < 1e-6 * (bench_population_scaling.peak_bytes() + len(ballast))


def test_a_clients_texts_are_the_same_in_any_company():
    tokens, labels = texts(TINY, np.array([4, 7]))
    alone = texts(TINY, np.array([7]))
    np.testing.assert_array_equal(tokens[1:], alone[0])
    np.testing.assert_array_equal(labels[1:], alone[1])
    assert (tokens[0] != tokens[1]).any() and tokens.min() >= 1 and tokens.max() < TINY.vocab_size


class Other:
    """Our own engine as a peer, of which the losses may be wrong."""

    def __init__(self, task, wrong=0.0):
        self.rounds, self.wrong = Rounds(TINY, 3, make_mesh()), wrong
        np.testing.assert_array_equal(task.tokens, texts(TINY, np.arange(3))[0])
        self.call = self.rounds.of(3)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def round(self):
        self.call()
        return self.rounds.losses[-1] + self.wrong


def test_peers_take_turns_and_their_losses_are_compared(monkeypatch):
    peers = {"PyTorch": Other, "PyTorch, compiled": Other, "Flower, compiled": Other}
    monkeypatch.setattr(bench_population_beside, "ARRANGEMENTS", peers)
    table = bench_population_beside.peers_table(TINY, 3, make_mesh(), 3)
    names = [row[0] for row in table.rows]
    assert names == ["ours", "ours, 25% of the experts, active", *peers]
    assert [row[3] for row in table.rows] == [None, None, 0, 0, 0]
    assert 1.0 in [row[2] for row in table.rows[2:4]]  # the fastest PyTorch over itself


def test_a_peer_with_other_losses_stops_the_suite(monkeypatch):
    peers = {"PyTorch": lambda task: Other(task, wrong=2e-3)}
    monkeypatch.setattr(bench_population_beside, "ARRANGEMENTS", peers)
    with pytest.raises(AssertionError, match=r"differ by 2\.0e-03 nats"):
        bench_population_beside.peers_table(TINY, 3, make_mesh(), 3)


def test_an_accelerator_needs_a_pytorch_that_uses_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(bench_population_beside.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs PyTorch on the tpu"):
        bench_population_beside.arrangements()


def test_pytorch_in_one_loop_has_our_losses():
    pytest.importorskip("torch")
    ours = Rounds(TINY, 3, make_mesh())
    call = ours.of(3)
    with Loop(bench_population_beside.make_task(ours), Settings(False, "mkl"), "cpu") as peer:
        theirs = [peer.round() for _ in range(3)]
    for _ in range(3):
        call()
    assert bench_population_beside.difference(theirs, ours.losses) < 1e-4
    with pytest.raises(AssertionError, match="nan"):
        bench_population_beside.difference([theirs[0] * np.nan], ours.losses)
