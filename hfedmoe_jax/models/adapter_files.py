"""Adapters as PEFT 0.21 keeps them: adapter_config.json and one safetensors file.

A matrix of the checkpoint named "m.weight" has its factors in "base_model.model.m.lora_A.weight" [R, D] and
"...lora_B.weight" [F, R]; experts are modules of their own, as the checkpoints of transformers 4 have them.
Routers are whole, under "modules_to_save".
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.lora import FACTORS, LoraRule
from hfedmoe_jax.models.names import Name, export_params, open_params
from hfedmoe_jax.models.params import Params, merge_params
from hfedmoe_jax.models.tensor_files import ADAPTERS, SINGLE

CONFIG = "adapter_config.json"
BASE = "hfedmoe_base"
"""In the config: the digest of what the adapters belong to."""


def adapter_names(names: Sequence[Name]) -> list[Name]:
    """Returns the names of factors and routers, by the names of the module's parameters."""
    chosen: dict[str, Name] = {}
    for name in names:  # of alternatives that of single experts, else the newest
        if name.path not in chosen or not name.path.startswith("experts/"):
            chosen[name.path] = name
    found = []
    for path, name in chosen.items():
        module = f"base_model.model.{name.tensor.removesuffix('.weight')}"
        found.append(name._replace(tensor=f"{module}.weight"))
        for factor, stored in zip(FACTORS, ("lora_A", "lora_B"), strict=True):
            target = f"{path.removesuffix('/kernel')}/{factor}"
            found.append(name._replace(path=target, tensor=f"{module}.{stored}.weight", transposed=True))
    return found


def sent_params(params: Params) -> dict:
    """Returns what an adapter directory holds of parameters or their shapes: factors and routers' kernels."""
    leaves = traverse_util.flatten_dict(merge_params(params.router, params.shared))
    kept = {
        path: leaf for path, leaf in leaves.items()
        if path[-1] in FACTORS or ("router" in path and path[-1] == "kernel")
    }  # fmt: skip
    return {**traverse_util.unflatten_dict(kept), "experts": params.experts}


def write_adapters(
    directory: str | os.PathLike,
    names: Sequence[Name],
    params: Params,
    rule: LoraRule,
    base: str,
    digest: str,
    task: str = "CAUSAL_LM",
) -> None:
    """Writes the adapters of a model, with its routers.

    Args:
      names: of the module's parameters.
      base, digest: name and digest of the checkpoint.
      task: as PEFT names it.
    """
    directory, known = pathlib.Path(directory), adapter_names(names)
    leaves = traverse_util.flatten_dict(sent_params(params), sep="/")
    modules = {name.path: name.tensor.split(".")[-3 if "lora" in name.path else -2] for name in known}
    targets = sorted({modules[path] for path in leaves if path.endswith(FACTORS[0])})
    saved = sorted({modules[path] for path in leaves if path.endswith("kernel")})
    content = dict(
        peft_type="LORA", task_type=task, base_model_name_or_path=base, r=rule.rank,
        lora_alpha=rule.scale * rule.rank, lora_dropout=0.0, bias="none", inference_mode=True,
        target_modules=targets, modules_to_save=saved or None,
    )  # fmt: skip
    export_params(directory, known, sent_params(params), content | {BASE: digest}, shard_bytes=2**62)
    (directory / SINGLE).rename(directory / ADAPTERS)
    (directory / "config.json").rename(directory / CONFIG)


def open_adapters(
    directory: str | os.PathLike, names: Sequence[Name], shapes: Params, rule: LoraRule, digest: str
) -> dict[str, Any]:
    """Returns factors and routers of a directory, nested dicts of `StoredParam`.

    Args:
      names: of the module's parameters.
      shapes: of the model's.
      digest: of the checkpoint that the model starts from.

    Raises:
      InputError: they are of another rank, scale or base, or tensors are missing, unknown or of another
        shape.
    """
    config = _read_config(directory)
    wanted = {"r": rule.rank, "lora_alpha": rule.scale * rule.rank, "peft_type": "LORA"}
    for key, value in wanted.items():
        if config.get(key) != value:
            fields = {"r": "model.lora_rank", "lora_alpha": "model.lora_alpha"}
            problem = f"has {key}={config.get(key)!r}, the run {value!r}"
            remedy = f"set {fields[key]}" if key in fields else "use adapters of LoRA"
            raise InputError("model.adapters", str(directory), problem, remedy)
    if (config.get(BASE) or digest) != digest:
        known = config.get("base_model_name_or_path")
        problem = f"belongs to another base ({known})"
        raise InputError("model.adapters", str(directory), problem, "use the model.source it was trained on")
    try:
        return open_params(directory, adapter_names(names), sent_params(shapes))
    except InputError as error:
        raise InputError(
            "model.adapters", str(directory), error.problem, "use adapters of this model"
        ) from None


def adapters_digest(directory: str | os.PathLike) -> str:
    """Returns a SHA-256 of a directory's adapters."""
    hashed = hashlib.sha256()
    for name in (CONFIG, ADAPTERS):
        hashed.update((pathlib.Path(directory) / name).read_bytes())
    return hashed.hexdigest()[:32]


def _read_config(directory: str | os.PathLike) -> Mapping[str, Any]:
    try:
        content = json.loads((pathlib.Path(directory) / CONFIG).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content
    except (OSError, ValueError, AssertionError, RecursionError):
        problem, remedy = f"has no {CONFIG} that can be read", "name a directory of adapters"
        raise InputError("model.adapters", str(directory), problem, remedy) from None
