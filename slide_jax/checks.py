"""Validates the values of a problem.

`make_problem` takes arrays and `slide_jax.scenario.read_scenario` takes JSON; both end in `checked_problem`.
Each field is checked for all users at once, and the first invalid entry is searched for only if there is one,
so that a million users take seconds.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slide_jax.errors import InputError, unknown_name
from slide_jax.problem import RATE_MODELS, Catalogue, Labels, Problem, Users

MISSING = object()
"""Placeholder for a field that an object lacks."""

LEAST, LARGEST = 1e-60, 1e30
"""Every quantity of a real cell that is not 0 lies well between these; their products do not overflow."""

UNLIMITED = ("energy_j", "memory_bits")  # null in JSON, infinite in arrays: no limit
POSITIVE = ("f_max_hz", "flop_per_cycle")
SHARES = ("accuracy", "min_accuracy")
EXAMPLES = {
    "bandwidth_hz": "hertz, e.g. 1e8",
    "bits": "bits, e.g. 3e5",
    "flop": "FLOP, e.g. 2e8",
    "accuracy": "a share, e.g. 0.76",
    "min_accuracy": "a share, e.g. 0.7",
    "deadline_s": "seconds from time 0, e.g. 2.0",
    "start_s": "seconds from time 0, e.g. 0.0",
    "energy_j": "joules, e.g. 5.0",
    "spectral_efficiency_bps_hz": "bit/s/Hz, e.g. 4.2",
    "snr_hz": "received power over noise density in hertz, e.g. 3e9",
    "f_min_hz": "hertz, e.g. 3e8",
    "f_max_hz": "hertz, e.g. 1.3e9",
    "flop_per_cycle": "FLOP a cycle, e.g. 2048",
    "kappa_j_per_hz2_cycle": "joules per cycle and squared hertz, e.g. 1e-28",
    "static_power_w": "watts, e.g. 0.5",
    "memory_bits": "bits, e.g. 8e9",
}
NUMBERS = tuple(field.name for field in dataclasses.fields(Users) if field.name not in ("task", "allowed"))
"""The numeric fields of a user."""

Path = Callable[[int], str]
"""Where the user wrote an entry, by its index."""


def make_problem(
    models: Sequence[Mapping],
    users: Users,
    bandwidth_hz: float,
    rate_model: str = "linear",
    *,
    tasks: Sequence[str] | None = None,
    user_names: Sequence[str] | None = None,
) -> Problem:
    """Returns a checked problem from arrays, as an alternative to a scenario file.

    Args:
      models: as in a scenario file: name, task, accuracy and layers of bits and flop.
      users: arrays of K numbers; a scalar holds for all users. `allowed` restricts the models that fit the
        task; where the task is -1 it alone says which models are admissible.
      bandwidth_hz: the downlink spectrum [Hz].
      rate_model: `linear` or `shannon`.
      tasks: the names that `users.task` counts; None: those of the models, by first appearance.
      user_names: K identifiers; None numbers them.

    Returns:
      A problem of NumPy arrays (float64, int32, bool); `users.allowed`, where given, is narrowed to
      exactly the admissible models.

    Raises:
      InputError: an invalid value, with its place, e.g. `users.deadline_s[3]`.
    """
    catalogue, labels = read_models(models, tasks)
    arrays = {name: np.asarray(getattr(users, name)) for name in ("task", *NUMBERS)}
    longest = max(arrays, key=lambda name: arrays[name].ndim)
    shape = arrays[longest].shape or (1,)
    for name, array in arrays.items():
        dtype, kinds = (np.int32, "iu") if name == "task" else (np.float64, "iuf")
        if array.dtype.kind not in kinds:
            remedy = f"give {'integers' if name == 'task' else 'numbers'}"
            raise InputError(f"users.{name}", str(array.dtype), "is of the wrong type", remedy)
        if array.shape not in ((), shape) or array.ndim > 1:
            clash = f"does not go with users.{longest} of shape {shape}"
            problem = clash if array.ndim == 1 else "has more than the axis of users"
            raise InputError(f"users.{name}", f"shape {array.shape}", problem, "give a scalar or one a user")
        arrays[name] = np.broadcast_to(array, shape).astype(dtype)
    if user_names is not None:
        user_names = tuple(user_names)
        if len(user_names) != shape[0]:
            problem = f"there are {shape[0]} users"
            raise InputError("user_names", f"{len(user_names)} names", problem, "give one a user")
        require_texts(user_names, lambda k: f"user_names[{k}]")
    return checked_problem(
        catalogue,
        Users(**arrays, allowed=users.allowed),
        bandwidth_hz,
        rate_model,
        dataclasses.replace(labels, users=user_names),
        lambda name, k: f"user_names[{k}]" if name == "id" else f"users.{name}[{k}]",
    )


def checked_problem(
    catalogue: Catalogue,
    users: Users,
    bandwidth_hz: Any,
    rate_model: str,
    labels: Labels,
    path: Callable[[str, int], str],
) -> Problem:
    """Returns the problem if every value is valid.

    Args:
      catalogue, labels: from `read_models`.
      users: arrays of the same length in the types of a `Problem`.
      path: where the user wrote a field, by its name and the user's index.

    Raises:
      InputError: the first field with an invalid value.
    """
    bandwidth = numbers([bandwidth_hz], "bandwidth_hz", lambda _: "bandwidth_hz")
    check_range(bandwidth, "bandwidth_hz", lambda _: "bandwidth_hz")
    if rate_model not in RATE_MODELS:
        raise unknown_name("rate_model", rate_model, RATE_MODELS)
    for name in NUMBERS:
        check_range(getattr(users, name), name, lambda k, name=name: path(name, k))
    crossed = users.f_min_hz > users.f_max_hz
    if crossed.any():
        k = int(np.argmax(crossed))
        problem = f"above f_max_hz={users.f_max_hz[k].item()!r}"
        raise InputError(path("f_min_hz", k), users.f_min_hz[k].item(), problem, "give at most f_max_hz")

    by_name = users.task == -1
    impossible = (users.task < -1) | (users.task >= len(labels.tasks)) | (by_name & (users.allowed is None))
    if impossible.any():
        k = int(np.argmax(impossible))
        problem = "stands for named models, and none are" if by_name[k] else "is no index of a task"
        raise InputError(path("task", k), users.task[k].item(), problem, f"the tasks are {labels.tasks}")
    if users.allowed is not None:
        allowed, shape = np.asarray(users.allowed), (users.task.size, catalogue.accuracy.size)
        if allowed.shape != shape or allowed.dtype != bool:
            given = f"{allowed.dtype} of shape {allowed.shape}"
            raise InputError("users.allowed", given, "must be bool [K, I]", f"give shape {shape}")
        users = dataclasses.replace(users, allowed=allowed & (by_name[:, None] | fits_task(catalogue, users)))

    if labels.users is not None and len(set(labels.users)) < len(labels.users):
        k, j = first_repeated(labels.users)
        raise InputError(path("id", k), labels.users[k], f"user {j} has this id too", "give each its own")
    return Problem(catalogue, users, bandwidth[0], rate_model, labels)


def fits_task(catalogue: Catalogue, users: Users) -> np.ndarray:
    """Returns which model solves whose task accurately enough, bool [K, I]."""
    same_task = users.task[:, None] == catalogue.task
    return same_task & (catalogue.accuracy >= users.min_accuracy[:, None])


def read_models(models: Any, tasks: Sequence[str] | None) -> tuple[Catalogue, Labels]:
    """Returns the padded catalogue and its names from models in the form of a scenario file.

    Raises:
      InputError: with the JSON path, e.g. `models[1].layers[2].bits`.
    """
    require_list(models, "models")
    require_objects(models, ("name", "task", "accuracy", "layers"), lambda i: f"models[{i}]")
    if not models:
        raise InputError("models", [], "the catalogue is empty", "give at least one model")
    names, model_tasks = ([model.get(key, MISSING) for model in models] for key in ("name", "task"))
    require_texts(names, lambda i: f"models[{i}].name")
    require_texts(model_tasks, lambda i: f"models[{i}].task")
    if len(set(names)) < len(names):
        i, j = first_repeated(names)
        raise InputError(f"models[{i}].name", names[i], f"models[{j}] has this name too", "give each its own")
    tasks = tuple(dict.fromkeys(model_tasks)) if tasks is None else tuple(tasks)
    require_texts(tasks, lambda j: f"tasks[{j}]")
    for i, task in enumerate(model_tasks):
        if task not in tasks:
            raise unknown_name(f"models[{i}].task", task, tasks)

    def in_range(objects: Sequence[Mapping], key: str, path: Path) -> np.ndarray:
        values = numbers([item.get(key, MISSING) for item in objects], key, path)
        check_range(values, key, path)
        return values

    accuracy = in_range(models, "accuracy", lambda i: f"models[{i}].accuracy")
    rows = []
    for i, model in enumerate(models):
        place = f"models[{i}].layers"
        layers = model.get("layers", MISSING)
        require_list(layers, place)
        if not layers:
            raise InputError(place, [], "the model has no layers", "give at least one layer")
        require_objects(layers, ("bits", "flop"), lambda j, place=place: f"{place}[{j}]")
        rows.append(
            [
                in_range(layers, key, lambda j, place=place, key=key: f"{place}[{j}].{key}")
                for key in ("bits", "flop")
            ]
        )
    num_layers = np.array([bits.size for bits, _ in rows], np.int32)
    padded = np.zeros((2, len(rows), num_layers.max()))
    for i, row in enumerate(rows):
        padded[:, i, : num_layers[i]] = row
    task_index = np.array([tasks.index(task) for task in model_tasks], np.int32)
    return Catalogue(padded[0], padded[1], num_layers, accuracy, task_index), Labels(tuple(names), tasks)


def check_range(values: np.ndarray, name: str, path: Path) -> None:
    """Refuses the first entry that no field of this name may hold."""
    good = values > 0 if name in POSITIVE else values >= 0
    text = "a finite number above 0" if name in POSITIVE else "a finite number, 0 or more"
    if name in SHARES:
        good, text = good & (values <= 1), "within [0, 1]"
    if name not in UNLIMITED:
        good = good & np.isfinite(values)
    if good.all():
        good = (values == 0) | (values >= LEAST) & (values <= LARGEST) | np.isinf(values)
        text = f"{'' if name in POSITIVE else '0 or '}from {LEAST:g} to {LARGEST:g}"
    if not good.all():
        k = int(np.argmin(good))
        raise InputError(path(k), values[k].item(), f"must be {text}", f"give {EXAMPLES[name]}")


def numbers(column: Sequence, name: str, path: Path) -> np.ndarray:
    """Returns a column as float64, or refuses its first entry that is no number."""
    example = f"give {EXAMPLES.get(name, 'a number')}"
    if not set(map(type, column)) <= {int, float}:
        for k, value in enumerate(column):
            _require_present(value, path(k), example)
            kind = "f" if type(value) in (int, float) else getattr(value, "dtype", np.dtype(bool)).kind
            if kind not in "iuf" or np.ndim(value):
                raise InputError(path(k), shown(value), "must be a number", example)
    try:
        return np.array(column, np.float64)
    except OverflowError:
        k = next(k for k, value in enumerate(column) if abs(value) > sys.float_info.max)
        raise InputError(path(k), "<int>", "is too large", example) from None


def require_texts(column: Sequence, path: Path, optional: bool = False) -> None:
    """Refuses the first entry that is no text; None passes where it is optional."""
    if not set(map(type, column)) <= {str, type(None) if optional else str}:
        for k, value in enumerate(column):
            _require_present(value, path(k), "give a text")
            if not (isinstance(value, str) or (optional and value is None)):
                raise InputError(path(k), shown(value), "must be a text", 'give it in quotes, e.g. "vision"')
    for k, value in enumerate(column):
        if value is not None and not value.isascii() and not _is_unicode(value):
            raise InputError(path(k), shown(value), "holds half of a surrogate pair", "write it in UTF-8")


def require_list(value: Any, path: str) -> None:
    _require_present(value, path, "give a list, [...]")
    if not isinstance(value, list | tuple):
        raise InputError(path, shown(value), "must be a list", "give [...]")


def require_objects(column: Sequence, known: Sequence[str], path: Path) -> None:
    """Refuses the first entry that is no object, or has a key that is not known."""
    if not set(map(type, column)) <= {dict}:
        for k, value in enumerate(column):
            _require_present(value, path(k), "give an object, {...}")
            if not isinstance(value, Mapping):
                raise InputError(
                    path(k), shown(value), "must be an object", f"give {{...}} of {', '.join(known)}"
                )
    if not all(map(frozenset(known).issuperset, column)):
        k, key = next((k, key) for k, item in enumerate(column) for key in item if key not in known)
        place = f"{path(k)}.{key}".lstrip(".")
        raise InputError(place, shown(column[k][key]), "unknown key", unknown_name(place, key, known).remedy)


def first_repeated(names: Sequence[str]) -> tuple[int, int]:
    """Returns the first index whose name has come before, and where it came."""
    seen: dict[str, int] = {}
    return next((k, seen[name]) for k, name in enumerate(names) if seen.setdefault(name, k) != k)


def shown(value: Any) -> Any:
    """Returns a value as an error shows it; what would not fit on one line is replaced by its type."""
    long = len(value) > 80 if isinstance(value, str) else isinstance(value, list | tuple | Mapping)
    return f"<{type(value).__name__}>" if long else value


def _is_unicode(text: str) -> bool:
    """Returns whether a text can be written in UTF-8: half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _require_present(value: Any, path: str, remedy: str) -> None:
    if value is MISSING:
        raise InputError(path, None, "is missing", remedy)
