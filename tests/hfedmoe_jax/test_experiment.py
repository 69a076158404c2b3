"""A whole run without files: rows, totals, cohorts, failures, devices and compilations."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from masked_oracle import bits
from own_process import run_python
from tiny import CLASSES, TOKENS, VOCABULARY, tiny_batches, tiny_config

from hfedmoe_jax import Experiment, FederatedData, InputError, make_mesh, score_rules
from hfedmoe_jax.algorithms import algorithms, compose
from hfedmoe_jax.client import LocalRule
from hfedmoe_jax.data import Facts, take
from hfedmoe_jax.devices import memory_needed
from hfedmoe_jax.evaluation import Snapshot, predict
from hfedmoe_jax.experiment import COHORT_STREAM
from hfedmoe_jax.mesh import ALONE
from hfedmoe_jax.reports import STATUS_NAMES
from hfedmoe_jax.scoring import build_scoring

CLIENTS, COHORT, ROUNDS = 6, 3, 5
RARE, LONER = VOCABULARY - 1, 3  # a token that only one client has
FIELDS = {
    "client__learning_rate_decay": 0.75,
    "fl__clients": CLIENTS,
    "fl__clients_per_round": COHORT,
    "fl__rounds": ROUNDS,
    "fl__dropout_probability": 0.3,
    "eval__every": 2,
    "eval__batch_size": 4,
    "eval__max_examples": 0,
    "model__capacity_factor": 4.0,
    "model__eval_capacity_factor": 4.0,
    "client__learning_rate": 0.1,
    "client__optimizer": "sgd",
    "model__num_experts": 4,
}
LAYERS, EXPERTS = 2, 4
ALL = LAYERS * EXPERTS


def tiny_data() -> FederatedData:
    """Returns six clients' random passages; client c has 6 + c of them and holds two more out."""
    sizes = [6 + client for client in range(CLIENTS)]
    train = tiny_batches(1, sum(sizes) + 2 * CLIENTS)
    owner = np.concatenate([np.repeat(np.arange(CLIENTS), sizes), np.repeat(np.arange(CLIENTS), 2)])
    held = np.arange(len(owner)) >= sum(sizes)

    def without_rare(rows):
        return rows | {"tokens": np.where(rows["tokens"] == RARE, RARE - 1, rows["tokens"])}

    train = without_rare(train)
    train["tokens"][owner == LONER, 0] = RARE

    return FederatedData(
        train=train,
        validation=without_rare(tiny_batches(2, 10)),
        test=without_rare(tiny_batches(3, 11)),
        validation_document=np.arange(10) // 2,
        test_document=np.arange(11) // 3,
        client_train=tuple(np.flatnonzero((owner == c) & ~held) for c in range(CLIENTS)),
        client_holdout=tuple(np.flatnonzero((owner == c) & held) for c in range(CLIENTS)),
        label_names=tuple("abc")[:CLASSES],
        client_names=tuple(f"client {c}" for c in range(CLIENTS)),
        vocab_size=3 * VOCABULARY,  # more than a round's words: clients hold rows of the table
        tokenizer_json="{}",
        facts=Facts({}),
    )


def build(**fields) -> Experiment:
    return Experiment(tiny_config(**(FIELDS | fields)), make_mesh(jax.devices()[:1]), tiny_data())


@pytest.fixture(scope="module")
def experiment():
    return build()


@pytest.fixture(scope="module")
def run(experiment):
    """The loop of the module's docstring: every round's row and parameters, and the last state."""
    state = experiment.init()
    rows, params = [], []
    for number in range(ROUNDS):
        before = compilations()
        state, row, failures = experiment.step(state)
        assert failures == []
        if number > 1:  # the second round is the first with an evaluation
            assert compilations() == before
        rows.append(row)
        params.append(jax.tree.map(np.array, state.server.params))
    return rows, params, state


def data_of(experiment, number):
    """Returns what the cohort of a round brings."""
    return experiment.client_data(number, experiment.cohort(number))


