"""Quality and routing of a model, against loops over single examples in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, tiny_batches, tiny_config, tiny_model, tiny_params

from hfedmoe_jax.client import ClientData
from hfedmoe_jax.evaluation import (
    BatchScore,
    EvaluationBatches,
    Evaluator,
    Snapshot,
    predict,
)
from hfedmoe_jax.mesh import ALONE, make_mesh
from hfedmoe_jax.population import stack_members
from hfedmoe_jax.quality import client_spread, summarize
from hfedmoe_jax.schedule import plan_blocks
from hfedmoe_jax.tasks import Ratio, classification

BATCHES, SIZE = 3, 4
MESH = make_mesh(jax.devices()[:1])
# As many slots as an expert could be asked for: an example's answer does not depend on its batch.
ROOMY = {"model__capacity_factor": 3.0, "model__eval_capacity_factor": 3.0}
CRAMPED = ROOMY | {"model__capacity_factor": 0.3}  # in training only
WEIGHT = np.float32([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])


def evaluator_of(personal=False, chunk=1, unit="sample", fields=CRAMPED):
    """Returns an evaluator of three clients' models, or of one for all."""
    model = tiny_model(tiny_config(**fields))
    return Evaluator(model, classification, {}, personal, 3, MESH, chunk, unit)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(**CRAMPED))


@pytest.fixture(scope="module")
def apply(model):
    """Logits and routing of one example."""

    def one(params, tokens):
        return predict(model, Snapshot(params), {}, {"tokens": tokens[None]}, False, ALONE)

    return jax.jit(one)


def batches(seed=0):
    """Returns batches whose examples of weight 0 are padding throughout, as of `pad_batches`."""
    batch = tiny_batches(seed, BATCHES, SIZE)
    batch["tokens"] = np.where(WEIGHT[..., None] > 0, batch["tokens"], 0)
    return EvaluationBatches(batch, WEIGHT, np.arange(BATCHES, dtype=np.int32))


@pytest.fixture(scope="module")
def evaluator():
    """Evaluates one model for all, compiled once."""
    return evaluator_of()


def by_hand(model, apply, params, batch):
    """Returns the sums over one batch, example by example in float64; `params` is one a batch."""
    correct = loss = count = entropy = num_tokens = 0.0
    load = np.zeros((model.num_layers, model.num_experts))
    tokens_bt, labels = batch.batch["tokens"], batch.batch["labels"]
    for tokens, label, weight in zip(tokens_bt, labels, batch.weight, strict=True):
        if not weight:
            continue
        logits, *_, routing = apply(params, tokens)
        logits = np.asarray(logits[0], np.float64)
        correct += float(np.argmax(logits) == label)
        loss += float(np.log(np.sum(np.exp(logits))) - logits[label])
        count += 1
        gates = np.asarray(routing.gates, np.float64)
        for layer, token in np.ndindex(model.num_layers, len(tokens)):
            if tokens[token]:
                load[layer, np.argmax(gates[layer, token])] += 1
                entropy -= float(np.sum(gates[layer, token] * np.log(gates[layer, token])))
                num_tokens += 1
    scores = {"accuracy": Ratio(correct, count), "loss": Ratio(loss, count)}
    entropy = Ratio(entropy / model.num_layers, num_tokens / model.num_layers)
    return BatchScore(scores, load, entropy, ())


def assert_scores(scores, expected):
    expected = jax.tree.map(lambda *batches: np.float32(np.stack(batches)), *expected)
    chex.assert_trees_all_close(scores._replace(evidence=()), expected, rtol=2e-4)


def test_sums_are_those_of_a_loop_over_examples(model, apply, evaluator):
    params, data = tiny_params(), batches()
    scores = evaluator.scores(Snapshot(params), data)
    per_batch = [jax.tree.map(lambda x, i=i: x[i], data) for i in range(BATCHES)]
    expected = [by_hand(model, apply, params, batch) for batch in per_batch]
    assert_scores(scores, expected)
    assert scores.scores["accuracy"].count.tolist() == [4, 3, 1]
    for index in np.argwhere(data.weight > 0):
        logits, *_ = apply(params, data.batch["tokens"][tuple(index)])
        logits = np.asarray(logits[0], np.float64)
        expected_evidence = logits - np.log(np.sum(np.exp(logits)))
        np.testing.assert_allclose(scores.evidence[tuple(index)], expected_evidence, atol=1e-5)
    quality = summarize(scores)
    for name in ("accuracy", "loss"):
        total = sum(one.scores[name].total for one in expected)
        assert quality.scores[name] == pytest.approx(total / 8, rel=1e-4)
    load = sum(one.load for one in expected)
    np.testing.assert_allclose(quality.load, load / load.sum(axis=-1, keepdims=True), rtol=1e-6)
    entropy = sum(one.entropy.total for one in expected) / sum(one.entropy.count for one in expected)
    assert quality.router_entropy == pytest.approx(entropy, rel=1e-4)


