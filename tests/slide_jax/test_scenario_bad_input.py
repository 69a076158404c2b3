"""No mistake in a scenario, or in arrays instead of one, passes unnamed."""

import dataclasses
import json

import chex
import numpy as np
import pytest
from slide_strategies import delete, put, scenario

from slide_jax.errors import InputError
from slide_jax.problem import Users
from slide_jax.scenario import make_problem, read_scenario

INF, NAN = float("inf"), float("nan")


def dotted(path: tuple) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


# ------------------------------------------------------------------ what is refused

USER, DEVICE, LAYER = ("users", 1), ("users", 1, "device"), ("models", 1, "layers", 0)
NUMBERS = [
    ("bandwidth_hz",),
    ("models", 1, "accuracy"),
    (*LAYER, "bits"),
    (*LAYER, "flop"),
    *((*USER, key) for key in ("min_accuracy", "deadline_s", "start_s", "energy_j", "snr_hz")),
    (*USER, "spectral_efficiency_bps_hz"),
    *((*DEVICE, key) for key in ("f_min_hz", "f_max_hz", "flop_per_cycle", "kappa_j_per_hz2_cycle")),
    *((*DEVICE, key) for key in ("static_power_w", "memory_bits")),
]
REQUIRED = [
    ("bandwidth_hz",),
    ("models",),
    ("users",),
    *(("models", 1, key) for key in ("name", "task", "accuracy", "layers")),
    (*LAYER, "bits"),
    (*LAYER, "flop"),
    *((*USER, key) for key in ("task", "deadline_s", "spectral_efficiency_bps_hz", "device")),
    *((*DEVICE, key) for key in ("f_min_hz", "f_max_hz", "flop_per_cycle", "kappa_j_per_hz2_cycle")),
]


def refusal(content, path: tuple) -> str:
    """Returns the text of the error, whose field must be the path."""
    with pytest.raises(InputError) as raised:
        read_scenario(content)
    assert raised.value.field == dotted(path)
    assert "\n" not in str(raised.value) and raised.value.remedy
    return str(raised.value)


@pytest.mark.parametrize("value", [-1, -1e-300, NAN, INF, -INF, 10**400, -(10**400)])
@pytest.mark.parametrize("path", NUMBERS, ids=dotted)
def test_numbers_that_cannot_be_are_refused(path, value):
    content = scenario()
    put(content, path, value)
    refusal(content, path)


@pytest.mark.parametrize("value", [1.01e30, 1e308, 10**40, 0.99e-60, 5e-324])
@pytest.mark.parametrize("path", [path for path in NUMBERS if "accuracy" not in path[-1]], ids=dotted)
def test_numbers_whose_products_are_none_are_refused(path, value):
    content = scenario()
    put(content, path, 1e30 if path[-1] != "f_min_hz" else 1e8)
    assert read_scenario(content).num_users == 2
    put(content, path, value)
    assert "from 1e-60 to 1e+30" in refusal(content, path)


@pytest.mark.parametrize("value", [True, "1e8", [1.0], {}])
@pytest.mark.parametrize("path", NUMBERS, ids=dotted)
def test_what_is_no_number_is_refused(path, value):
    content = scenario()
    put(content, path, value)
    assert "must be a number" in refusal(content, path)


