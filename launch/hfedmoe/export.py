"""The fine-tuned model as a directory of the Hugging Face hub."""

import pathlib
import shutil
from typing import Any

import numpy as np

from hfedmoe_jax import Experiment
from hfedmoe_jax.models import merge_params
from hfedmoe_jax.models.names import export_params, read_config
from hfedmoe_jax.models.tensor_files import find_tensors
from hfedmoe_jax.pretrained import find_source

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
          "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip
"""Files of the source that a fine-tuned model keeps."""


def can_export(experiment: Experiment) -> bool:
    """Whether the hub has the model's architecture, and all clients share one model."""
    return getattr(experiment.model.module, "names", None) is not None and not experiment.algorithm.personal


def export_model(experiment: Experiment, params: Any, directory: pathlib.Path) -> None:
    """Writes config, weights in the source's type, and the tokenizer; `transformers` loads the directory.

    Args:
      params: `Params` of the model.
      directory: replaced, whole or not at all.
    """
    source = find_source(experiment.config.model.source)
    variables = merge_params(params.router, params.shared, experiment.frozen, {"experts": params.experts})
    kind = next(iter(find_tensors(source).values())).dtype
    fresh = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    export_params(fresh, experiment.model.module.names(), variables, read_config(source), np.dtype(kind))
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, fresh / name)
    shutil.rmtree(directory, ignore_errors=True)
    fresh.replace(directory)
