"""The peers of the population bench compute what our model and FedAvg compute; mistakes are named."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selected_pass import make_pass

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelSizes, build_model, split_params
from hfedmoe_jax.slots import expert_capacity
from hfedmoe_jax.tasks import classification
from launch.suites.population import peers
from launch.suites.population.comparison import module_params
from launch.suites.population.rounds import Size, make_config
from launch.suites.population.torch_step import Settings, Task, flatten, make_train, torch_layout, views

CLIENTS, STEPS, BATCH, TOKENS = 4, 2, 4, 8
SIZE = Size(
    "tiny", width=8, hidden=12, num_experts=4, top_k=1, num_heads=2, vocab_size=20, seq_len=TOKENS,
    batch_size=BATCH, steps=STEPS,
)  # fmt: skip
CONFIG = make_config(SIZE, model=dict(capacity_factor=0.8))  # some tokens find no slot
NUM_CLASSES = 3
LEARNING_RATE = 0.1
BATCH_SHAPES = {"tokens": jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)}
MODEL = build_model(CONFIG.model, ModelSizes(NUM_CLASSES, SIZE.vocab_size, TOKENS), BATCH_SHAPES)
EVERY = np.ones((SIZE.num_layers, SIZE.num_experts), bool)
everything = jax.jit(make_pass(MODEL, classification, 0.01, active=False, tier=SIZE.all_experts, keep=True))

EAGER = Settings(False, "mkl")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
# The one way with an operator of its own; compiling takes half a minute.
SETTINGS = [
    EAGER,
    Settings(False, "onednn"),
    pytest.param(Settings(True, "onednn"), marks=needs_compiler),
]


@pytest.fixture(scope="module")
def task() -> Task:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, SIZE.vocab_size, (CLIENTS, STEPS, BATCH, TOKENS)).astype(np.int32)
    length = rng.integers(0, TOKENS + 1, (CLIENTS, STEPS, BATCH, 1))
    length[0, 0, 0] = 0  # a text of padding alone
    params = module_params(MODEL.init(jax.random.key(0))[0])
    # Every parameter away from zero, one and from what it is at the start, so that each one matters.
    leaves, tree = jax.tree.flatten(params)
    leaves = [np.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape), np.float32) for leaf in leaves]
    return Task(
        params=jax.tree.unflatten(tree, leaves),
        tokens=np.where(np.arange(TOKENS) < length, tokens, 0),
        labels=rng.integers(0, NUM_CLASSES, (CLIENTS, STEPS, BATCH)).astype(np.int32),
        num_examples=np.array([8.0, 3.0, 21.0, 1.0]),
        num_heads=SIZE.num_heads,
        capacity=expert_capacity(BATCH * TOKENS, SIZE.num_experts, 1, CONFIG.model.capacity_factor),
        learning_rate=LEARNING_RATE,
    )


def train_pass(params, batch):
    """Returns what `make_pass` returns, all experts trained."""
    tokens, labels = batch
    return everything(split_params(params)[0], {}, {"tokens": tokens, "labels": labels}, EVERY)


def train_in_jax(params, tokens, labels):
    losses = []
    for batch in zip(tokens, labels, strict=True):
        found = train_pass(params, batch)
        slope = module_params(found.gradient)
        params = jax.tree.map(lambda value, each: value - LEARNING_RATE * each, params, slope)
        losses.append(float(found.task_loss))
    return params, np.mean(losses)


def federated_averaging(task, rounds):
    """Losses [rounds, clients] of FedAvg with our model, written as in the paper."""
    params, losses = task.params, []
    weight = task.num_examples / task.num_examples.sum()
    for _ in range(rounds):
        trained = [train_in_jax(params, *data) for data in zip(task.tokens, task.labels, strict=True)]
        losses.append([loss for _, loss in trained])
        scaled = [
            jax.tree.map(lambda leaf, w=w: w * leaf, part)
            for w, (part, _) in zip(weight, trained, strict=True)
        ]
        params = jax.tree.map(lambda *leaves: sum(leaves), *scaled)
    return np.array(losses)


def test_the_task_drops_tokens_and_pads(task):
    routing = train_pass(task.params, (task.tokens[0, 0], task.labels[0, 0])).routing
    assert (task.tokens == 0).any() and (routing.kept < routing.sent).any()


def test_the_layout_holds_every_parameter_once(task):
    arrays = torch_layout(task.params)
    vector = flatten(arrays)
    ours = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(task.params)])
    np.testing.assert_array_equal(np.sort(vector), np.sort(ours))
    again = views(vector, {name: array.shape for name, array in arrays.items()})
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("settings", SETTINGS)
def test_local_training_is_that_of_our_model(task, settings):
    torch = pytest.importorskip("torch")
    train = make_train(task, settings)
    start = flatten(torch_layout(task.params))
    for client in range(CLIENTS):
        vector = torch.from_numpy(start.copy())
        loss = train(vector, client)
        params, expected = train_in_jax(task.params, task.tokens[client], task.labels[client])
        assert loss == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(vector.numpy(), flatten(torch_layout(params)), atol=1e-5)


@pytest.mark.parametrize(
    "packages, start",
    [
        (["torch"], peers.pytorch),
        (["torch", "pfl"], peers.pfl_research),
        (["torch", "flwr", "ray"], peers.flower),
    ],
    ids=["PyTorch", "pfl-research", "Flower"],
)
def test_a_peer_has_the_losses_of_federated_averaging(task, packages, start):
    for package in packages:
        pytest.importorskip(package)
    with start(task, EAGER) as peer:
        losses = np.array([peer.round() for _ in range(3)])
    np.testing.assert_allclose(losses, federated_averaging(task, 3), atol=1e-3)


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(InputError, match=r"no_such_package.*pip install 'hfedmoe-jax\[peers\]'"):
        peers.require("no_such_package")


def test_a_missing_compiler_is_not_passed_over(task, monkeypatch):
    monkeypatch.setattr(peers, "require", lambda *packages: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="needs a C"):
        peers.ARRANGEMENTS["PyTorch, compiled"](task)


def test_a_process_that_dies_tells_why():
    with pytest.raises(RuntimeError, match="unsupported operand"):
        peers.Arrangement(divmod, [(0,)])
