"""The parameters that a run starts from: a checkpoint, its last networks made mixtures of experts.

Mixtures are made once, on public text (BBC News, which no client owns as such), and kept on disk; runs of
the same checkpoint and settings share them.

Axes: L layers with experts, E experts, Q topics.
"""

import hashlib
import json
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from hfedmoe_jax.data.sources import bbc_news
from hfedmoe_jax.data.tokenizers import encode_passages, load_tokenizer
from hfedmoe_jax.models.frozen import place_leaf
from hfedmoe_jax.models.names import StoredParam
from hfedmoe_jax.models.params import Params
from hfedmoe_jax.models.tensor_files import NewTensor, find_tensors, write_tensors
from hfedmoe_jax.pretrained import cache_root, find_source
from hfedmoe_jax.upcycling import Mixture, Network, Shape, mix, output, upcyclings

TEXTS, HELD_OUT, TOKENS = 512, 128, 128  # public articles, those of them that only judge, and tokens of each
SEED = 0  # of what chance decides in a mixture; runs of other seeds share it
REPORT = "report.json"
ROUTER = ("router_de", "router_e")
VERSION = "1"  # of what this module makes of the same settings


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      params: nested dict; what is missing in it is drawn at random.
      digest: of the checkpoint and the settings.
      report: of the mixtures on held-out text, see `judge`; empty if the checkpoint has its own.
      adapters: trained ones (`model.adapters`), and their routers; empty: new ones.
    """

    params: dict
    digest: str
    report: dict[str, Any]
    adapters: dict = {}  # noqa: RUF012


def cache_dir() -> pathlib.Path:
    """Returns where mixtures are kept."""
    return cache_root() / "mixtures"


def load_start(config: ConfigDict, module: Any) -> Start:
    """Returns the parameters that a module of a pretrained family starts from.

    Args:
      config: the section `model`.
      module: with `read(directory)`, which returns the checkpoint's parameters. If it is dense also
        with `networks(params)`, a `Network` a layer with experts; `inputs(params, tokens)`, what enters
        them; and `assemble(params, mixtures)`, its own parameters.

    Raises:
      InputError: the checkpoint cannot be used, or `model.upcycling` is unknown.
    """
    directory = find_source(config.source)
    dense, digest = module.read(directory), digest_of(directory, config, module)
    if not hasattr(module, "networks"):
        return Start(dense, digest, {})
    make = upcyclings[config.upcycling]
    kept = cache_dir() / digest
    found = read_kept(kept)
    if found is None:
        found = make_mixtures(make, module, dense, directory)
        keep(kept, *found)
    mixtures, report = found
    return Start(module.assemble(dense, mixtures), digest, report)


def digest_of(directory: pathlib.Path, config: ConfigDict, module: Any) -> str:
    """Returns a SHA-256 of a checkpoint's tensors and of the settings that a mixture depends on."""
    hashed = hashlib.sha256()
    settings = (VERSION, config.upcycling, module.num_layers, module.num_experts, module.top_k)
    hashed.update(repr(settings).encode())
    for path in sorted({tensor.path for tensor in find_tensors(directory).values()}):
        with open(path, "rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()[:32]


def read_kept(directory: pathlib.Path) -> tuple[Mixture, dict[str, Any]] | None:
    """Returns mixtures and their report; None if they are not there whole."""
    try:
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        stored = {name: np.array(tensor.read()) for name, tensor in find_tensors(directory).items()}
        router = [stored.pop(name) for name in ROUTER]
        return Mixture(Network(**stored), *router), report
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
        return None


def keep(directory: pathlib.Path, mixtures: Mixture, report: dict[str, Any]) -> None:
    """Writes mixtures and their report; whoever comes later reads them whole, or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix="making-"))
    arrays = mixtures.experts.arrays() | dict(zip(ROUTER, mixtures[1:], strict=True))
    tensors = {name: NewTensor(x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()}
    write_tensors(fresh, tensors)
    (fresh / REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)  # damaged
    try:
        fresh.replace(directory)
    except OSError:  # another run was faster
        shutil.rmtree(fresh)


def make_mixtures(
    make: Any, module: Any, dense: dict, directory: pathlib.Path
) -> tuple[Mixture, dict[str, Any]]:
    """Returns mixtures with a leading axis L, and how good they are on held-out text."""
    rng = np.random.default_rng(SEED)
    articles = bbc_news()
    chosen = rng.permutation(len(articles.texts))[:TEXTS]
    texts, labels = [articles.texts[i] for i in chosen], np.array([articles.labels[i] for i in chosen])
    tokens, _ = encode_passages(
        load_tokenizer(directory), texts, min(TOKENS, module.shape.positions), "truncate"
    )
    inputs = [module.inputs(dense, tokens[start : start + 64]) for start in range(0, TEXTS, 64)]
    inputs_lbtd = np.concatenate([np.asarray(each) for each in inputs], axis=1)
    real, topic = tokens != 0, np.broadcast_to(labels[:, None], tokens.shape)
    seen, held = real.copy(), real.copy()
    seen[-HELD_OUT:], held[:-HELD_OUT] = False, False
    shape = Shape(module.num_experts, module.top_k)
    mixtures, judged = [], []
    for network, layer in zip(module.networks(dense), inputs_lbtd, strict=True):
        mixtures.append(make(network, layer[seen], shape, rng))
        judged.append(judge(mixtures[-1], network, layer[held], topic[held], module.rule.scale, shape.top_k))
    together = {name: float(np.mean([each[name] for each in judged])) for name in judged[0]}
    return jax.tree.map(lambda *parts: np.stack(parts), *mixtures), together


def judge(
    mixture: Mixture, network: Network, inputs: np.ndarray, topic: np.ndarray, scale: float, top_k: int
) -> dict[str, float]:
    """Returns what distinguishes a mixture from its network, and its experts from each other.

    Gate mass is that of a token's chosen experts, before their weights are renormalised.

    Returns:
      relative_error: |mixture - network|^2 / |network|^2.
      usage_entropy: of the gate mass over the experts, by topic, over ln E; 1 if all are used alike.
      usage_gini: of the same, 0 if all are used alike.
      best_quarter: share of a topic's gate mass in the quarter of the experts that has the most of it.
      overlap: Jaccard index of those quarters, mean over pairs of topics.
    """
    wanted, masses = output(network, jnp.asarray(inputs)), []
    found, gates, weight = mix(mixture, jnp.asarray(inputs), top_k, scale)
    error, norm = float(jnp.sum((found - wanted) ** 2)), float(jnp.sum(wanted**2))
    mass_ne = np.asarray(gates * (weight > 0), np.float64)
    for name in sorted(set(topic.tolist())):
        mass = mass_ne[topic == name].sum(0)
        masses.append(mass / mass.sum())
    count = len(masses[0])
    quarter = max(1, count // 4)
    best = [set(np.argsort(-mass)[:quarter].tolist()) for mass in masses]
    pairs = [(a, b) for i, a in enumerate(best) for b in best[:i]]
    rising = np.sort(np.stack(masses), axis=1)
    rank = np.arange(1, count + 1)
    entropy = -np.sum(rising * np.log(np.maximum(rising, 1e-300)), axis=1) / np.log(count)
    return dict(
        relative_error=error / norm,
        usage_entropy=float(entropy.mean()),
        usage_gini=float(np.mean(rising @ (2 * rank - count - 1) / count)),
        best_quarter=float(rising[:, -quarter:].sum(1).mean()),
        overlap=float(np.mean([len(a & b) / len(a | b) for a, b in pairs])) if pairs else 1.0,
    )


def replace_leaves(tree: Any, start: dict, prefix: str = "", base: str = "float32") -> Any:
    """Returns nested dicts of arrays with those leaves that a start has, each where it was.

    Args:
      prefix: of the leaves' paths in the start.
      base: how they are kept, see `models.frozen`; the tree is consumed unless this is float32.
    """
    wanted = traverse_util.flatten_dict(start, sep="/")
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="/"))
    for path, leaf in leaves.items():
        if (value := wanted.get(prefix + path)) is not None:
            if base != "float32":
                leaves[path] = place_leaf(tuple(path.split("/")), leaf, value, base)
                continue
            stored = isinstance(value, StoredParam)
            leaves[path] = value.place(leaf.sharding) if stored else jax.device_put(value, leaf.sharding)
    return traverse_util.unflatten_dict(leaves, sep="/")


def replace_params(params: Params, start: dict) -> Params:
    """Returns parameters with those leaves that a start has, see `replace_leaves`."""
    experts = replace_leaves(params.experts, start, "experts/")
    return Params(experts, *(replace_leaves(tree, start) for tree in (params.router, params.shared)))
