"""A second family and a second task train under budgets, and nothing else of the package knows of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_decoder
from dense_switch import with_room
from masked_oracle import assert_near
from selected_pass import make_pass
from tiny import run_round, tiny_algorithm, tiny_cohort, tiny_config, tiny_frozen, tiny_model, tiny_params

from hfedmoe_jax import experts
from hfedmoe_jax.experts import Served, open_budget
from hfedmoe_jax.models import tree_bytes
from hfedmoe_jax.tasks import Ratio, Task, classification, tasks

LAYERS, EXPERTS, TIER = 2, 3, 4
FIELDS = {"model__family": "toy_decoder", "model__top_k": 2, "task__name": "next_token"}


def each_token(logits, batch):
    """Returns the cross-entropy of each next token, and whether there is one."""
    target = jnp.pad(batch["tokens"][:, 1:], [(0, 0), (0, 1)])
    return optax.softmax_cross_entropy_with_integer_labels(logits, target), target != 0


def loss(logits, batch):
    each, real = each_token(logits, batch)
    count = jnp.sum(real, dtype=jnp.float32)
    return jnp.sum(each * real) / jnp.maximum(count, 1), count


def score(logits, batch, weight):
    each, real = each_token(logits, batch)
    real = real * weight[:, None]
    target = jnp.pad(batch["tokens"][:, 1:], [(0, 0), (0, 1)])
    right = jnp.sum((jnp.argmax(logits, axis=-1) == target) * real)
    return {"accuracy": Ratio(right, jnp.sum(real)), "loss": Ratio(jnp.sum(each * real), jnp.sum(real))}


def vocabulary(label_names, vocab_size):
    return vocab_size


tasks.register("next_token")(
    Task(
        classification.prepare,
        "token",
        vocabulary,
        loss,
        score,
        ("accuracy",),
        "accuracy",
        lambda train, test: 0.0,
    )
)


def dense_mix(expert, capacity, experts, layer, tape, h_nd, index_nk, weight_nk):
    """Stands in for `mix_experts`: all experts on all tokens, plain autodiff; `context` says who trains."""
    num_experts = len(layer.multiplier)
    own = jax.tree.map(lambda w: w.reshape(-1, num_experts, *w.shape[1:])[layer.layer], experts.bank)
    trained = experts.context[layer.layer][:, None, None]
    y_end = jax.vmap(expert, (0, None))(own, h_nd)
    y_end = jnp.where(trained, y_end, jax.lax.stop_gradient(y_end))
    sent_kne = (jax.nn.one_hot(index_nk, num_experts) * (weight_nk > 0)[..., None]).swapaxes(0, 1) > 0
    kept_kne = with_room(sent_kne, capacity)
    factor_ne = jnp.einsum("nk,kne->ne", weight_nk, kept_kne) * layer.multiplier
    sent, kept = (jnp.sum(x, axis=(0, 1), dtype=jnp.int32) for x in (sent_kne, kept_kne))
    served = Served(jnp.zeros(num_experts), sent, kept, jnp.int32(0))
    return jnp.einsum("ne,end->nd", factor_ne, y_end), tape, served


def oracle(params, frozen, batch, selected, model, balance, active):
    """Returns (loss, gradient of parameters, of multipliers) with `dense_mix` in place."""

    def objective(params, multiplier):
        budget = open_budget(params.experts, EXPERTS)
        layers = budget.layers._replace(multiplier=multiplier, forward=selected if active else None)
        budget = budget._replace(layers=layers, experts=budget.experts.replace(context=selected))
        out = model.apply(params, frozen, batch, budget, True)
        return loss(out.output, batch)[0] + balance * jnp.mean(out.routing.balance)

    return jax.value_and_grad(objective, (0, 1))(params, jnp.ones((LAYERS, EXPERTS)))


def setup(**fields):
    config = tiny_config(**FIELDS | fields)
    batch = tiny_cohort(config, [1], [0, 0]).batch
    return config, tiny_model(config), tiny_params(**FIELDS | fields), jax.tree.map(lambda x: x[0, 0], batch)


@pytest.mark.parametrize(
    ("active", "train"),
    [(True, "all"), (False, "^(?!embed|first|layers/router)")],
    ids=["active", "routed, frozen"],
)
def test_a_step_is_that_of_plain_autodiff(monkeypatch, active, train):
    """With dropped tokens; the tied table gets both of its gradients, and frozen parameters none."""
    fields = {"model__capacity_factor": 0.5, "model__train": train}
    config, model, params, batch = setup(**fields)
    kept = tiny_frozen(**FIELDS | fields)
    assert bool(kept) == (train != "all") and model.table is None
    step = make_pass(model, tasks["next_token"], config.model.load_balance, active, TIER, True)
    plain = functools.partial(oracle, model=model, balance=config.model.load_balance, active=active)
    for selected in (np.array([[1, 0, 1], [0, 1, 1]], bool), np.array([[0, 0, 0], [0, 1, 0]], bool)):
        done = jax.jit(step)(params, kept, batch, selected)
        with monkeypatch.context() as patch:
            patch.setattr(toy_decoder, "mix_experts", dense_mix)
            patch.setattr(experts, "_constant", lambda weights: weights)  # here they have a gradient
            total, (gradient, by_multiplier) = jax.jit(plain)(params, kept, batch, selected)
        np.testing.assert_allclose(done.loss, total, rtol=1e-6)
        assert_near((done.gradient, done.by_multiplier), (gradient, by_multiplier))
        assert np.sum(done.routing.kept) < np.sum(done.routing.sent)


def test_it_trains_under_budgets():
    config, model, params, _ = setup(client__learning_rate=0.02, budget__tiers=1)
    budgets = [2, 3, 4, 2, 3]
    algorithm = tiny_algorithm(config, budgets)
    state, losses = algorithm.init(params), []
    data = tiny_cohort(config, (0, 2, 3), budgets)
    for number in range(5):
        state, metrics = run_round(algorithm, state, data, jax.random.key(number))
        losses.append(float(np.mean(metrics.report.loss)))
        assert np.all(metrics.report.trained_size <= data.budget)
    assert losses[-1] < losses[0] - 0.1


def test_frozen_parameters_are_neither_trained_nor_sent():
    """The whole trunk: what remains are the experts and the routers."""
    fields = {"model__train": "router", "budget__tiers": 1}
    config, model, params, _ = setup(**fields)
    frozen = tiny_frozen(**FIELDS | fields)
    assert not jax.tree.leaves(params.shared) and len(jax.tree.leaves(frozen)) > 10
    everything = tiny_params(**FIELDS)
    chex.assert_trees_all_equal(params.experts, everything.experts)
    algorithm = tiny_algorithm(config, [TIER] * 3)
    data = tiny_cohort(config, (0, 1, 2), [TIER] * 3)
    state, metrics = run_round(algorithm, algorithm.init(params), data, jax.random.key(0))
    chex.assert_trees_all_equal_structs(state.params, everything._replace(shared={}))
    moved = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params, everything._replace(shared={})
    )
    assert min(jax.tree.leaves(moved)) > 0
    sent = metrics.uploaded.sum(axis=(1, 2))
    one = tree_bytes(everything.experts) // (LAYERS * EXPERTS)
    assert metrics.bytes_up.tolist() == (tree_bytes(everything.router) + sent * one).tolist()
