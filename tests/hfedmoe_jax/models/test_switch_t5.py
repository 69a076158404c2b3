"""Switch Transformers against transformers: logits and gradients, with and without dropped tokens, and back.

What transformers computes is in tests/parity/switch.npz; `make test-parity` computes it anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_results import check_sketch
from tiny_switch_t5 import EXPECTED, write_switch_t5

from hfedmoe_jax.experts import Budget, Experts, flat, gradient_rules, open_layers
from hfedmoe_jax.models import ModelOutput, ModelSizes
from hfedmoe_jax.models.names import export_params, read_config
from hfedmoe_jax.models.switch_t5 import SwitchT5
from hfedmoe_jax.models.switch_t5_sizes import read_switch_sizes
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.tasks import text_to_text

CASES = sorted({key.split("/")[0] for key in EXPECTED})


def expected(case, key):
    return EXPECTED[f"{case}/{key}"]


def load(directory):
    """Returns module and parameters of a checkpoint whose batches have room for every token."""
    shape = read_switch_sizes(read_config(directory))
    every = float(shape.num_experts)
    module = SwitchT5(ModelSizes(shape.vocab_size, shape.vocab_size, 12), shape, every, every)
    params = module.read(directory)
    return module, jax.tree.map(np.asarray, params, is_leaf=lambda x: hasattr(x, "place"))


class Computed(NamedTuple):
    """What our module makes of a case: outputs, and the gradient of the loss as its parameters are."""

    case: str
    module: SwitchT5
    batch: dict
    out: ModelOutput
    gradient: dict


@pytest.fixture(scope="module", params=CASES)
def computed(request, tmp_path_factory):
    """One pass for both tests; the gradients of the experts of both stacks come through one tape."""
    batch = {name: jnp.asarray(expected(request.param, name)) for name in ("tokens", "answers")}
    module, params = load(write_switch_t5(tmp_path_factory.mktemp("published"), request.param))
    experts = params.pop("experts")
    num_layers, count = module.num_layers, module.num_experts
    bank = Experts(flat(experts), (), gradient_rules(num_layers * count))

    def objective(params, tape):
        out = module.apply({"params": params}, batch, Budget(bank, open_layers(num_layers, count), tape))
        return (text_to_text.loss(out.output, batch)[0], out.tape, out.permit), out

    @jax.jit
    def differentiate(params, tape):
        _, pull, out = jax.vjp(objective, params, tape, has_aux=True)
        rows = jnp.arange(num_layers * count, dtype=jnp.float32).reshape(num_layers, count)
        return out, *pull((jnp.float32(1), tape, rows))

    out, gradient, d_tape = differentiate(params, jax.tree.map(jnp.zeros_like, flat(experts)))
    gradient["experts"] = jax.tree.map(lambda d, like: d.reshape(like.shape), d_tape, experts)
    return Computed(request.param, module, batch, out, gradient)


def test_logits_are_those_of_transformers(computed):
    """With padding, for texts and answers of several lengths."""
    case, module, batch, out, _ = computed
    real = expected(case, "answers") != 0
    np.testing.assert_allclose(
        np.asarray(out.output.logits)[real], expected(case, "logits")[real], rtol=0, atol=1e-5
    )
    loss, count = text_to_text.loss(out.output, batch)
    assert count == real.sum()
    np.testing.assert_allclose(loss, expected(case, "loss"), rtol=1e-5)
    dropped = np.sum(out.routing.sent - out.routing.kept, axis=1)
    assert np.all(dropped > 0) if case == "dropping" else np.all(dropped == 0)
    text = np.sum(np.asarray(batch["tokens"]) != 0)
    encoder = module.shape.encoder.mixtures
    assert np.sum(out.routing.sent, axis=1).tolist() == [
        text if layer < encoder else real.sum() for layer in range(module.num_layers)
    ]


def test_gradients_are_those_of_transformers(computed, tmp_path):
    export_params(tmp_path, computed.module.names(), computed.gradient, {})
    found = find_tensors(tmp_path)
    start = f"{computed.case}/gradient "
    names = [key.removeprefix(start) for key in EXPECTED if key.startswith(start)]
    for part in ("encoder.block.1.layer.1.mlp.experts", "decoder.block", "router", "relative_attention_bias"):
        assert any(part in name for name in names)
    for name in names:
        check_sketch(found[name].read(), EXPECTED[start + name], name)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_written(case, tmp_path):
    """Every weight bit for bit, without one that is missing or not known."""
    transformers = pytest.importorskip("transformers")
    source = write_switch_t5(tmp_path / "source", case)
    module, params = load(source)
    export_params(tmp_path / "again", module.names(), params, read_config(source))
    factory = transformers.SwitchTransformersForConditionalGeneration
    model, told = factory.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(told.values())
    theirs = model.state_dict()
    for name, tensor in find_tensors(source).items():
        assert theirs[name].numpy().tobytes() == tensor.read().tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_bit_for_bit(case, tmp_path):
    source = write_switch_t5(tmp_path / "source", case)
    module, params = load(source)
    export_params(tmp_path / "again", module.names(), params, read_config(source), shard_bytes=2000)
    ours, theirs = find_tensors(tmp_path / "again"), find_tensors(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].read().tobytes() == tensor.read().tobytes(), name