@pytest.mark.parametrize("path", REQUIRED, ids=dotted)
def test_what_is_missing_is_named(path):
    content = scenario()
    put(content, path, delete)
    assert "is missing" in refusal(content, path)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("models", 0, "accuracy"), 1.5, "must be within [0, 1]"),
        ((*USER, "min_accuracy"), 76, "must be within [0, 1]"),
        ((*DEVICE, "f_max_hz"), 0, "above 0"),
        ((*DEVICE, "flop_per_cycle"), 0, "above 0"),
        ((*USER, "start_s"), None, "must be a number"),
        ((*USER, "energy_j"), INF, "give null for no limit"),
        (("models",), [], "the catalogue is empty"),
        (("models", 1, "layers"), [], "the model has no layers"),
        (("models",), {"small": 1}, "must be a list"),
        (("users",), 7, "must be a list"),
        (("models", 0), ["small"], "must be an object"),
        (("models", 0, "layers", 1), 3e5, "must be an object"),
        (USER, None, "must be an object"),
        (DEVICE, "phone", "must be an object"),
        (("models", 1, "name"), "small", "models[0] has this name too"),
        (("models", 1, "name"), 7, "must be a text"),
        ((*USER, "id"), "a0", "user 0 has this id too"),
        ((*USER, "id"), 1, "must be a text"),
        ((*USER, "task"), "visoin", "did you mean 'vision'?"),
        ((*USER, "task"), ["vision"], "must be a text"),
        ((*USER, "models"), "small", "must be a list"),
        (("rate_model",), "shanon", "did you mean 'shannon'?"),
        (("rate_model",), None, "unknown name"),
        (("bandwith_hz",), 1e8, "did you mean 'bandwidth_hz'?"),
        (("models", 0, "acuracy"), 0.7, "did you mean 'accuracy'?"),
        ((*LAYER, "flops"), 2e8, "did you mean 'flop'?"),
        ((*USER, "deadine_s"), 2.0, "did you mean 'deadline_s'?"),
        ((*DEVICE, "f_maxhz"), 1e9, "did you mean 'f_max_hz'?"),
        ((*USER, "memory_bits"), 1e9, "unknown key"),
    ],
)
def test_other_mistakes_are_named(path, value, text):
    content = scenario()
    put(content, path, value)
    assert text in refusal(content, path)


def test_the_clock_range_is_not_crossed():
    content = scenario()
    content["users"][1]["device"]["f_min_hz"] = 2e9
    assert "above f_max_hz=1300000000.0" in refusal(content, (*DEVICE, "f_min_hz"))


def test_an_unknown_named_model_is_refused_with_the_nearest():
    content = scenario()
    content["users"][1]["models"] = ["chat", "smal"]
    del content["users"][1]["min_accuracy"]
    assert "did you mean 'small'?" in refusal(content, (*USER, "models", 1))


def test_shannon_needs_the_snr():
    content = scenario(rate_model="shannon")
    del content["users"][1]["snr_hz"]
    assert "is missing" in refusal(content, (*USER, "snr_hz"))


def test_the_first_offender_of_many_is_named():
    content = scenario(50)
    for k in (17, 40):
        content["users"][k]["device"]["static_power_w"] = -1.0
    refusal(content, ("users", 17, "device", "static_power_w"))


@pytest.mark.parametrize("text", ["", "{", "not json", '{"bandwidth_hz": 1e8}}', "\x00\xff"])
def test_files_that_are_no_json_are_refused(tmp_path, text):
    (tmp_path / "scenario.json").write_text(text, "latin-1")
    with pytest.raises(InputError, match=r"is no JSON file") as raised:
        read_scenario(tmp_path / "scenario.json")
    assert "\n" not in str(raised.value)


def doubled(path: tuple) -> str:
    """Returns the text of a scenario in which one key stands twice."""
    content, *above, key = scenario(), *path
    part = content
    for step in above:
        part = part[step]
    part["\0"] = part[key]
    return json.dumps(content).replace(json.dumps("\0"), json.dumps(key))


@pytest.mark.parametrize("path", REQUIRED, ids=dotted)
def test_keys_given_twice_are_refused(tmp_path, path):
    (tmp_path / "scenario.json").write_text(doubled(path))
    assert "is given twice" in refusal(tmp_path / "scenario.json", path)


def test_of_keys_given_twice_within_each_other_the_outer_is_named(tmp_path):
    (tmp_path / "scenario.json").write_text('{"users": [{"id": 1, "id": 2}], "users": [], "models": []}')
    refusal(tmp_path / "scenario.json", ("users",))


@pytest.mark.parametrize(
    "path",
    [(*USER, "id"), (*USER, "task"), ("models", 1, "name"), ("models", 1, "task"), (*USER, "models", 0)],
    ids=dotted,
)
def test_half_a_surrogate_pair_is_refused(tmp_path, path):
    content = scenario()
    if "models" in path[1:]:
        del content["users"][1]["min_accuracy"]
        content["users"][1]["models"] = ["small"]
    put(content, path, "a\ud800")
    (tmp_path / "scenario.json").write_text(json.dumps(content))  # written as an escape
    assert "half of a surrogate pair" in refusal(tmp_path / "scenario.json", path)
    put(content, path, "a\U0001f600\u0939")  # a whole one is a letter like any other
    if path[-1] in ("id", "name"):
        assert read_scenario(content).num_users == 2