def test_padded_examples_do_not_count(evaluator):
    """Whatever their labels; experts and entropy are those of the real tokens."""
    data = batches()
    labels = np.where(data.weight == 0, (data.batch["labels"] + 1) % CLASSES, data.batch["labels"])
    one, other = (
        evaluator.scores(Snapshot(tiny_params()), data._replace(batch=data.batch | {"labels": labels}))
        for labels in (data.batch["labels"], labels)
    )
    chex.assert_trees_all_equal(one, other)
    assert one.entropy.count.tolist() == np.count_nonzero(data.batch["tokens"], axis=(1, 2)).tolist()


def test_a_bias_of_the_routers_chooses_the_experts(model, apply):
    """As adding it to the logits does, that is to the logarithms of the gates; in the first layer by hand."""
    params, data = tiny_params(), batches()
    bias = np.random.default_rng(3).normal(size=(model.num_layers, model.num_experts)).astype(np.float32)
    evaluator = evaluator_of(fields=ROOMY)
    load = evaluator.scores(Snapshot(params, bias), data).load.sum(axis=0)
    expected = np.zeros(model.num_experts)
    for tokens in data.batch["tokens"][data.weight > 0]:
        *_, routing = apply(params, tokens)
        chosen = np.argmax(np.log(np.asarray(routing.gates[0], np.float64)) + bias[0], axis=-1)
        expected += np.bincount(chosen[tokens > 0], minlength=model.num_experts)
    np.testing.assert_array_equal(load[0], expected)
    assert np.any(load[0] != evaluator.scores(Snapshot(params), data).load.sum(axis=0)[0])


def padded(models):
    """Returns models [C, ...] as a `StateStore` keeps them: C is a multiple of 8."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 5)] + [(0, 0)] * (x.ndim - 1)), models)


def test_personal_models_are_evaluated_for_their_owners(model, apply):
    """Batch by batch another client's parameters, in the order that `client` says."""
    params = tiny_params()
    owners = [jax.tree.map(lambda x, c=c: x * (1 + 0.5 * c), params) for c in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owners)
    clients = np.int32([2, 0, 2])
    data = batches()._replace(client=clients)
    # A chunk of two leaves a place without a batch.
    scores = evaluator_of(personal=True, chunk=2).scores(Snapshot(padded(stacked)), data)
    expected = [
        by_hand(model, apply, owners[owner], jax.tree.map(lambda x, i=i: x[i], data))
        for i, owner in enumerate(clients)
    ]
    assert_scores(scores, expected)
    assert len({round(float(loss), 3) for loss in scores.scores["loss"].total}) == 3


@pytest.mark.parametrize(("personal", "unit"), [(False, "sample"), (True, "sample"), (False, "token")])
def test_usage_is_the_mean_gate_weight_of_each_expert(model, apply, personal, unit):
    params = tiny_params()
    owners = [jax.tree.map(lambda x, c=c: x * (1 + 0.5 * c), params) for c in range(3)]
    members, num_steps = [2, 0], 2
    batch = tiny_batches(5, len(members), num_steps, SIZE)
    zero = np.zeros(len(members), np.float32)
    cohort = ClientData(np.int32(members), batch, zero, zero.astype(np.int32), zero == 0, zero)
    given = padded(jax.tree.map(lambda *leaves: jnp.stack(leaves), *owners)) if personal else params
    blocks = plan_blocks(np.zeros(len(members), int), MESH, 1)
    portions = ((block, stack_members(cohort, block.members)) for block in blocks)
    result = evaluator_of(personal, 1, unit, ROOMY).usage(Snapshot(given), portions)
    for index, client in enumerate(members):
        expected = np.zeros((model.num_layers, model.num_experts))
        examples = batch["tokens"][index].reshape(-1, batch["tokens"].shape[-1])
        for example in examples:
            share = 1 / np.count_nonzero(examples)  # of a token
            if unit == "sample":
                share = 1 / (len(examples) * np.count_nonzero(example))
            *_, routing = apply(owners[client] if personal else params, example)
            gates = np.asarray(routing.gates, np.float64)
            for layer, token in np.ndindex(model.num_layers, len(example)):
                if example[token]:
                    expert = np.argmax(gates[layer, token])
                    expected[layer, expert] += share * gates[layer, token, expert]
        np.testing.assert_allclose(result[index], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (25, 3)])
def test_spread_over_clients(clients, worst):
    accuracy = np.random.default_rng(clients).random(clients)
    mean, deviation, lowest = client_spread(accuracy)
    centre = sum(accuracy) / clients
    assert mean == pytest.approx(centre)
    assert deviation == pytest.approx((sum((a - centre) ** 2 for a in accuracy) / clients) ** 0.5)
    assert lowest == pytest.approx(sum(sorted(accuracy)[:worst]) / worst)
