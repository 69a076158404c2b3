"""Reads and writes scenario files and allocation files (JSON).

A scenario holds the spectrum, the models and the users; a file of it or its content as a dict:

>>> from slide_jax.scenario import read_scenario
>>> problem = read_scenario({
...     "bandwidth_hz": 1e8,
...     "models": [{"name": "small", "task": "vision", "accuracy": 0.7,
...                 "layers": [{"bits": 3e5, "flop": 2e8}]},
...                {"name": "large", "task": "vision", "accuracy": 0.8,
...                 "layers": [{"bits": 3e5, "flop": 2e8}, {"bits": 6e5, "flop": 9e8}]}],
...     "users": [{"task": "vision", "deadline_s": 2.0, "spectral_efficiency_bps_hz": 4.2,
...                "device": {"f_min_hz": 3e8, "f_max_hz": 1.3e9, "flop_per_cycle": 2048}}]})
>>> problem.labels.models, problem.num_users, float(problem.users.energy_j[0])
(('small', 'large'), 1, inf)

What may be left out, and its default:

    rate_model                           "linear"; the other is "shannon"
    users[k].id                          "u<k>"
    users[k].start_s, min_accuracy       0
    users[k].energy_j                    null: no limit
    users[k].models                      every model of `task` that reaches `min_accuracy`; a list of
                                         names stands instead: beside it `min_accuracy` is refused
    users[k].spectral_efficiency_bps_hz  0 under "shannon"; required under "linear"
    users[k].snr_hz                      0 under "linear"; required under "shannon"
    users[k].device.static_power_w       0
    users[k].device.memory_bits          null: no limit
    users[k].device.kappa_j_per_hz2_cycle  0 for a user without energy_j; otherwise required

Everything else is required; a key of any other name, a key given twice, and a number that is neither 0 nor
from 1e-60 to 1e30 are refused.
Every mistake is an `InputError` with its JSON path, e.g. `users[3].device.f_min_hz`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slide_jax.checks import (
    EXAMPLES,
    MISSING,
    NUMBERS,
    UNLIMITED,
    checked_problem,
    first_repeated,
    fits_task,
    make_problem,
    numbers,
    read_models,
    require_list,
    require_objects,
    require_texts,
    shown,
)
from slide_jax.errors import InputError, unknown_name
from slide_jax.problem import RATE_MODELS, REASONS, Allocation, Labels, Problem, Users

__all__ = ["make_problem", "read_allocation", "read_scenario", "write_allocation", "write_scenario"]

DEVICE = (
    "f_min_hz",
    "f_max_hz",
    "flop_per_cycle",
    "kappa_j_per_hz2_cycle",
    "static_power_w",
    "memory_bits",
)
"""The numbers of a user that stand under its device."""

DEFAULTS = {
    "min_accuracy": 0.0,
    "start_s": 0.0,
    "energy_j": None,
    "kappa_j_per_hz2_cycle": 0.0,
    "static_power_w": 0.0,
    "memory_bits": None,
}
RESULTS = ("bandwidth_hz", "frequency_hz", "latency_s", "energy_j")


def read_scenario(source: str | os.PathLike | Mapping) -> Problem:
    """Returns the problem that a scenario file, or its content as a dict, states.

    Raises:
      InputError: what is wrong, with its JSON path, e.g. `users[3].device.f_min_hz`.
    """
    scenario = _load(source, "scenario", ("bandwidth_hz", "rate_model", "models", "users"))
    catalogue, labels = read_models(scenario.get("models", MISSING), None)
    rate_model = scenario.get("rate_model", "linear")
    if rate_model not in RATE_MODELS:
        raise unknown_name("rate_model", shown(rate_model), RATE_MODELS)
    users, ids = _read_users(scenario.get("users", MISSING), labels, rate_model)
    bandwidth_hz = scenario.get("bandwidth_hz", MISSING)
    labels = dataclasses.replace(labels, users=ids)
    return checked_problem(catalogue, users, bandwidth_hz, rate_model, labels, _user_path)


def write_scenario(problem: Problem, path: str | os.PathLike) -> None:
    """Writes the scenario file that `read_scenario` takes for this problem, one user a line.

    Users whose models no task and accuracy describe list them.
    """
    catalogue, users, names = problem.catalogue, problem.users, _model_names(problem)
    tasks = problem.labels.tasks or [f"t{j}" for j in range(int(np.max(catalogue.task)) + 1)]
    columns = zip(names, catalogue.num_layers, catalogue.task, catalogue.accuracy, strict=True)
    models = [
        {
            "name": name,
            "task": tasks[task],
            "accuracy": float(accuracy),
            "layers": [
                {"bits": float(bits), "flop": float(flop)}
                for bits, flop in zip(
                    catalogue.layer_bits[i, :size], catalogue.layer_flop[i, :size], strict=True
                )
            ],
        }
        for i, (name, size, task, accuracy) in enumerate(columns)
    ]
    fits = fits_task(catalogue, users)
    allowed = fits if users.allowed is None else np.asarray(users.allowed)
    listed = ~np.isin(users.task, catalogue.task) | (allowed != fits).any(axis=1)
    values = {name: _or_null(getattr(users, name)) for name in NUMBERS}

    def row(k: int) -> dict:
        user: dict[str, Any] = {} if problem.labels.users is None else {"id": problem.labels.users[k]}
        if listed[k]:
            user["models"] = [names[i] for i in np.flatnonzero(allowed[k]).tolist()]
        else:
            user |= {"task": tasks[users.task[k]], "min_accuracy": values["min_accuracy"][k]}
        user |= {name: values[name][k] for name in NUMBERS if name not in (*DEVICE, "min_accuracy")}
        return user | {"device": {name: values[name][k] for name in DEVICE}}

    head = {"bandwidth_hz": float(problem.bandwidth_hz), "rate_model": problem.rate_model}
    _write(path, head, {"models": models, "users": map(row, range(problem.num_users))})


def write_allocation(problem: Problem, allocation: Allocation, path: str | os.PathLike) -> None:
    """Writes an answer as JSON: the totals, then one user a line."""
    names, solve_s, bound = _model_names(problem), float(allocation.solve_s), float(allocation.upper_bound)
    head = {
        "throughput": allocation.throughput,
        "bandwidth_used_hz": _or_null(allocation.bandwidth_used_hz),
        "solver": allocation.solver,
        "solve_s": _or_null(solve_s),
    }
    if not np.isnan(bound):
        head["upper_bound"] = bound
    columns = zip(
        _user_ids(problem),
        np.asarray(allocation.model).tolist(),
        *(_or_null(getattr(allocation, name)) for name in RESULTS),
        np.asarray(allocation.reason).tolist(),
        strict=True,
    )
    rows = (
        {
            "id": user,
            "served": model >= 0,
            "model": names[model] if model >= 0 else None,
            **dict(zip(RESULTS, results, strict=True)),
            "reason": REASONS[reason] if reason else None,
        }
        for user, model, *results, reason in columns
    )
    _write(path, head, {"users": rows})


def read_allocation(problem: Problem, path: str | os.PathLike) -> Allocation:
    """Returns an answer to this problem, e.g. one that was edited and is to be verified.

    Raises:
      InputError: not an answer to this problem, or at odds with itself, with the JSON path. Whether
        the numbers keep the constraints is left to `verify`.
    """
    head = ("throughput", "bandwidth_used_hz", "solver", "solve_s", "upper_bound", "users")
    answer = _load(path, "allocation", head)
    rows = answer.get("users", MISSING)
    require_list(rows, "users")
    require_objects(rows, ("id", "served", "model", "reason", *RESULTS), lambda k: f"users[{k}]")
    ids = _user_ids(problem)
    if [row.get("id") for row in rows] != list(ids):
        remedy = f"keep the {len(ids)} users of the scenario in their order"
        raise InputError("users", f"<{len(rows)} users>", "are not those of the scenario", remedy)

    def index(key: str, names: Sequence[str], null: int) -> np.ndarray:
        column = [row.get(key, MISSING) for row in rows]
        require_texts(column, lambda k: f"users[{k}].{key}", optional=True)
        codes = {None: null} | {name: code for code, name in enumerate(names)}
        for k, name in enumerate(column):
            if name not in codes:
                raise unknown_name(f"users[{k}].{key}", name, names)
        return np.array([codes[name] for name in column], np.int32)

    def results(objects: Sequence[Mapping], key: str, prefix: str) -> np.ndarray:
        column = [item.get(key, MISSING) for item in objects]
        column = [np.nan if value is None else value for value in column]
        return numbers(column, key, lambda k: prefix.format(k) + key)

    allocation = Allocation(
        model=index("model", _model_names(problem), -1),
        **{name: results(rows, name, "users[{}].") for name in RESULTS},
        reason=index("reason", REASONS, 0),
        upper_bound=results([{"upper_bound": None, **answer}], "upper_bound", "").item(),
        solve_s=results([answer], "solve_s", "").item(),
        solver=str(answer.get("solver", "")),
    )
    for k, (row, served) in enumerate(zip(rows, allocation.served.tolist(), strict=True)):
        if row.get("served") is not served:
            conflict = f"at odds with model={row['model']!r}"
            raise InputError(
                f"users[{k}].served", shown(row.get("served")), conflict, f"give {json.dumps(served)}"
            )
    for name in ("throughput", "bandwidth_used_hz"):
        total = results([answer], name, "").item()
        counted = getattr(allocation, name)
        if not np.isclose(total, counted, rtol=1e-9, atol=0, equal_nan=True):
            raise InputError(name, total, f"the users add up to {counted!r}", "give their sum")
    return allocation


def _read_users(users: Any, labels: Labels, rate_model: str) -> tuple[Users, tuple[str, ...] | None]:
    """Returns the users column by column, and their ids if any has one."""
    require_list(users, "users")
    own = [name for name in NUMBERS if name not in DEVICE]
    require_objects(users, ("id", "task", "models", "device", *own), lambda k: f"users[{k}]")
    devices = [user.get("device", MISSING) for user in users]
    require_objects(devices, DEVICE, lambda k: f"users[{k}].device")

    defaults = DEFAULTS | {"snr_hz" if rate_model == "linear" else "spectral_efficiency_bps_hz": 0.0}
    columns = {}
    for name in NUMBERS:
        default = defaults.get(name, MISSING)
        column = [item.get(name, default) for item in (devices if name in DEVICE else users)]
        if name in UNLIMITED:
            for k, value in enumerate(column):
                if type(value) is float and value == np.inf:
                    remedy = "leave it out or give null for no limit"
                    raise InputError(_user_path(name, k), value, "must be finite", remedy)
            column = [np.inf if value is None else value for value in column]
        columns[name] = numbers(column, name, lambda k, name=name: _user_path(name, k))
    kappa = "kappa_j_per_hz2_cycle"
    for k in np.flatnonzero(np.isfinite(columns["energy_j"])).tolist():
        if kappa not in devices[k]:
            remedy = f"energy_j needs it: give {EXAMPLES[kappa]}"
            raise InputError(_user_path(kappa, k), None, "is missing", remedy)

    allowed, by_name = _read_models_of([user.get("models") for user in users], labels.models)
    for k in np.flatnonzero(by_name).tolist():
        if "min_accuracy" in users[k]:
            problem, remedy = "has no effect beside `models`", "leave out one of the two"
            raise InputError(f"users[{k}].min_accuracy", users[k]["min_accuracy"], problem, remedy)
    tasks = [user.get("task") for user in users]
    require_texts(tasks, lambda k: f"users[{k}].task", optional=True)
    codes = {None: -1} | {name: code for code, name in enumerate(labels.tasks)}
    task = np.array([codes.get(name, -2) for name in tasks], np.int32)
    wrong = (task == -2) | ((task == -1) & ~by_name)
    if wrong.any():
        k = int(np.argmax(wrong))
        if tasks[k] is None:
            raise InputError(f"users[{k}].task", None, "is missing", "name a task, or list `models`")
        raise unknown_name(f"users[{k}].task", tasks[k], labels.tasks)
    ids = None
    if any("id" in user for user in users):
        ids = tuple(user.get("id", f"u{k}") for k, user in enumerate(users))
        require_texts(ids, lambda k: f"users[{k}].id")
    task = np.where(by_name, np.int32(-1), task)
    columns["min_accuracy"] = np.where(by_name, 0.0, columns["min_accuracy"])
    return Users(task=task, **columns, allowed=allowed), ids


def _read_models_of(lists: Sequence, names: Sequence[str]) -> tuple[np.ndarray | None, np.ndarray]:
    """Returns which models each user allows, None if no user lists any, and which users do."""
    by_name = np.array([listed is not None for listed in lists], bool)
    if not by_name.any():
        return None, by_name
    allowed = np.ones((len(lists), len(names)), bool)
    allowed[by_name] = False
    codes = {name: code for code, name in enumerate(names)}
    for k in np.flatnonzero(by_name).tolist():
        place = f"users[{k}].models"
        require_list(lists[k], place)
        require_texts(lists[k], lambda j, place=place: f"{place}[{j}]")
        for j, name in enumerate(lists[k]):
            if name not in codes:
                raise unknown_name(f"{place}[{j}]", name, names)
            allowed[k, codes[name]] = True
    return allowed, by_name


def _user_path(name: str, k: int) -> str:
    return f"users[{k}].device.{name}" if name in DEVICE else f"users[{k}].{name}"


def _model_names(problem: Problem) -> Sequence[str]:
    return problem.labels.models or [f"m{i}" for i in range(problem.num_models)]


def _user_ids(problem: Problem) -> Sequence[str]:
    ids = problem.labels.users
    return [f"u{k}" for k in range(problem.num_users)] if ids is None else ids


def _load(source: str | os.PathLike | Mapping, what: str, known: Sequence[str]) -> Mapping:
    """Returns the object of a JSON file, or the one given, if all its keys are known."""
    content = source
    if isinstance(source, str | os.PathLike):
        try:
            content = _parse(pathlib.Path(source).read_bytes())
        except FileNotFoundError:
            raise InputError(what, str(source), "no such file", "give the path of a JSON file") from None
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise InputError(what, str(source), problem, "give the path of a JSON file") from None
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(what, str(source), f"is no JSON file ({error})", "mend or replace it") from None
    if not isinstance(content, Mapping):
        raise InputError(what, shown(content), "must be an object", f"give {{...}} of {', '.join(known)}")
    require_objects([content], known, lambda _: "")
    return content


def _parse(raw: bytes) -> Any:
    """Returns the content of a JSON file, or refuses an object that has a key twice."""
    repeated: list[tuple[dict, str]] = []

    def read_object(pairs: list[tuple[str, Any]]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.append((content, keys[first_repeated(keys)[0]]))
        return content

    content = json.loads(raw, object_pairs_hook=read_object)
    if repeated:
        # An object is read after those within it, so none that is around the last one lost it.
        where, key = repeated[-1]
        place = f"{_path_to(where, content)}.{key}".lstrip(".")
        raise InputError(place, shown(where[key]), "is given twice", "keep one of the two")
    return content


def _path_to(part: Any, content: Any) -> str | None:
    """Returns the JSON path of a part of the content; None: it is not there."""
    if content is part:
        return ""
    entries: Iterable[tuple[str, Any]] = ()
    if isinstance(content, dict):
        entries = ((f".{key}", value) for key, value in content.items())
    elif isinstance(content, list):
        entries = ((f"[{k}]", value) for k, value in enumerate(content))
    for step, value in entries:
        rest = _path_to(part, value)
        if rest is not None:
            return f"{step}{rest}"
    return None


def _write(path: str | os.PathLike, head: Mapping, lists: Mapping[str, Iterable[Mapping]]) -> None:
    """Writes one object to a file, one entry of each list a line, all or nothing."""
    encode = json.JSONEncoder(allow_nan=False).encode
    parts = [f"{encode(key)}: {encode(value)}" for key, value in head.items()]
    for key, rows in lists.items():
        parts.append(f"{encode(key)}: [\n" + ",\n".join(map(encode, rows)) + "\n]")
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("{" + ",\n".join(parts) + "}\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        problem = f"cannot be written ({error.strerror})"
        raise InputError("path", str(path), problem, "give a file in a directory that exists") from None


def _or_null(values: Any) -> Any:
    """Returns numbers as Python's own, None where they are not finite, which JSON cannot say."""
    values = np.asarray(values, np.float64)
    return np.asarray(np.where(np.isfinite(values), values, None)).tolist()