def equal(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_every_round_has_a_row_and_some_an_evaluation(experiment, run):
    rows, params, state = run
    columns = set(experiment.columns)
    evaluated = {name for name in columns if name.startswith(("validation_", "client_accuracy_"))}
    assert {"train_accuracy", "validation_accuracy", "client_accuracy_worst10"} < columns
    for number, row in enumerate(rows, start=1):
        expected = columns if number in (2, 4, 5) else columns - evaluated
        assert set(row) == expected
        assert row["round"] == number
        assert all(np.isfinite(value) for value in row.values())
    assert int(state.round) == ROUNDS
    assert not equal(params[0], params[-1])


def test_every_program_compiles_once_in_a_run(experiment, run):
    """A tier's program takes its first round's server state and every later one alike."""
    sizes = {name: program._cache_size() for name, program in experiment.algorithm.programs.items()}
    del sizes["settle"]  # not needed by so few clients
    assert sizes == {"tier 4": 1, "open": 1, "finish": 1}


def test_a_run_goes_on_from_a_copy_of_its_state_bit_for_bit(experiment, run):
    """Round 3 anew, from what a checkpoint would hold."""
    rows, params, _ = run
    state = experiment.init()
    for _ in range(2):
        state, *_ = experiment.step(state)
    copy = jax.tree.map(np.array, state)
    experiment.step(state)
    on_devices = jax.tree.map(jnp.asarray, (copy.server.params, copy.server.optimizer))
    server = copy.server._replace(params=on_devices[0], optimizer=on_devices[1])
    state, row, _ = experiment.step(copy._replace(server=server))
    assert {**row, "wall_s": 0} == {**rows[2], "wall_s": 0}
    assert bits(state.server.params) == bits(params[2])


def test_totals_are_the_sums_of_the_rows(run):
    rows, _, state = run
    ledger = state.ledger
    for name in ("bytes_up", "bytes_down"):
        assert getattr(ledger, name) == sum(row[name] for row in rows) > 0
    assert ledger.simulated_time_s == rows[-1]["simulated_time_s"]
    assert ledger.simulated_time_s == pytest.approx(sum(row["round_time_s"] for row in rows))
    assert ledger.wall_s == rows[-1]["wall_s"]
    counts = [sum(row[f"clients_{name}"] for row in rows) for name in STATUS_NAMES]
    assert ledger.status_counts.tolist() == counts
    assert sum(counts) == ROUNDS * COHORT
    assert ledger.timed_steps == (ROUNDS - 1) * COHORT * 3  # the first round compiles and is not timed


def test_clients_drop_out_by_chance_and_are_counted(experiment, run):
    rows, _, _ = run
    dropped = [int((~data_of(experiment, number).available).sum()) for number in range(1, ROUNDS + 1)]
    assert [row["clients_dropped_out"] for row in rows] == dropped
    assert 0 < sum(dropped) < COHORT * ROUNDS
    available = np.stack([data_of(experiment, number).available for number in range(500)])
    assert abs((~available).mean() - 0.3) < 0.05
    certain = build(fl__dropout_probability=0.0)
    assert all(data_of(certain, number).available.all() for number in range(50))


def test_a_cohort_is_sampled_without_replacement_from_seed_and_round_alone(experiment, run):
    cohorts = [experiment.cohort(number) for number in range(1, 60)]
    assert all(len(set(cohort)) == COHORT and set(cohort) <= set(range(CLIENTS)) for cohort in cohorts)
    assert np.bincount(np.concatenate(cohorts)).min() > 20
    fresh, other = build(fl__rounds=60), build()
    other.config.seed = 1
    # Round 40 without the rounds before it, after a run and before one.
    np.testing.assert_array_equal(fresh.cohort(40), cohorts[39])
    assert any((other.cohort(n) != cohorts[n - 1]).any() for n in range(1, 60))
    jax.tree.map(np.testing.assert_array_equal, data_of(fresh, 40), data_of(experiment, 40))


def test_another_seed_gives_another_run(experiment, run):
    config = tiny_config(**FIELDS)
    config.seed = 1
    other = Experiment(config, experiment.mesh, experiment.data)
    other.algorithm = experiment.algorithm  # compiled already, and the same for every seed
    state = other.init()
    assert not equal(state.best.params.shared["embed"], experiment.init().best.params.shared["embed"])
    assert other.step(state)[1]["train_loss"] != run[0][0]["train_loss"]
    for number in range(1, 20):
        one, two = data_of(experiment, number), data_of(other, number)
        for client in np.intersect1d(one.client, two.client):
            mine = (each.batch["tokens"][each.client == client] for each in (one, two))
            assert np.any(np.not_equal(*mine))


def test_client_data_hold_what_the_cohort_brings(experiment):
    data, members = data_of(experiment, 3), experiment.cohort(3)
    np.testing.assert_array_equal(data.client, members)
    assert data.size.max() <= 1
    np.testing.assert_array_equal(data.size * 16, 6 + members)
    np.testing.assert_array_equal(data.rate, np.full(COHORT, np.float32(0.75**2)))  # of the third round
    chex.assert_shape(data.batch["tokens"], (COHORT, 3, 4, TOKENS))
    chex.assert_shape(data.batch["labels"], (COHORT, 3, 4))
    for index, member in enumerate(members):
        own = experiment.data.train["tokens"][experiment.data.client_train[member]]
        brought = data.batch["tokens"][index].reshape(-1, TOKENS)
        assert all((own == row).all(axis=1).any() for row in brought)
    # Places of a block: the third member, none, the first.
    placed = experiment.client_data(3, members, np.array([2, -1, 0]))
    for part, values in zip(jax.tree.leaves(placed), jax.tree.leaves(data), strict=True):
        np.testing.assert_array_equal(part, np.stack([values[2], np.zeros_like(values[0]), values[0]]))


def make_quality(experiment):
    """Returns (params, rows) -> accuracy and loss, one example at a time."""

    @jax.jit
    def answer(params, tokens):
        batch = {"tokens": tokens[None]}
        return predict(experiment.model, Snapshot(params), experiment.frozen, batch, False, ALONE).output[0]

    def quality(params, rows, document):
        labels, logits = rows["labels"], np.array([answer(params, row) for row in rows["tokens"]], np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        loss = -np.mean([np.log(row[label]) for row, label in zip(chances, labels, strict=True)])
        right, f1 = [], []
        of_document = [np.flatnonzero(document == number) for number in np.unique(document)]
        truth = [labels[passages[0]] for passages in of_document]
        said = [np.log(chances[passages]).mean(axis=0).argmax() for passages in of_document]
        right = [one == other for one, other in zip(said, truth, strict=True)]
        for label in set(truth):
            hits = sum(one == other == label for one, other in zip(said, truth, strict=True))
            f1.append(2 * hits / (said.count(label) + truth.count(label)))
        return {
            "accuracy": float(np.mean(logits.argmax(axis=-1) == labels)),
            "loss": pytest.approx(loss, rel=1e-3),
            "document_accuracy": np.mean(right),
            "document_macro_f1": pytest.approx(np.mean(f1)),
        }

    return quality


def test_the_end_of_a_run(experiment, run):
    """Test and client accuracy against single examples; usage as the clients reported it."""
    rows, params, state = run
    other = jax.tree.map(lambda x: jnp.asarray(x) * 1.5, params[0])
    outcome = experiment.finish(state._replace(best=Snapshot(other)))
    data, quality = experiment.data, make_quality(experiment)
    assert outcome.final.scores == quality(params[-1], data.test, data.test_document)
    assert outcome.best.scores == quality(other, data.test, data.test_document)
    assert outcome.best.scores["loss"] != outcome.final.scores["loss"]
    for client, held in enumerate(data.client_holdout):
        own = quality(params[-1], take(data.train, held), held)
        assert outcome.client_scores[client] == pytest.approx(own["accuracy"])
    assert outcome.client_spread[0] == pytest.approx(rows[-1]["client_accuracy_mean"])
    np.testing.assert_allclose(outcome.expert_load.sum(axis=-1), 1)
    members = experiment.cohort(ROUNDS)
    np.testing.assert_array_equal(outcome.usage_before, state.server.records.usage[members])
    assert outcome.usage_after.shape == outcome.usage_before.shape == (COHORT, LAYERS, EXPERTS)
    answer = np.bincount(data.train["labels"]).argmax()
    assert experiment.baseline == np.mean(data.test["labels"] == answer)


def test_an_algorithm_of_ones_own_has_budgets_if_its_rule_uses_them(monkeypatch):
    def mine(config):
        return compose(config)._replace(rule=LocalRule(build_scoring(config, "frequency")))

    monkeypatch.setitem(algorithms._parts, "mine", mine)
    budgets = build(fl__algorithm="mine", fl__base="fedavg").budgets
    np.testing.assert_array_equal(budgets, build(fl__algorithm="frequency").budgets)
    assert budgets.max() < LAYERS * EXPERTS
    assert np.all(build(fl__algorithm="fedavg").budgets == LAYERS * EXPERTS)


def test_personal_models_are_evaluated_on_their_own_examples_and_take_turns_at_the_validation():
    """Client c's model always answers c modulo the number of classes."""
    experiment = build(fl__algorithm="local")
    params, data = experiment.init().server.params, experiment.data
    answers = np.arange(CLIENTS) % CLASSES
    head = jax.tree.map(jnp.zeros_like, params.shared["head"])
    head["classes"]["bias"] = jnp.eye(CLASSES)[answers]
    params = params._replace(shared={**params.shared, "head": head})
    quality, accuracy = experiment.splits.validate(Snapshot(params))
    own = [np.mean(data.train["labels"][rows] == answer)
           for rows, answer in zip(data.client_holdout, answers, strict=True)]  # fmt: skip
    np.testing.assert_allclose(accuracy, own)
    turns = answers[np.arange(10) // 4 % CLIENTS]  # batches of four
    order = np.random.default_rng([0, COHORT_STREAM]).permutation(10)
    assert quality.scores["accuracy"] == np.mean(data.validation["labels"][order] == turns)


def test_the_best_model_is_that_of_the_best_validation_accuracy(experiment, run):
    rows, params, state = run
    scores = {row["round"]: row.get("validation_accuracy", -1) for row in rows}
    assert state.best_score == max(scores.values())
    assert state.best_round == max(scores, key=scores.get)  # the first of equals
    assert equal(state.best.params, params[int(state.best_round) - 1])
    level, *_ = experiment.step(experiment.init())
    experiment.close()  # a run may stop here, and still go on
    level = level._replace(best_score=np.float64(scores[2]), best_round=np.int64(7))
    before = jax.tree.map(np.array, level.best)
    after, row, _ = experiment.step(level)
    assert row["validation_accuracy"] == scores[2] and after.best_round == 7
    assert equal(after.best, before)


def test_a_round_without_a_client_says_why():
    """By the draw of its first round: every client drops out but with a chance of one in a billion."""
    experiment = build(fl__algorithm="fedavg", fl__dropout_probability=1 - 1e-9)
    state = experiment.init()
    before = jax.tree.map(np.array, state.server.params)
    state, row, failures = experiment.step(state)
    experiment.close()
    assert failures == [f"round 1 trained nothing: {COHORT} clients dropped out (fl.dropout_probability)"]
    assert row["clients_dropped_out"] == COHORT and equal(state.server.params, before)


def test_a_loss_that_is_not_finite_is_named_and_its_update_dropped(experiment):
    """A word that only one client has is given an embedding whose square overflows."""
    state = experiment.init()
    server = state.server
    shared = {**server.params.shared, "embed": server.params.shared["embed"].at[RARE].set(1e20)}
    state = state._replace(server=server._replace(params=server.params._replace(shared=shared)))
    total = 0
    for number in range(1, ROUNDS + 1):
        data = data_of(experiment, number)
        fails = bool(data.available[data.client == LONER].any())
        state, row, failures = experiment.step(state)
        assert row["clients_nonfinite"] == fails == len(failures)
        total += fails
        if fails:
            assert failures[0].startswith(
                f"client {LONER}, round {number}: the loss or a score is not finite"
            )
        assert row["clients_ok"] > 0 and np.isfinite(row["train_loss"])
    assert total > 0
    assert state.ledger.status_counts[STATUS_NAMES.index("nonfinite")] == total
    assert state.server.records.rounds_measured[LONER] == 0
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.server.params))


def test_a_score_that_is_nan_is_told_and_trains_nobody(monkeypatch):
    nan = lambda evidence, importance: jnp.nan * evidence.gates.mean(1)  # noqa: E731
    monkeypatch.setitem(score_rules._parts, "nan", nan)
    experiment = build(fl__score="nan", budget__fraction=0.5)
    _, row, failures = experiment.step(experiment.init())
    experiment.close()
    assert row["clients_nonfinite"] == COHORT and len(failures) == COHORT + 1
    assert "the loss or a score is not finite" in failures[0]
    assert failures[-1].startswith("round 1 trained nothing")


def test_budgets_follow_devices_or_the_fraction_or_nothing():
    edge = build(budget__fraction=0.0)
    for name, experts in (("phone", 1), ("tablet", 3), ("laptop", ALL)):
        edge.config.devices[name].memory_bytes = float(memory_needed(edge.cost, experts, "routed"))
    by_device = {"phone": 1, "tablet": 3, "laptop": ALL}
    again = Experiment(edge.config, edge.mesh, edge.data)
    assert again.budgets.tolist() == [by_device[profile.name] for profile in again.profiles]
    assert sorted(profile.name for profile in again.profiles) == ["laptop", *["phone"] * 3, *["tablet"] * 2]
    assert build(budget__fraction=0.26).budgets.tolist() == [2] * CLIENTS
    assert build(fl__algorithm="fedavg").budgets.tolist() == [ALL] * CLIENTS
    assert build(fl__algorithm="fedavg_dropout", budget__fraction=0.26).budgets.tolist() == [2] * CLIENTS


def test_a_device_one_byte_too_small_is_refused():
    config = tiny_config(**FIELDS, budget__fraction=0.0)
    least = memory_needed(build().cost, 1, "routed")
    config.devices.phone.memory_bytes = float(least - 1)
    with pytest.raises(InputError, match=r"devices\.phone\.memory_bytes=.* too small by 1 bytes"):
        Experiment(config, make_mesh(jax.devices()[:1]), tiny_data())


DEVICES = """
import json
import jax
import hfedmoe_jax.experiment
from test_experiment import FIELDS, Experiment, make_mesh, tiny_config, tiny_data
assert jax.device_count() == 8
hfedmoe_jax.experiment.chunk_size = lambda wanted, *rest: wanted  # as on an accelerator
results = []
for devices, experts, chunk in ((2, 2, 1), (8, 2, 2)):
    every = 2 if devices == 8 else 5  # the other mesh does not compile an evaluation
    config = tiny_config(**FIELDS | dict(fl__chunk=chunk, eval__every=every))
    experiment = Experiment(config, make_mesh(jax.devices()[:devices], experts), tiny_data())
    state = experiment.init()
    for leaf in jax.tree.leaves(state.server.params.experts):
        assert leaf.sharding.shard_shape(leaf.shape)[1] == 4 // experts
    for _ in range(2):
        state, row, _ = experiment.step(state)
        results.append([row, state.server.records.usage.tolist()])
    sizes = {name: program._cache_size() for name, program in experiment.algorithm.programs.items()}
    del sizes["settle"]  # not needed
    assert set(sizes.values()) == {1}
print(json.dumps(results))
"""


@pytest.mark.slow
def test_clients_and_experts_on_several_devices_change_nothing(experiment):
    """Meshes of clients x experts: 1 x 2, and 4 x 2 with a chunk of two; three clients a round."""
    rows = json.loads(run_python(DEVICES, devices=8))
    alone, state = [], experiment.init()
    for _ in range(2):
        state, row, _ = experiment.step(state)
        alone.append((row, np.array(state.server.records.usage)))
    assert rows[-1][0].keys() == alone[-1][0].keys()
    for (row, usage), (expected, expected_usage) in zip(rows, alone * 2, strict=True):
        for name in row.keys() - {"wall_s", "empty_places_share"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
        np.testing.assert_allclose(usage, expected_usage, rtol=1e-5, atol=1e-5)
