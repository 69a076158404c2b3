"""The fine-tuned model as directories of the Hugging Face hub: whole, and as adapters in PEFT's format."""

import pathlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from hfedmoe_jax import Experiment
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models import Params, merge_params
from hfedmoe_jax.models.adapter_files import write_adapters
from hfedmoe_jax.models.lora import FACTORS, adapter_pairs, lora_rule, matrix_path
from hfedmoe_jax.models.names import choose_names, export_params, part_of, read_config
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.pretrained import find_source

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
          "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json",
          "chat_template.jinja")  # fmt: skip
"""Files of the source that a fine-tuned model keeps."""


def can_export(experiment: Experiment) -> bool:
    """Whether the hub has the model's architecture, and all clients share one model."""
    return getattr(experiment.model.module, "names", None) is not None and not experiment.algorithm.personal


def export_model(experiment: Experiment, model: Snapshot, directory: pathlib.Path) -> None:
    """Writes config, weights and tokenizer; `transformers` loads the directory.

    Tensors have the source's names, shapes and types. Adapters are added to the checkpoint's own matrices,
    whatever `model.base` kept of them.

    Args:
      model: as it is used.
      directory: replaced, whole or not at all.
    """
    source = find_source(experiment.config.model.source)
    stored, config = find_tensors(source), read_config(source)
    names = list(choose_names(experiment.model.module.names(), stored).values())
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    with Replacement(directory) as fresh:
        export_params(fresh, names, merged(experiment, model), config, dtypes)
        for path in kept_files(source, config):
            shutil.copyfile(path, fresh / path.name)


def kept_files(source: pathlib.Path, config: Mapping[str, Any]) -> list[pathlib.Path]:
    """Returns the files beside the weights that a loader of the fine-tuned model needs.

    Args:
      config: the content of config.json; with `auto_map` the model's code lies in the directory.
    """
    tokenizer = source / "tokenizer_config.json"
    coded = "auto_map" in config or (tokenizer.exists() and b'"auto_map"' in tokenizer.read_bytes())
    named = [source / name for name in COPIED if (source / name).exists()]
    return named + (sorted(source.glob("*.py")) if coded else [])


def merged(experiment: Experiment, model: Snapshot) -> dict[str, Any]:
    """Returns the parameters of the module, arrays or what is read as one when it is written."""
    params = model.params
    trained = merge_params(params.router, params.shared)
    rule = lora_rule(experiment.config.model)
    if rule is None:
        return merge_params(trained, experiment.frozen, {"experts": params.experts})
    start = experiment.start.params if experiment.start else {}
    leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(experiment.frozen))
    leaves |= {path: leaf for path, leaf in traverse_util.flatten_dict(start).items() if path in leaves}
    leaves |= {path: x for path, x in traverse_util.flatten_dict(trained).items() if path[-1] not in FACTORS}
    added = traverse_util.flatten_dict(model.added or {})
    for at, (a, b) in adapter_pairs(params.shared | {"experts": params.experts}).items():
        path = matrix_path(at)
        more = np.broadcast_to(np.asarray(added.get(path, 0), np.float32), leaves[path].shape)
        leaves[path] = Sum(leaves[path], np.asarray(a), np.asarray(b), rule.scale, more)
    return traverse_util.unflatten_dict(leaves)


@dataclass
class Sum:
    """A matrix [..., D, F] with its adapter, computed where it is indexed.

    Attributes:
      base: an array, or one that lies in a file.
      a, b, scale: see `LoraRule`.
      added: what its algorithm added to it, like it.
    """

    base: Any
    a: np.ndarray
    b: np.ndarray
    scale: float
    added: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Returns the matrix of one layer (and expert)."""
        base = part_of(self.base, index)
        more = self.added[index] + np.float32(self.scale) * (self.a[index] @ self.b[index])
        return base + more if np.any(more) else base  # adding 0 would change a -0


def export_adapters(experiment: Experiment, params: Params, directory: pathlib.Path) -> None:
    """Writes the adapters, with the routers, as PEFT reads them.

    Args:
      params: of a model with adapters.
      directory: replaced, whole or not at all.
    """
    model, start = experiment.config.model, experiment.start
    rule = lora_rule(model)
    assert rule is not None and start is not None
    module = experiment.model.module
    task = "SEQ_2_SEQ_LM" if module.output == "answer" else "CAUSAL_LM"
    with Replacement(directory) as fresh:
        write_adapters(fresh, module.names(), params, rule, model.source, start.digest, task)


class Replacement:
    """A directory that takes another's place when it is complete."""

    def __init__(self, directory: pathlib.Path):
        self._directory, self._fresh = directory, directory.with_name(directory.name + ".tmp")

    def __enter__(self) -> pathlib.Path:
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir(parents=True)
        return self._fresh

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._fresh.replace(self._directory)
