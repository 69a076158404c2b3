"""The suite `population`: its tables, and what must hold of the programs that it measures."""

import json

import jax
import numpy as np
import pytest

from hfedmoe_jax import make_mesh
from hfedmoe_jax.errors import InputError
from launch import bench
from launch.suites.population import comparison, scaling, suite
from launch.suites.population.rounds import Rounds, Size, texts
from launch.suites.population.suite import Scale
from launch.suites.population.torch_step import Loop, Settings

pytestmark = pytest.mark.slow

# Sizes that occur once, so that products are told apart; experts are most of the work.
TINY = Size(
    "tiny", width=16, hidden=512, num_experts=8, top_k=1, num_layers=1, num_heads=2, vocab_size=50, seq_len=7,
    batch_size=5, steps=2,
)  # fmt: skip
SHARE = 0.25
CLIENTS, HEAVY_CLIENTS = 3, 2  # the latter on each device
CASES = (("all", "-", 1.0), ("routed", "previous", SHARE), ("active", "round", SHARE))


def shared_rounds():
    """`Rounds` of which equal ones are one: here compiling is what costs time."""
    known = {}

    def make(size, num_clients, mesh, chunk=None, budgets=(1.0,), **fields):
        key = repr((size._replace(name=""), budgets, fields))
        if key not in known:
            # As many as any table asks for.
            known[key] = Rounds(size, max(CLIENTS, HEAVY_CLIENTS * mesh.size), mesh, None, budgets, **fields)
        return known[key]

    return make


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a run of the suite with tiny models writes."""
    workdir = tmp_path_factory.mktemp("suite")
    scale = Scale(
        small=TINY, heavy=TINY._replace(name="other"), clients=CLIENTS, heavy_clients=HEAVY_CLIENTS,
        chunks=(1,), cohorts=(2, 3), memory_cohorts=(1, 2), devices=(1, 64), product=8,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.SCALES, "cpu", scale)
        patch.setattr(suite, "BUDGETS", CASES[1:])
        patch.setattr(suite, "MOMENTS", (("routed", "previous"), ("active", "round")))
        patch.setattr(scaling, "SHARES", (SHARE,))
        # Processes of their own take seconds to start; one test below starts one.
        patch.setattr(scaling, "call_in_process", lambda function, *arguments: function(*arguments))
        patch.setattr(scaling, "use_compilation_cache", lambda directory: None)
        rounds = shared_rounds()
        patch.setattr(suite, "Rounds", rounds)
        patch.setattr(scaling, "Rounds", rounds)
        patch.setenv("XLA_FLAGS", "")
        assert bench.main(["--suite=population", "--repeats=3", f"--workdir={workdir}"]) == 0
    return json.loads((workdir / "bench.json").read_text())


def test_the_suite_writes_its_tables(record):
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
    assert [row["clients a round"] for row in chunks] == [2, 3]
    assert all(row["client-steps/s"]["median_hz"] > 0 for row in chunks)
    assert [(row["forward"], row["refresh"], row["budget"]) for row in budgets] == 2 * list(CASES)
    assert [row["model"] for row in budgets] == 3 * ["tiny"] + 3 * ["other"]
    assert all(0 < row["trained"] <= TINY.all_experts * row["budget"] for row in budgets)
    assert [row["model"] for row in peaks] == ["tiny", "other"]
    for row in peaks:
        assert row["part"] == pytest.approx(row["reached"] / row["peak"]) and row["peak"] > 0
    assert [(row["forward"], row["refresh"]) for row in moments] == [
        ("routed", "previous"),
        ("active", "round"),
    ]
    assert [row["clients"] for row in memory] == [1, 2]
    assert memory[0]["program, all"] == memory[1]["program, all"]
    assert [row["devices"] for row in devices] == [1]  # of the two that were asked for
    assert [row["budget"] for row in tiers] == [f"{SHARE:g}"]


def by_forward(record, column):
    return {row["forward"]: row[column] for row in record["tables"][1]["rows"]}


def test_the_products_are_those_that_a_reader_counts(record):
    """Forward once, backward twice; of the rest attention, router and head, as of any transformer."""
    tokens, width, experts = TINY.batch_size * TINY.seq_len, TINY.width, TINY.num_experts
    expert = 2 * 2 * TINY.all_experts * TINY.capacity * width * TINY.hidden
    layer = 2 * tokens * width * (4 * width + experts) + 2 * 2 * tokens * TINY.seq_len * width
    head = 2 * TINY.batch_size * width * 5
    everything = 3 * (expert + TINY.num_layers * layer + head)
    assert 1e9 * by_forward(record, "GFLOP of products")["all"] == pytest.approx(everything, rel=0.05)


def test_expert_flop_follow_the_budget(record):
    ratio = by_forward(record, "expert FLOP over all")
    assert ratio["all"] == 1
    assert ratio["active"] == pytest.approx(SHARE)
    # The forward pass, a third of the work, runs every expert.
    assert ratio["routed"] == pytest.approx((1 + 2 * SHARE) / 3)
    flop = by_forward(record, "GFLOP of products")
    assert flop["active"] < flop["routed"] < flop["all"]


def test_memory_follows_the_budget(record):
    temporary = by_forward(record, "temporary MB")
    assert temporary["active"] < 0.7 * temporary["all"]


def test_a_process_of_its_own_has_a_memory_of_its_own(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    here = scaling.peak_bytes()
    ballast = np.ones(150_000_000, np.uint8)
    assert scaling.peak_bytes() >= here
    held_mb = scaling.call_in_process(scaling.run_cohort, TINY, 2, 2)[2]
    assert 50 < held_mb < 1e-6 * (scaling.peak_bytes() + len(ballast))


def test_a_clients_texts_are_the_same_in_any_company():
    tokens, labels = texts(TINY, np.array([4, 7]))
    alone = texts(TINY, np.array([7]))
    np.testing.assert_array_equal(tokens[1:], alone[0])
    np.testing.assert_array_equal(labels[1:], alone[1])
    assert (tokens[0] != tokens[1]).any() and tokens.min() >= 1 and tokens.max() < TINY.vocab_size


class Replay:
    """A peer with the losses that it is given."""

    def __init__(self, losses):
        self.losses = iter(losses)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def round(self):
        return next(self.losses)


def test_peers_take_turns_and_their_losses_are_compared(monkeypatch):
    rounds, mesh = shared_rounds(), make_mesh()
    ours = rounds(TINY, CLIENTS, mesh)
    call = ours.call(CLIENTS)
    for _ in range(4):
        call()
    tasks = []

    def start(wrong):
        return lambda task: tasks.append(task) or Replay([losses + wrong for losses in ours.losses])

    peers = {"PyTorch": start(0.0), "PyTorch, compiled": start(1e-4), "Flower, compiled": start(5e-4)}
    monkeypatch.setattr(comparison, "ARRANGEMENTS", peers)
    monkeypatch.setattr(comparison, "absent", list)
    monkeypatch.setattr(comparison, "Rounds", rounds)
    table = comparison.peers_table(TINY, CLIENTS, mesh, 3)
    assert [row[0] for row in table.rows] == ["ours", "ours, 25% of the experts, active", *peers]
    apart = [row[4] for row in table.rows]
    assert table.rows[0][3] == 1  # ours over itself
    assert apart[:2] == [None, None] and apart[2:] == pytest.approx([0, 1e-4, 5e-4], abs=1e-5)
    assert 1.0 in [row[2] for row in table.rows[2:4]]  # the fastest PyTorch over itself
    assert "at most 5.0e-04 nats" in table.note
    assert len(tasks) == 4  # the fastest PyTorch once more, beside Flower
    np.testing.assert_array_equal(tasks[0].tokens[:CLIENTS], texts(TINY, np.arange(CLIENTS))[0])


@pytest.mark.parametrize("wrong", [2e-3, np.nan])
def test_a_peer_with_other_losses_stops_the_suite(wrong):
    ours = [np.array([1.0, 2.0]), np.array([0.5, 1.0])]
    with pytest.raises(AssertionError, match=f"differ by {wrong:.1e} nats within 2 rounds"):
        comparison.difference([ours[0], ours[1] + wrong], ours)


def test_an_accelerator_needs_a_pytorch_that_uses_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs PyTorch on the tpu"):
        comparison.arrangements()


def test_pytorch_in_one_loop_has_our_losses():
    pytest.importorskip("torch")
    ours = Rounds(TINY, CLIENTS, make_mesh())
    call = ours.call(CLIENTS)
    with Loop(comparison.make_task(ours), Settings(False, "mkl"), "cpu") as peer:
        theirs = [peer.round() for _ in range(3)]
    for _ in range(3):
        call()
    assert comparison.difference(theirs, ours.losses) < 1e-4
