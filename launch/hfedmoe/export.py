"""The fine-tuned model as directories of the Hugging Face hub: whole, and as adapters in PEFT's format."""

import pathlib
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from hfedmoe_jax import Experiment
from hfedmoe_jax.evaluation import Snapshot
from hfedmoe_jax.models import Params, merge_params
from hfedmoe_jax.models.adapter_files import write_adapters
from hfedmoe_jax.models.lora import FACTORS, adapter_pairs, lora_rule, matrix_path
from hfedmoe_jax.models.names import export_params, part_of, read_config
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.pretrained import find_source

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
          "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip
"""Files of the source that a fine-tuned model keeps."""


def can_export(experiment: Experiment) -> bool:
    """Whether the hub has the model's architecture, and all clients share one model."""
    return getattr(experiment.model.module, "names", None) is not None and not experiment.algorithm.personal


def export_model(experiment: Experiment, model: Snapshot, directory: pathlib.Path) -> None:
    """Writes config, weights in the source's type, and the tokenizer; `transformers` loads the directory.

    Adapters are added to the checkpoint's own matrices, whatever `model.base` kept of them.

    Args:
      model: as it is used.
      directory: replaced, whole or not at all.
    """
    source = find_source(experiment.config.model.source)
    kind = next(iter(find_tensors(source).values())).dtype
    with Replacement(directory) as fresh:
        names, config = experiment.model.module.names(), read_config(source)
        export_params(fresh, names, merged(experiment, model), config, np.dtype(kind))
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, fresh / name)


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
        low = np.float32(self.scale) * (self.a[index] @ self.b[index])
        return part_of(self.base, index) + self.added[index] + low


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
