"""The mixture-of-experts profile against the parameters and the cost model of hfedmoe_jax."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from hfedmoe_jax.cost import model_cost
from hfedmoe_jax.models import ModelSizes, build_model
from hfedmoe_jax.tasks import classification
from slide_jax.errors import InputError
from slide_jax.profiles import switch_classifier

TASK = dict(num_classes=3, vocab_size=50, seq_len=9)
BATCH = {
    "tokens": jax.ShapeDtypeStruct((1, TASK["seq_len"]), "int32"),
    "labels": jax.ShapeDtypeStruct((1,), "int32"),
}
MODEL = dict(num_layers=3, width=8, hidden=6, num_experts=5, top_k=2)


def real(**sizes):
    """The config section and the parameter shapes of the real model."""
    config = tiny_config(**{f"model__{name}": size for name, size in (MODEL | sizes).items()})
    model = build_model(config.model, ModelSizes(*TASK.values()), BATCH)
    return config, model, jax.eval_shape(model.init, jax.random.key(0))[0]


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("sizes", [{}, dict(num_layers=1, top_k=1), dict(hidden=16, num_experts=2)])
def test_layers_hold_the_real_models_parameters(sizes):
    *_, params = real(**sizes)
    result = switch_classifier(**TASK, **(MODEL | sizes), accuracy=0.5)
    embedding, *blocks, head = (layer.parameters for layer in result.layers)
    shared = params.shared
    assert embedding == count((shared["embed"], shared["position"]))
    assert head == count(shared["head"])
    per_block = count((shared["blocks"], params.router, params.experts)) // len(blocks)
    assert blocks == [per_block] * (MODEL | sizes)["num_layers"]
    assert result.parameters == count(params)


@pytest.mark.parametrize("sizes", [{}, dict(num_layers=1, top_k=1), dict(width=16, num_experts=7)])
def test_work_is_that_of_the_cost_model(sizes):
    config, model, _ = real(**sizes)
    cost = model_cost(model, classification, config.model, optax.sgd(1.0), BATCH)
    result = switch_classifier(**TASK, **(MODEL | sizes), accuracy=0.5)
    assignments = config.model.num_layers * TASK["seq_len"] * config.model.top_k
    mixing = 2 * assignments * config.model.width  # the weighted sum of outputs, which profiles leave out
    assert result.flop == cost.shared_flop - mixing + assignments * cost.assignment_flop


@given(st.lists(st.integers(1, MODEL["num_experts"]), min_size=3, max_size=3))
def test_a_user_downloads_the_experts_it_keeps(kept):
    full = switch_classifier(**TASK, **MODEL, accuracy=0.5)
    part = switch_classifier(**TASK, **MODEL, accuracy=0.5, experts_kept=kept)
    expert = 2 * MODEL["width"] * MODEL["hidden"]
    for number, all_experts, own in zip(kept, full.layers[1:-1], part.layers[1:-1], strict=True):
        assert all_experts.parameters - own.parameters == (MODEL["num_experts"] - number) * expert
        # One expert alone cannot serve a token twice.
        missing = max(0, MODEL["top_k"] - number)
        assert all_experts.macs - own.macs == TASK["seq_len"] * missing * expert
    assert (full.layers[0], full.layers[-1]) == (part.layers[0], part.layers[-1])


@pytest.mark.usefixtures("unchecked_types")
def test_one_number_of_experts_holds_for_every_layer():
    one = switch_classifier(**TASK, **MODEL, accuracy=0.5, experts_kept=2)
    per_layer = switch_classifier(**TASK, **MODEL, accuracy=0.5, experts_kept=np.full(3, 2, np.int8))
    assert one == per_layer
    everything = switch_classifier(**TASK, **MODEL, accuracy=0.5, experts_kept=MODEL["num_experts"])
    assert everything == switch_classifier(**TASK, **MODEL, accuracy=0.5)
    assert all(type(layer.parameters) is int for layer in per_layer.layers)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(experts_kept=6), r"^experts_kept\[0\]=6: above num_experts=5"),
        (dict(experts_kept=[1, 5, 0]), r"^experts_kept\[2\]=0: must be"),
        (dict(experts_kept=[1, 2]), r"^experts_kept=\[1, 2\]: must be one number or 3"),
        (dict(top_k=6), r"^top_k=6: above num_experts=5"),
    ],
)
def test_experts_that_are_not_there_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        switch_classifier(**(TASK | MODEL | dict(accuracy=0.5) | sizes))
