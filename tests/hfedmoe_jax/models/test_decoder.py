"""Decoders against transformers: logits and gradients, from both layouts of a checkpoint, and back.

What transformers computes is in tests/parity/decoders.npz; `make test-parity` computes it anew.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from parity_results import check_sketch
from parity_weights import draw
from tiny_decoder import EXPECTED

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import Budget, Experts, flat, gradient_rules, open_layers
from hfedmoe_jax.models import ModelSizes
from hfedmoe_jax.models.decoder import Decoder
from hfedmoe_jax.models.decoder_names import UNUSED, decoder_names
from hfedmoe_jax.models.decoder_sizes import read_sizes
from hfedmoe_jax.models.names import export_params, import_params, read_config
from hfedmoe_jax.models.tensor_files import NewTensor, find_tensors, write_tensors

CASES = sorted({key.split("/")[0] for key in EXPECTED})
MIXTURES = [case for case in CASES if case != "llama"]


def expected(case, key):
    return EXPECTED[f"{case}/{key}"]


def new_tensors(arrays):
    return {name: NewTensor(a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()}


def published(case, directory, **options):
    """Writes the checkpoint as transformers publishes it."""
    directory.mkdir(exist_ok=True)
    arrays = {name: draw(name, shape) for name, shape in expected(case, "shapes").items()}
    write_tensors(directory, new_tensors(arrays), **options)
    (directory / "config.json").write_text(json.dumps(expected(case, "config")))
    return directory


def load(directory, **options):
    """Returns sizes, module and parameters of a checkpoint; no token is dropped."""
    sizes = read_sizes(read_config(directory))
    every = sizes.num_experts / sizes.router.top_k if sizes.num_experts else 1.0
    module = Decoder(ModelSizes(sizes.vocab_size, sizes.vocab_size, 9), sizes, every, every)
    shapes = jax.eval_shape(module.init, jax.random.key(0), {"tokens": jnp.zeros((1, 2), jnp.int32)})
    params = import_params(directory, decoder_names(sizes), shapes["params"], unused=UNUSED, **options)
    return sizes, module, params


def next_token_loss(logits, tokens):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    real = tokens[:, 1:] != 0
    return -jnp.sum(chosen * real) / jnp.sum(real)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    """With padding, for texts of several lengths."""
    tokens = expected(case, "tokens")
    _, module, params = load(published(case, tmp_path))
    out = jax.jit(module.apply)({"params": params}, {"tokens": jnp.asarray(tokens)})
    real = tokens != 0
    np.testing.assert_allclose(
        np.asarray(out.output)[real], expected(case, "logits")[real], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("case", MIXTURES)
def test_gradients_are_those_of_transformers(case, tmp_path):
    """Those of the experts come through the tape."""
    tokens = jnp.asarray(expected(case, "tokens"))
    sizes, module, params = load(published(case, tmp_path / "published"))
    experts = params.pop("experts")
    num_layers, count = module.num_layers, sizes.num_experts
    tape = jax.tree.map(jnp.zeros_like, flat(experts))
    bank = Experts(flat(experts), (), gradient_rules(num_layers * count))

    def objective(params, tape):
        budget = Budget(bank, open_layers(num_layers, count), tape)
        out = module.apply({"params": params}, {"tokens": tokens}, budget)
        return next_token_loss(out.output, tokens), out.tape, out.permit

    _, pull = jax.vjp(objective, params, tape)
    rows = jnp.arange(num_layers * count, dtype=jnp.float32).reshape(num_layers, count)
    gradient, d_tape = pull((jnp.float32(1), tape, rows))
    gradient["experts"] = jax.tree.map(lambda d, like: d.reshape(like.shape), d_tape, experts)
    # As transformers holds them in memory: experts fused.
    export_params(tmp_path / "gradient", decoder_names(sizes)[::-1], gradient, {})
    found = find_tensors(tmp_path / "gradient")
    names = [key.partition("/gradient ")[2] for key in EXPECTED if key.startswith(f"{case}/gradient ")]
    assert any(".experts." in name for name in names) and any("gate.weight" in name for name in names)
    for name in names:
        check_sketch(found[name].read(), expected(case, f"gradient {name}"), name)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_bit_for_bit(case, tmp_path):
    """As published, in shards; and through the fused layout."""
    source = published(case, tmp_path / "source")
    sizes, _, params = load(source)
    names = decoder_names(sizes)
    export_params(tmp_path / "again", names, params, read_config(source), shard_bytes=2000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    ours, theirs = find_tensors(tmp_path / "again"), find_tensors(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].read().tobytes() == tensor.read().tobytes(), name
    export_params(tmp_path / "fused", names[::-1], params, read_config(source))
    assert len(find_tensors(tmp_path / "fused")) <= len(theirs)
    _, _, back = load(tmp_path / "fused")
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_parameters_are_read_into_their_shardings(tmp_path):
    devices = jax.devices()[:1]
    mesh = jax.make_mesh((1,), ("experts",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    by_expert = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "experts"))
    source = published("mixtral", tmp_path / "source")
    _, _, params = load(source)
    paths = traverse_util.flatten_dict(params)
    shardings = traverse_util.unflatten_dict({path: by_expert for path in paths if "experts" in path})
    _, _, placed = load(source, shardings=shardings)
    assert placed["experts"]["gate_df"].sharding == by_expert
    jax.tree.map(np.testing.assert_array_equal, placed, params)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_narrow_weights_are_read_as_they_are(kind, tmp_path):
    arrays = {n: draw(n, s).astype(jnp.dtype(kind)) for n, s in expected("olmoe", "shapes").items()}
    write_tensors(tmp_path, new_tensors(arrays))
    (tmp_path / "config.json").write_text(json.dumps(expected("olmoe", "config")))
    _, _, params = load(tmp_path)
    np.testing.assert_array_equal(params["embed"], arrays["model.embed_tokens.weight"].astype(np.float32))


def test_all_that_is_wrong_with_a_checkpoint_is_told_at_once(tmp_path):
    shapes = expected("mixtral", "shapes")
    first, second = "model.norm.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert first in shapes and second in shapes
    arrays = {name: draw(name, shape) for name, shape in shapes.items() if name != first}
    arrays[second] = arrays[second][:, :-1].copy()
    arrays["model.extra.weight"] = np.zeros(3, np.float32)
    write_tensors(tmp_path, new_tensors(arrays))
    (tmp_path / "config.json").write_text(json.dumps(expected("mixtral", "config")))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    line = str(caught.value)
    assert f"{first} is missing" in line and "model.extra.weight has no parameter" in line
    assert f"{second} is [16, 11], not [16, 12]" in line


def test_damaged_files_are_told_by_name(tmp_path):
    source = published("llama", tmp_path / "source", shard_bytes=2000)
    shard = sorted(source.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for content, problem in (
        (whole[:-1], "is cut off in tensor"),
        (whole[:5], "is cut off or no safetensors file"),
        (b"\x10" + bytes(7) + b"[" * 16 + whole[24:], "has no header of safetensors"),
        (whole.replace(b'"F32"', b'"I32"', 1), "is of type I32"),
        (None, "names files that are missing"),
    ):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(InputError, match=problem):
            find_tensors(source)
    with pytest.raises(InputError, match="holds neither"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_type": "gpt2"}, "config.json has model_type='gpt2'; model.family=decoder reads mixtral, "),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type longrope"),
    ],
)
def test_what_is_not_supported_is_refused(fields, problem):
    with pytest.raises(InputError, match=problem):
        read_sizes(expected("mixtral", "config") | fields)


@pytest.mark.parametrize("content", [None, "[1]", "{", "[" * 10_000])
def test_a_config_that_is_none_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"cannot be read|no JSON object"):
        read_config(tmp_path)
