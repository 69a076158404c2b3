"""The parameters that a run starts from: a checkpoint, its last networks made mixtures of experts.

Mixtures are made once, on public text (BBC News, which no client owns as such), and kept on disk; runs of
the same checkpoint and settings share them.

Axes: L layers with experts, E experts, Q topics.
"""

import hashlib
import itertools
import json
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import hfedmoe_jax.btx  # noqa: F401  # registers its method
from hfedmoe_jax.data.sources import bbc_news
from hfedmoe_jax.data.tokenizers import encode_passages, load_tokenizer
from hfedmoe_jax.models.names import is_stored
from hfedmoe_jax.models.tensor_files import NewTensor, find_tensors, write_tensors
from hfedmoe_jax.pretrained import cache_root, find_source
from hfedmoe_jax.specialisation import by_kind, figures, gate_mass
from hfedmoe_jax.upcycling import DenseModel, Mixture, Network, mix, output, stack, upcyclings

TEXTS, HELD_OUT, TOKENS = 512, 128, 128  # public articles, those of them that only judge, and tokens of each
LOSS_TEXTS = 32  # texts of a batch whose loss is judged
SEED = 0  # of what chance decides in a mixture; runs of other seeds share it
REPORT = "report.json"
ROUTER = ("router_de", "router_e")
VERSION = "3"  # of what this module makes of the same settings


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
        the first of these layers and the networks; `assemble(params, mixtures)`, its own parameters;
        `network_loss` and `mixture_loss`, and how these are to be used: `text_parts`, rows a text, and
        `step_texts`, texts of a batch.

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
    """Returns a SHA-256 of a checkpoint's tensors, however they lie in files.

    Where mixtures are made of it, also of the settings that they depend on.
    """
    hashed = hashlib.sha256()
    if hasattr(module, "networks"):
        settings = (VERSION, config.upcycling, module.num_layers, module.num_experts, module.top_k)
        hashed.update(repr(settings).encode())
    for name, tensor in sorted(find_tensors(directory).items()):
        hashed.update(repr((name, tensor.dtype.name, tensor.shape)).encode())
        hashed.update(tensor.read().reshape(-1).view(np.uint8).data)
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
    """Returns mixtures with a leading axis L, and how good they are on held-out text, see `judge`.

    The report also has `loss` and `dense_loss`, of the whole model by `module.mixture_loss` and
    `module.network_loss`; in the former experts have room for every token.
    """
    rng = np.random.default_rng(SEED)
    articles = bbc_news()
    chosen = rng.permutation(len(articles.texts))[:TEXTS]
    parts = module.text_parts
    texts = [part for i in chosen for part in cut_text(articles.texts[i], parts)]
    topics = np.repeat(np.array([articles.labels[i] for i in chosen]), parts)
    length = min(TOKENS // parts, module.shape.positions)
    tokens, _ = encode_passages(load_tokenizer(directory), texts, length, "truncate")
    networks = module.networks(dense)
    dense = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), dense, is_leaf=is_stored)
    read = [module.inputs(dense, tokens[start : start + 64]) for start in range(0, len(tokens), 64)]
    features_rtd = np.concatenate([np.asarray(features) for features, _ in read])
    inputs_lrtd = np.concatenate([np.asarray(inputs) for _, inputs in read], axis=1)
    seen = slice(0, len(tokens) - HELD_OUT * parts)
    held = slice(seen.stop, None)
    real = tokens != 0
    model = DenseModel(module, dense, networks, inputs_lrtd[:, seen][:, real[seen]], features_rtd[seen],
                       tokens[seen], rng)  # fmt: skip
    mixtures = make(model)
    topic = np.broadcast_to(topics[:, None], tokens.shape)[held][real[held]]
    inputs_lnd = inputs_lrtd[:, held][:, real[held]]
    judged = [
        judge(jax.tree.map(lambda part: part[i], mixtures), network, inputs_lnd[i], topic, module.rule.scale,  # noqa: B023
              module.top_k)
        for i, network in enumerate(networks)
    ]  # fmt: skip
    report = jax.tree.map(lambda *layers: float(np.mean(layers)), *judged)
    return mixtures, report | losses(model, mixtures, features_rtd[held], tokens[held])


def cut_text(text: str, parts: int) -> list[str]:
    """Returns so many parts of a text, alike in words."""
    words = text.split(" ")
    edges = [len(words) * part // parts for part in range(parts + 1)]
    return [" ".join(words[begin:end]) for begin, end in itertools.pairwise(edges)]


def losses(dense: DenseModel, mixtures: Mixture, features_rtd: Any, tokens_rt: Any) -> dict[str, float]:
    """Returns `loss` of the mixtures and `dense_loss` of the dense model, means over batches of texts."""
    module, rows = dense.module, min(LOSS_TEXTS * dense.module.text_parts, len(tokens_rt))
    room = module.num_experts / module.top_k
    # The dense networks are an argument: as a constant of the program they would be compiled into it.
    mixed = jax.jit(lambda *arrays: module.mixture_loss(*arrays, room)[0])
    plain, networks = jax.jit(module.network_loss), stack(dense.networks)
    found = []
    for begin in range(0, len(tokens_rt) - rows + 1, rows):
        batch = features_rtd[begin : begin + rows], tokens_rt[begin : begin + rows]
        found.append((mixed(dense.params, mixtures, *batch), plain(dense.params, networks, *batch)))
    loss, dense_loss = np.mean(np.asarray(found, np.float64), axis=0)
    return dict(loss=float(loss), dense_loss=float(dense_loss))


def judge(
    mixture: Mixture, network: Network, inputs: np.ndarray, topic: np.ndarray, scale: float, top_k: int
) -> dict[str, Any]:
    """Returns what distinguishes a mixture from its network, and its experts from each other.

    Gate mass is that of a token's chosen experts, before their weights are renormalised.

    Returns:
      `relative_error`, |mixture - network|^2 / |network|^2, the `figures` of `specialisation`, means over
      topics, and `by_topic` those of each.
    """
    wanted = output(network, jnp.asarray(inputs))
    found, gates, _ = mix(mixture, jnp.asarray(inputs), top_k, scale)
    error, norm = float(jnp.sum((found - wanted) ** 2)), float(jnp.sum(wanted**2))
    gate_nk, expert_nk = (np.asarray(part) for part in jax.lax.top_k(gates, top_k))
    mass_qe = gate_mass(expert_nk, gate_nk, topic, gates.shape[-1])
    return dict(relative_error=error / norm, by_topic=by_topic(mass_qe, topic)) | figures(mass_qe)


def by_topic(mass_qe: np.ndarray, topic: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns the figures of each topic, without those of pairs."""
    found = by_kind(mass_qe)
    found.pop("overlap")
    return {
        str(name): {figure: float(each[row]) for figure, each in found.items()}
        for row, name in enumerate(np.unique(topic))
    }
