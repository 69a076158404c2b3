"""FLOP and bytes read off programs and shapes, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import optax
import pytest
from tiny import CLASSES, TOKENS, VOCABULARY, tiny_config, tiny_model

from hfedmoe_jax.cost import model_cost, product_flop, residual_bytes
from hfedmoe_jax.models import tree_bytes
from hfedmoe_jax.tasks import classification

X, W = jnp.ones((2, 3)), jnp.ones((3, 3))
ONE = 2 * 2 * 3 * 3  # FLOP of X @ W


def chain(x, w):
    """Five products."""
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]


def branches(x, w):
    """One product or two."""
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)


def unknown_length(x, w):
    """One product, and as many as `x` says."""
    return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda _, x: x @ w, x @ w)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x, w: x @ w, 1),
        (lambda x, w: x + w[:2], 0),
        (chain, 5),
        (lambda x, w: chain(chain(x, w) @ w, w), 11),
        (branches, 2),
        (unknown_length, 1),
        (jax.jit(lambda x, w: jax.checkpoint(jnp.matmul)(x, w) @ w), 2),
        (jax.vmap(lambda x, w: x @ w, (0, None)), 1),
        (jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1)), 3),
    ],
)
def test_flop_are_those_of_the_products(function, products):
    assert product_flop(function, X, W) == products * ONE


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (lambda x, w: x @ w, 0),  # arguments alone
        (lambda x, w: jnp.exp(x @ w), 6),  # its output
        (lambda x, w: jnp.sum(jnp.sin(x)) * jnp.sum(w), 1),  # of w, the batch here, its sum
        (lambda w, x: jnp.sum(jnp.sin(x)) * jnp.sum(w), 9 + 1),  # the cosine, and the sum of the sines
        (lambda x, w: jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w)))(x, w), 0),
    ],
)
def test_residuals_are_what_the_backward_pass_reads_of_what_the_batch_led_to(function, numbers):
    assert residual_bytes(lambda x, w: jax.vjp(function, x, w)[1], X, W) == 4 * numbers


def cost_of(batch_size=4, **fields):
    config = tiny_config(fl__batch_size=batch_size, **fields)
    batch = {
        "tokens": jax.ShapeDtypeStruct((batch_size, TOKENS), jnp.int32),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return model_cost(tiny_model(config), classification, config.model, optax.adam(1.0), batch)


D, F, LAYERS, EXPERTS, K = 16, 64, 3, 4, 2
SIZES = dict(model__width=D, model__hidden=F, model__num_layers=LAYERS, model__num_experts=EXPERTS)
SIZES |= dict(model__top_k=K, model__capacity_factor=0.5)


def test_the_cost_of_the_encoder_is_that_of_its_arrays_and_products():
    cost, tokens = cost_of(**SIZES), 4 * TOKENS
    attention, norm = 4 * (D * D + D), 2 * D
    rest = VOCABULARY * D + TOKENS * D + LAYERS * (attention + 2 * norm + D * EXPERTS)
    rest += norm + D * CLASSES + CLASSES
    assert cost.all_experts == LAYERS * EXPERTS and cost.frozen_bytes == 0
    assert cost.shared_parameter_bytes == 4 * rest
    assert cost.expert_parameter_bytes == 4 * 2 * D * F
    # Gradient, two moments with a step count, and the hidden units of its places for tokens.
    slots = tokens * K // EXPERTS // 2
    assert cost.expert_training_bytes == 3 * 4 * 2 * D * F + 4 + 4 * slots * F
    assert cost.assignment_flop == 2 * 2 * D * F
    layer = 4 * 2 * tokens * D * D + 2 * 2 * tokens * TOKENS * D + 2 * tokens * D * EXPERTS
    combine = 2 * tokens * K * D  # of the experts' outputs
    assert cost.shared_flop == LAYERS * (layer + combine) + 2 * 4 * D * CLASSES


def test_activations_follow_batch_precision_and_remat():
    def activations(**fields):
        cost = cost_of(**SIZES, **fields)
        return (
            cost.activation_bytes,
            cost.expert_training_bytes - 3 * cost.expert_parameter_bytes - 4,
        )

    shared, expert = activations()
    assert (
        shared > 4 * LAYERS * 4 * TOKENS * D * 5
    )  # queries, keys, values, and what two norms read, at least
    doubled = activations(batch_size=8)
    assert 1.9 * shared < doubled[0] < 2.1 * shared and doubled[1] == 2 * expert
    half = activations(model__precision="bfloat16")
    assert half[0] < 0.9 * shared and half[1] == expert / 2
    again = activations(model__remat=True)
    assert again[0] < 0.6 * shared and again[1] == 0


def test_frozen_parameters_neither_travel_nor_have_gradients():
    cost, whole = cost_of(model__train="^(?!.*(embed|attend))"), cost_of()
    assert cost.frozen_bytes == whole.shared_parameter_bytes - cost.shared_parameter_bytes > 0
    # No gradients nor moments of what is frozen; activations are no more than before.
    assert cost.shared_training_bytes <= whole.shared_training_bytes - 4 * cost.frozen_bytes
    assert cost.shared_flop == whole.shared_flop
    shapes, frozen = jax.eval_shape(
        tiny_model(tiny_config(model__train="^(?!.*(embed|attend))")).init, jax.random.key(0)
    )
    assert cost.frozen_bytes == tree_bytes(frozen)
    assert cost.shared_parameter_bytes == tree_bytes((shapes.router, shapes.shared))