def test_half_a_surrogate_pair_as_a_key_can_be_printed():
    with pytest.raises(InputError, match="unknown key") as raised:
        read_scenario({**scenario(), "\ud800": 1})
    assert str(raised.value).encode("utf-8").startswith(b"\\ud800=1")


def test_models_beside_an_accuracy_are_refused():
    content = scenario()
    content["users"][1]["models"] = ["small"]
    assert "no effect beside `models`" in refusal(content, (*USER, "min_accuracy"))


@pytest.mark.parametrize("content", ["[]", "3", '"users"', "null"])
def test_a_scenario_is_an_object(tmp_path, content):
    (tmp_path / "scenario.json").write_text(content)
    with pytest.raises(InputError, match=r"scenario=.*must be an object"):
        read_scenario(tmp_path / "scenario.json")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json': no such file"):
        read_scenario(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="cannot be read"):
        read_scenario(tmp_path)


# ------------------------------------------------------------------ arrays


def columns(**changes) -> Users:
    device = scenario()["users"][0].pop("device")
    user = {**scenario()["users"][0], **device, "task": 0, **changes}
    return Users(**{field.name: user.get(field.name) for field in dataclasses.fields(Users)})


def test_arrays_make_the_same_problem_as_the_file():
    made = make_problem(scenario()["models"], columns(deadline_s=[2, 2]), 1e8, user_names=["a0", "a1"])
    read = read_scenario(scenario())
    chex.assert_trees_all_equal(made, read, strict=True)
    assert dataclasses.astuple(made.labels) == dataclasses.astuple(read.labels)


def test_allowed_is_narrowed_to_the_admissible_models():
    allowed = np.array([[True, True], [True, True], [False, True]])
    users = columns(task=[0, -1, 0], allowed=allowed)
    problem = make_problem(scenario()["models"], users, 1e8)
    np.testing.assert_array_equal(problem.users.allowed, [[True, False], [True, True], [False, False]])


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"deadline_s": [1, 2, 3, NAN]}, "users.deadline_s[3]", "must be a finite number"),
        ({"f_min_hz": [1e8, 2e9]}, "users.f_min_hz[1]", "above f_max_hz"),
        ({"energy_j": [1.0, NAN]}, "users.energy_j[1]", "must be"),
        ({"deadline_s": [1, 2], "start_s": [0, 0, 0]}, "users.start_s", "does not go with users.deadline_s"),
        ({"deadline_s": [[1, 2]]}, "users.deadline_s", "more than the axis of users"),
        ({"deadline_s": ["1"]}, "users.deadline_s", "wrong type"),
        ({"deadline_s": True}, "users.deadline_s", "wrong type"),
        ({"deadline_s": None}, "users.deadline_s", "wrong type"),
        ({"task": [0.0]}, "users.task", "give integers"),
        ({"task": [0, 2]}, "users.task[1]", "no index of a task"),
        ({"task": [0, -1]}, "users.task[1]", "stands for named models"),
        ({"task": -2}, "users.task[0]", "no index of a task"),
        ({"allowed": np.ones((1, 3), bool)}, "users.allowed", "must be bool [K, I]"),
        ({"allowed": np.ones((1, 2))}, "users.allowed", "must be bool [K, I]"),
    ],
)
def test_arrays_that_cannot_be_are_refused(changes, field, text):
    with pytest.raises(InputError) as raised:
        make_problem(scenario()["models"], columns(**changes), 1e8)
    assert raised.value.field == field
    assert text in str(raised.value)


@pytest.mark.usefixtures("unchecked_types")
def test_names_that_cannot_be_are_refused():
    for names, field in ((["a"], "user_names"), (["a", "a"], "user_names[1]"), (["a", 1], "user_names[1]")):
        with pytest.raises(InputError) as raised:
            make_problem(scenario()["models"], columns(deadline_s=[1, 2]), 1e8, user_names=names)
        assert raised.value.field == field
    with pytest.raises(InputError, match=r"models\[1\]\.task='language'"):
        make_problem(scenario()["models"], columns(), 1e8, tasks=["vision"])
