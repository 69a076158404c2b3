"""Quality and routing of a model, against loops over single examples in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, tiny_batches, tiny_config, tiny_model, tiny_params

from hfedmoe_jax.client import ClientData
from hfedmoe_jax.evaluation import (
    BatchScore,
    EvaluationBatches,
    client_spread,
    make_evaluate,
    make_usage,
    summarize,
)
from hfedmoe_jax.models import open_controls
from hfedmoe_jax.population import make_mesh, plan_blocks, stack_members

BATCHES, SIZE = 3, 4
MESH = make_mesh(jax.devices()[:1])
# As many slots as an expert could be asked for: an example's answer does not depend on its batch.
ROOMY = {"model__capacity_factor": 3.0, "model__eval_capacity_factor": 3.0}
CRAMPED = ROOMY | {"model__capacity_factor": 0.3}  # in training only
WEIGHT = np.float32([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(**CRAMPED))


@pytest.fixture(scope="module")
def apply(model):
    """Answers and routing of one example."""
    controls = open_controls(model.num_layers, model.num_experts)
    return jax.jit(lambda params, tokens: model.apply(params, tokens[None], controls, training=False))


def batches(seed=0):
    tokens, labels = tiny_batches(seed, BATCHES, SIZE)
    return EvaluationBatches(tokens, labels, WEIGHT, np.arange(BATCHES, dtype=np.int32))


def by_hand(model, apply, params, batch):
    """Returns the sums over one batch, example by example in float64; `params` is one a batch."""
    correct = loss = count = entropy = num_tokens = 0.0
    load = np.zeros((model.num_layers, model.num_experts))
    for tokens, label, weight in zip(batch.tokens, batch.labels, batch.weight, strict=True):
        if not weight:
            continue
        logits, routing = apply(params, tokens)
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
    return BatchScore(correct, loss, count, load, entropy / model.num_layers, num_tokens / model.num_layers)


def assert_scores(scores, expected):
    for index, one in enumerate(expected):
        for name, value in one._asdict().items():
            np.testing.assert_allclose(getattr(scores, name)[index], value, rtol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def evaluate(model):
    """Judges a shared model, compiled once."""
    return make_evaluate(model, False, MESH, 1, ROOMY["model__eval_capacity_factor"])


def test_sums_are_those_of_a_loop_over_examples(model, apply, evaluate):
    params, data = tiny_params(), batches()
    scores = evaluate(params, data)
    per_batch = [jax.tree.map(lambda x, i=i: x[i], data) for i in range(BATCHES)]
    expected = [by_hand(model, apply, params, batch) for batch in per_batch]
    assert_scores(scores, expected)
    assert scores.count.tolist() == [4, 3, 1]
    quality = summarize(scores)
    assert quality.accuracy == pytest.approx(sum(one.correct for one in expected) / 8)
    assert quality.loss == pytest.approx(sum(one.loss for one in expected) / 8, rel=1e-4)
    load = sum(one.load for one in expected)
    np.testing.assert_allclose(quality.load, load / load.sum(axis=-1, keepdims=True), rtol=1e-6)
    entropy = sum(one.entropy for one in expected) / sum(one.tokens for one in expected)
    assert quality.router_entropy == pytest.approx(entropy, rel=1e-4)


def test_padding_does_not_count_whatever_it_holds(evaluate):
    data = batches()
    padding = data.weight == 0
    other = data._replace(
        tokens=np.where(padding[..., None], 7, data.tokens).astype(np.int32),
        labels=np.where(padding, (data.labels + 1) % CLASSES, data.labels).astype(np.int32),
    )
    assert (other.tokens != data.tokens).any()
    params = tiny_params()
    jax.tree.map(np.testing.assert_array_equal, evaluate(params, other), evaluate(params, data))


def test_personal_models_are_judged_by_their_owners(model, apply):
    """Batch by batch another client's parameters, in the order that `judge` says."""
    params = tiny_params()
    owners = [jax.tree.map(lambda x, c=c: x * (1 + 0.5 * c), params) for c in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owners)
    judge = np.int32([2, 0, 2])
    data = batches()._replace(judge=judge)
    # A chunk of two leaves a place without a batch.
    scores = make_evaluate(model, True, MESH, 2, ROOMY["model__eval_capacity_factor"])(stacked, data)
    expected = [
        by_hand(model, apply, owners[owner], jax.tree.map(lambda x, i=i: x[i], data))
        for i, owner in enumerate(judge)
    ]
    assert_scores(scores, expected)
    assert len({round(float(loss), 3) for loss in scores.loss}) == 3


@pytest.mark.parametrize(("personal", "unit"), [(False, "sample"), (True, "sample"), (False, "token")])
def test_usage_is_the_mean_gate_weight_of_each_expert(model, apply, personal, unit):
    params = tiny_params()
    owners = [jax.tree.map(lambda x, c=c: x * (1 + 0.5 * c), params) for c in range(3)]
    members, num_steps = [2, 0], 2
    tokens, labels = tiny_batches(5, len(members), num_steps, SIZE)
    zero = np.zeros(len(members), np.float32)
    cohort = ClientData(np.int32(members), tokens, labels, zero, zero.astype(np.int32), zero == 0)
    given = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owners) if personal else params
    roomy = tiny_model(tiny_config(**ROOMY))
    blocks = plan_blocks(np.zeros(len(members), int), MESH, 1)
    portions = ((block, stack_members(cohort, block.members)) for block in blocks)
    usage_of = make_usage(roomy, personal, MESH, 1, ROOMY["model__capacity_factor"], unit)
    result = usage_of(given, portions)
    for index, client in enumerate(members):
        expected = np.zeros((model.num_layers, model.num_experts))
        examples = tokens[index].reshape(-1, tokens.shape[-1])
        for example in examples:
            share = 1 / np.count_nonzero(examples)  # of a token
            if unit == "sample":
                share = 1 / (len(examples) * np.count_nonzero(example))
            _, routing = apply(owners[client] if personal else params, example)
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
