"""Adapters as PEFT 0.21 keeps them for models of transformers 5: adapter_config.json and a safetensors file.

A module "m" has its factors in "base_model.model.m.lora_A.weight" [R, D] and "...lora_B.weight" [F, R]. Where
a model has the experts of a layer in one parameter, they are `target_parameters`, with the factors of all
experts in one matrix: A [E, P R, D] and B [P F, P R, E], flattened to two axes. Of the P matrices that are
fused (gate and up, or down alone) each keeps its own R ranks, so a B is zero off the diagonal of its blocks.
Experts that are modules of their own, as transformers 4 has them all, are read too. Routers are whole, under
"modules_to_save".

Axes: R rank, D inputs, F outputs, E experts, P parts.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models.lora import FACTORS, LoraRule
from hfedmoe_jax.models.names import Layout, Name, choose_names, export_params, open_params, tensors_of
from hfedmoe_jax.models.params import Params, merge_params
from hfedmoe_jax.models.tensor_files import ADAPTERS, ADAPTERS_CONFIG, SINGLE, find_tensors

BASE = "hfedmoe_base"
"""In the config: the digest of what the adapters belong to."""
WRAPPERS = {"gate_up_proj": ".base_layer", "down_proj": ""}
"""Under which name PEFT wraps the module of a fused parameter: its first parameter lies innermost."""
VARIANTS = ("use_rslora", "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config",
            "layer_replication")  # fmt: skip
"""Fields of PEFT's config that change what adapters add, or where."""
LEADING = "base_model.model."


def adapter_names(names: Sequence[Name]) -> list[Name]:
    """Returns the names of factors and routers, by the names of the module's parameters.

    Of alternatives the newest, which comes last among `names`, is the first.
    """
    found = []
    for name in reversed(names):
        module, _, parameter = name.tensor.rpartition(".")
        fused = is_fused(name)
        if fused:
            module += WRAPPERS[parameter]
        else:
            found.append(name._replace(tensor=LEADING + name.tensor))
        for factor, stored in zip(FACTORS, ("lora_A", "lora_B"), strict=True):
            path = f"{name.path.removesuffix('/kernel')}/{factor}"
            tensor = f"{LEADING}{module}.{stored}.weight"
            layout = fused_layout(factor, *name.part) if fused else None
            found.append(name._replace(path=path, tensor=tensor, transposed=True, layout=layout))
    return found


def is_fused(name: Name) -> bool:
    """Says whether a tensor holds all experts of a layer."""
    return name.path.startswith("experts/") and "{expert}" not in name.tensor


