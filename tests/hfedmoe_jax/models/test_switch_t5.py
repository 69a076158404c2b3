"""Switch Transformers against transformers: logits and gradients, with and without dropped tokens, and back.

What transformers computes is in tests/parity/switch.npz; `make test-parity` computes it anew.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_switch_t5 import EXPECTED, write_switch_t5

from hfedmoe_jax.experts import Budget, Experts, flat, gradient_rules, open_layers
from hfedmoe_jax.models import ModelSizes
from hfedmoe_jax.models.names import export_params, read_config
from hfedmoe_jax.models.switch_t5 import SwitchT5
from hfedmoe_jax.models.switch_t5_sizes import read_switch_sizes
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.tasks import text_to_text

CASES = sorted({key.split("/")[0] for key in EXPECTED})


def expected(case, key):
    return EXPECTED[f"{case}/{key}"]


def batch_of(case):
    return {name: jnp.asarray(expected(case, name)) for name in ("tokens", "answers")}


def load(directory):
    """Returns module and parameters of a checkpoint whose batches have room for every token."""
    shape = read_switch_sizes(read_config(directory))
    every = float(shape.num_experts)
    module = SwitchT5(ModelSizes(shape.vocab_size, shape.vocab_size, 12), shape, every, every)
    params = module.read(directory)
    return module, jax.tree.map(np.asarray, params, is_leaf=lambda x: hasattr(x, "place"))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    """With padding, for texts and answers of several lengths."""
    batch = batch_of(case)
    module, params = load(write_switch_t5(tmp_path, case))
    out = jax.jit(module.apply)({"params": params}, batch)
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


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers(case, tmp_path):
    """Those of the experts of both stacks come through one tape."""
    batch = batch_of(case)
    module, params = load(write_switch_t5(tmp_path / "published", case))
    experts = params.pop("experts")
    num_layers, count = module.num_layers, module.num_experts
    tape = jax.tree.map(jnp.zeros_like, flat(experts))
    bank = Experts(flat(experts), (), gradient_rules(num_layers * count))

    def objective(params, tape):
        out = module.apply({"params": params}, batch, Budget(bank, open_layers(num_layers, count), tape))
        return text_to_text.loss(out.output, batch)[0], out.tape, out.permit

    @jax.jit
    def differentiate(params, tape):
        _, pull = jax.vjp(objective, params, tape)
        rows = jnp.arange(num_layers * count, dtype=jnp.float32).reshape(num_layers, count)
        return pull((jnp.float32(1), tape, rows))

    gradient, d_tape = differentiate(params, tape)
    gradient["experts"] = jax.tree.map(lambda d, like: d.reshape(like.shape), d_tape, experts)
    export_params(tmp_path / "gradient", module.names(), gradient, {})
    found = find_tensors(tmp_path / "gradient")
    names = [key.partition("/gradient ")[2] for key in EXPECTED if key.startswith(f"{case}/gradient ")]
    for part in ("encoder.block.1.layer.1.mlp.experts", "decoder.block", "router", "relative_attention_bias"):
        assert any(part in name for name in names)
    for name in names:
        theirs = expected(case, f"gradient {name}")
        np.testing.assert_allclose(found[name].read(), theirs, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_bit_for_bit(case, tmp_path):
    source = write_switch_t5(tmp_path / "source", case)
    module, params = load(source)
    export_params(tmp_path / "again", module.names(), params, read_config(source), shard_bytes=2000)
    ours, theirs = find_tensors(tmp_path / "again"), find_tensors(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].read().tobytes() == tensor.read().tobytes(), name