def fused_layout(factor: str, which: int, parts: int) -> Layout:
    """Returns how the factors [E, D, R] or [E, R, F] of all experts lie in one matrix of PEFT.

    Args:
      factor: of `FACTORS`.
      which: of the P parts.
      parts: P.
    """
    if factor == FACTORS[0]:

        def shape_a(shape: Sequence[int]) -> tuple[int, ...]:
            experts, inputs, rank = shape
            return (experts * parts * rank, inputs)

        def view_a(tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
            experts, inputs, rank = shape
            return tensor.reshape(experts, parts, rank, inputs)[:, which].transpose(0, 2, 1)

        return Layout(shape_a, view_a)

    def shape_b(shape: Sequence[int]) -> tuple[int, ...]:
        experts, rank, outputs = shape
        return (parts * outputs, parts * rank * experts)

    def view_b(tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return blocks_of(tensor, shape, parts)[which, :, which].transpose(2, 1, 0)

    return Layout(shape_b, view_b)


def blocks_of(tensor: np.ndarray, shape: Sequence[int], parts: int) -> np.ndarray:
    """Returns a B of fused parameters as [P, F, P, R, E].

    Args:
      tensor: [P F, P R E].
      shape: (E, R, F).
      parts: P.
    """
    experts, rank, outputs = shape
    return tensor.reshape(parts, outputs, parts, rank, experts)


def sent_params(params: Params) -> dict:
    """Returns what an adapter directory holds of parameters or their shapes: factors and routers."""
    leaves = traverse_util.flatten_dict(merge_params(params.router, params.shared))
    kept = {path: leaf for path, leaf in leaves.items() if path[-1] in FACTORS or "router" in path}
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
    directory, sent = pathlib.Path(directory), sent_params(params)
    content = dict(
        peft_type="LORA", task_type=task, base_model_name_or_path=base, r=rule.rank,
        lora_alpha=rule.scale * rule.rank, lora_dropout=0.0, bias="none", inference_mode=True,
        **targets(names, traverse_util.flatten_dict(sent, sep="/"), rule),
    )  # fmt: skip
    export_params(directory, adapter_names(names), sent, content | {BASE: digest}, shard_bytes=2**62)
    (directory / SINGLE).rename(directory / ADAPTERS)
    (directory / "config.json").rename(directory / ADAPTERS_CONFIG)


def targets(names: Sequence[Name], leaves: Mapping[str, Any], rule: LoraRule) -> dict[str, Any]:
    """Returns the fields of PEFT's config that say which modules and parameters are adapted or whole.

    Args:
      names: of the module's parameters.
      leaves: factors and routers by path.
    """
    newest = {name.path: name for name in names}
    modules: set[str] = set()
    parameters: dict[str, int] = {}
    whole: set[str] = set()
    for path, leaf in leaves.items():
        matrix, _, last = path.rpartition("/")
        if last == FACTORS[1]:
            continue
        name = newest[path if last != FACTORS[0] else matrix if matrix in newest else f"{matrix}/kernel"]
        ending = name.tensor.split("{layer}.")[-1]
        module = ending.rpartition(".")[0]
        if last != FACTORS[0]:
            whole.add(module)
        elif is_fused(name):
            parameters[ending] = name.part[1]
        else:
            count = leaf.shape[1] if "{expert}" in module else 1
            modules |= {module.format(expert=expert) for expert in range(count)}
    fused = {parameter: parts for parameter, parts in sorted(parameters.items()) if parts > 1}
    return dict(
        target_modules=sorted(modules), target_parameters=sorted(parameters) or None,
        rank_pattern={parameter: parts * rule.rank for parameter, parts in fused.items()},
        alpha_pattern={parameter: parts * rule.scale * rule.rank for parameter, parts in fused.items()},
        modules_to_save=sorted(whole) or None,
    )  # fmt: skip


def open_adapters(
    directory: str | os.PathLike, names: Sequence[Name], shapes: Params, rule: LoraRule, digest: str
) -> dict[str, Any]:
    """Returns factors and routers of a directory, nested dicts of `StoredParam`.

    Args:
      names: of the module's parameters.
      shapes: of the model's.
      digest: of the checkpoint that the model starts from.

    Raises:
      InputError: they are of another rank, scale, kind or base, tensors are missing, unknown or of another
        shape, or the parts of a fused parameter share their factors.
    """
    config = read_adapter_config(directory)
    _check_rule(directory, config, rule)
    if (config.get(BASE) or digest) != digest:
        problem = f"belongs to another base ({config.get('base_model_name_or_path')})"
        raise InputError("model.adapters", str(directory), problem, "use the model.source it was trained on")
    try:
        opened = open_params(directory, adapter_names(names), sent_params(shapes))
    except InputError as error:
        remedy = "use adapters of this model"
        raise InputError("model.adapters", str(error.value), error.problem, remedy) from None
    _check_blocks(directory, names, shapes)
    return opened


def _check_rule(directory: str | os.PathLike, config: Mapping[str, Any], rule: LoraRule) -> None:
    """Raises an InputError unless the adapters are plain ones of this rank and scale."""

    def refuse(problem: str, remedy: str) -> None:
        raise InputError("model.adapters", str(directory), problem, remedy)

    if (kind := config.get("peft_type")) != "LORA":
        refuse(f"has peft_type={kind!r}, the run 'LORA'", "use adapters of LoRA")
    if (rank := config.get("r")) != rule.rank:
        refuse(f"has r={rank!r}, the run {rule.rank}", "set model.lora_rank")
    alpha, wanted = config.get("lora_alpha"), rule.scale * rule.rank
    if not isinstance(alpha, int | float) or not math.isclose(alpha, wanted, rel_tol=1e-9):
        refuse(f"has lora_alpha={alpha!r}, the run {wanted!r}", "set model.lora_alpha")
    for field in VARIANTS:
        if config.get(field):
            refuse(f"has {field}={config[field]!r}, which is not supported", "use adapters of plain LoRA")
    ranks, alphas = (config.get(field) or {} for field in ("rank_pattern", "alpha_pattern"))
    for pattern in {**ranks, **alphas}:
        above, below = alphas.get(pattern, alpha), ranks.get(pattern, rank)
        if not below or not math.isclose(above / below, rule.scale, rel_tol=1e-9):
            problem = f"scales {pattern} by {above} / {below}, the run by {rule.scale:g}"
            refuse(problem, "use adapters of one alpha / r")


def _check_blocks(directory: str | os.PathLike, names: Sequence[Name], shapes: Params) -> None:
    """Raises an InputError if a fused B is not zero off the diagonal of its blocks."""
    stored = find_tensors(directory)
    sent: dict[str, Any] = dict(traverse_util.flatten_dict(sent_params(shapes), sep="/"))
    for path, name in choose_names(adapter_names(names), stored).items():
        if name.layout is None or name.part[1] == 1 or not path.endswith(FACTORS[1]) or path not in sent:
            continue
        shape, (which, parts) = sent[path].shape, name.part
        for tensor in tensors_of(name, shape).values():
            blocks = blocks_of(stored[tensor].read(), shape[1:], parts)[which]
            if np.any(np.delete(blocks, which, axis=1)):
                problem = f"{tensor} has ranks that several of its {parts} matrices share"
                raise InputError(
                    "model.adapters", str(directory), problem, "use adapters with ranks of each matrix alone"
                )


def adapters_digest(directory: str | os.PathLike) -> str:
    """Returns a SHA-256 of a directory's adapters."""
    hashed = hashlib.sha256()
    for name in (ADAPTERS_CONFIG, ADAPTERS):
        hashed.update((pathlib.Path(directory) / name).read_bytes())
    return hashed.hexdigest()[:32]


def read_adapter_config(directory: str | os.PathLike) -> Mapping[str, Any]:
    """Returns the content of a directory's adapter_config.json.

    Raises:
      InputError: there is none, or it is no JSON object.
    """
    try:
        content = json.loads((pathlib.Path(directory) / ADAPTERS_CONFIG).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content
    except (OSError, ValueError, AssertionError, RecursionError):
        problem, remedy = f"has no {ADAPTERS_CONFIG} that can be read", "name a directory of adapters"
        raise InputError("model.adapters", str(directory), problem, remedy) from None
