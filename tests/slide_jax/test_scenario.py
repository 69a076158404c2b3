"""The border: what a scenario file says is what a problem holds, and what is written reads back."""

import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from slide_oracles import best_allocation, is_admissible
from slide_strategies import delete, problems, put, scenario

from slide_jax.errors import InputError
from slide_jax.problem import Allocation, Users
from slide_jax.scenario import read_allocation, read_scenario, write_allocation, write_scenario
from slide_jax.verification import verify

INF = float("inf")


def arrays_of(problem):
    for part in (problem.catalogue, problem.users):
        for field in dataclasses.fields(part):
            yield field.name, getattr(part, field.name)


# ------------------------------------------------------------------ what is read


def test_every_field_lands_in_its_array():
    problem = read_scenario(scenario())
    catalogue, users = problem.catalogue, problem.users
    np.testing.assert_array_equal(catalogue.layer_bits, [[3e5, 0], [3e5, 0]])
    np.testing.assert_array_equal(catalogue.layer_flop, [[2e8, 1e8], [2e8, 0]])
    np.testing.assert_array_equal(catalogue.num_layers, [2, 1])
    np.testing.assert_array_equal(catalogue.accuracy, [0.7, 1.0])
    np.testing.assert_array_equal(catalogue.task, [0, 1])
    given_user = {**scenario()["users"][0], **scenario()["users"][0]["device"], "task": 0}
    for field in dataclasses.fields(Users):
        if field.name != "allowed":
            np.testing.assert_array_equal(getattr(users, field.name), [given_user[field.name]] * 2)
    assert users.allowed is None
    assert (problem.bandwidth_hz, problem.rate_model) == (1e8, "linear")
    labels = problem.labels
    assert (labels.models, labels.tasks, labels.users) == (
        ("small", "chat"),
        ("vision", "language"),
        ("a0", "a1"),
    )
    dtypes = {name: array.dtype for name, array in arrays_of(problem) if array is not None}
    assert {name for name, dtype in dtypes.items() if dtype == np.int32} == {"task", "num_layers"}
    assert set(dtypes.values()) == {np.dtype(np.int32), np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (("start_s",), "start_s", 0.0),
        (("min_accuracy",), "min_accuracy", 0.0),
        (("energy_j",), "energy_j", INF),
        (("snr_hz",), "snr_hz", 0.0),
        (("device", "static_power_w"), "static_power_w", 0.0),
        (("device", "memory_bits"), "memory_bits", INF),
    ],
)
def test_what_is_left_out_has_its_default(path, field, value):
    content = scenario()
    put(content, ("users", 1, *path), delete)
    problem = read_scenario(content)
    assert getattr(problem.users, field)[1] == value
    assert getattr(problem.users, field)[0] == getattr(read_scenario(scenario()).users, field)[0] != value


def test_null_is_no_limit_and_absent_ids_count():
    content = scenario()
    content["users"][1]["energy_j"] = content["users"][0]["device"]["memory_bits"] = None
    del (
        content["users"][1]["device"]["kappa_j_per_hz2_cycle"],
        content["users"][1]["id"],
        content["rate_model"],
    )
    problem = read_scenario(content)
    np.testing.assert_array_equal(problem.users.energy_j, [5.0, INF])
    np.testing.assert_array_equal(problem.users.memory_bits, [INF, 8e9])
    np.testing.assert_array_equal(problem.users.kappa_j_per_hz2_cycle, [1e-28, 0.0])
    assert problem.labels.users == ("a0", "u1")
    assert problem.rate_model == "linear"


def test_shannon_needs_no_spectral_efficiency():
    content = scenario(rate_model="shannon")
    del content["users"][0]["spectral_efficiency_bps_hz"]
    problem = read_scenario(content)
    assert problem.rate_model == "shannon"
    np.testing.assert_array_equal(problem.users.spectral_efficiency_bps_hz, [0.0, 4.2])


def test_named_models_stand_instead_of_task_and_accuracy():
    content = scenario(3)
    for k, models in ((1, ["chat"]), (2, [])):
        content["users"][k]["models"] = models
        del content["users"][k]["min_accuracy"]
    del content["users"][1]["task"]
    problem = read_scenario(content)
    np.testing.assert_array_equal(problem.users.allowed, [[True, False], [False, True], [False, False]])
    np.testing.assert_array_equal(problem.users.task, [0, -1, -1])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("bandwidth_hz",), 0),
        (("users",), []),
        (("users", 0, "spectral_efficiency_bps_hz"), 0),
        (("users", 0, "deadline_s"), 0.25),
        (("users", 0, "energy_j"), 0),
        (("users", 0, "device", "f_min_hz"), 0),
        (("users", 0, "device", "f_min_hz"), 1.3e9),
        (("users", 0, "min_accuracy"), 1),
        (("models", 0, "layers", 0), {"bits": 0, "flop": 0}),
    ],
)
def test_corners_are_ordinary_inputs(path, value):
    content = scenario()
    put(content, path, value)
    assert read_scenario(content).num_users == len(content["users"])


# ------------------------------------------------------------------ what is written


@settings(max_examples=40)
@given(problems())
def test_a_written_scenario_reads_back(tmp_path_factory, problem):
    path = tmp_path_factory.mktemp("scenario") / "scenario.json"
    write_scenario(problem, path)
    again = read_scenario(path)
    assert (again.bandwidth_hz, again.rate_model) == (problem.bandwidth_hz, problem.rate_model)
    assert again.labels.models == problem.labels.models
    assert again.labels.users is None
    for (name, ours), (_, theirs) in zip(arrays_of(again), arrays_of(problem), strict=True):
        # Who has no model for his task lists none; tasks are counted anew.
        if name not in ("task", "min_accuracy", "allowed"):
            width = () if np.ndim(theirs) < 2 else (..., slice(np.shape(ours)[1]))
            np.testing.assert_array_equal(ours, theirs[width], name)
    for k, i in np.ndindex(problem.num_users, problem.num_models):
        assert is_admissible(again, k, i) == is_admissible(problem, k, i)
    text = path.read_text()
    write_scenario(again, path)
    assert path.read_text() == text


def test_ids_and_tasks_survive_the_file(tmp_path):
    content = scenario(3)
    content["users"][2]["models"] = ["chat"]
    del content["users"][2]["min_accuracy"]
    write_scenario(read_scenario(content), tmp_path / "scenario.json")
    again = read_scenario(tmp_path / "scenario.json")
    np.testing.assert_array_equal(again.users.task, [0, 0, -1])
    assert again.labels.users == ("a0", "a1", "a2")


@settings(max_examples=40)
@given(problems())
def test_a_written_answer_reads_back(tmp_path_factory, problem):
    path = tmp_path_factory.mktemp("allocation") / "allocation.json"
    answer = dataclasses.replace(best_allocation(problem), upper_bound=5.0, solve_s=0.25)
    write_allocation(problem, answer, path)
    again = read_allocation(problem, path)
    for field in dataclasses.fields(Allocation):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(answer, field.name), field.name)
    assert verify(problem, again) == []
    content = json.loads(path.read_text())
    assert content["throughput"] == answer.throughput == sum(user["served"] for user in content["users"])
    for user in content["users"]:
        assert user["served"] == (user["model"] is not None) == (user["reason"] is None)


@pytest.fixture
def written(tmp_path):
    """Returns (problem, path of its answer, content of the file): one user of two is served."""
    content = scenario()
    content["users"][0]["deadline_s"] = 0.1
    problem = read_scenario(content)
    path = tmp_path / "allocation.json"
    write_allocation(problem, best_allocation(problem), path)
    return problem, path, json.loads(path.read_text())


def test_an_answer_has_the_documented_form(written):
    problem, _, content = written
    assert list(content) == ["throughput", "bandwidth_used_hz", "solver", "solve_s", "users"]
    assert (content["throughput"], content["solver"], content["solve_s"]) == (1, "brute force", None)
    assert content["bandwidth_used_hz"] == content["users"][1]["bandwidth_hz"] > 0
    lost, served = content["users"]
    assert lost == {
        "id": "a0",
        "served": False,
        "model": None,
        "bandwidth_hz": 0.0,
        "frequency_hz": 0.0,
        "latency_s": None,
        "energy_j": None,
        "reason": "deadline shorter than compute",
    }
    assert (served["id"], served["model"], served["reason"]) == ("a1", "small", None)


@pytest.mark.parametrize(
    ("path", "value", "field", "text"),
    [
        (("users",), [], "users", "are not those of the scenario"),
        (("users", 0, "id"), "a9", "users", "are not those of the scenario"),
        (("users", 1, "model"), "smal", "users[1].model", "did you mean 'small'?"),
        (("users", 1, "model"), None, "users[1].served", "at odds with model=None"),
        (("users", 0, "reason"), "no singal", "users[0].reason", "did you mean 'no signal'?"),
        (("users", 1, "served"), 1, "users[1].served", "give true"),
        (("users", 1, "latency_s"), "fast", "users[1].latency_s", "must be a number"),
        (("users", 1, "bandwidth_hz"), delete, "users[1].bandwidth_hz", "is missing"),
        (("users", 1, "bandwith_hz"), 1, "users[1].bandwith_hz", "did you mean 'bandwidth_hz'?"),
        (("throughput",), 2, "throughput", "the users add up to 1"),
        (("bandwidth_used_hz",), 0, "bandwidth_used_hz", "the users add up to"),
        (("solve_s",), "quick", "solve_s", "must be a number"),
    ],
)
def test_an_edited_answer_at_odds_with_itself_is_refused(written, path, value, field, text):
    problem, file, content = written
    put(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError) as raised:
        read_allocation(problem, file)
    assert raised.value.field == field
    assert text in str(raised.value)


def test_an_edited_answer_is_for_verify_to_judge(written):
    problem, file, content = written
    content["users"][1]["latency_s"] = 1.0
    file.write_text(json.dumps(content))
    (violation,) = verify(problem, read_allocation(problem, file))
    assert violation.constraint == "reported latency_s"


def test_a_failed_write_leaves_the_old_file_and_no_other(written, monkeypatch):
    problem, file, _ = written
    before = file.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="cannot be written"):
        write_scenario(problem, file)
    assert file.read_text() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_directory_that_is_not_there_is_named(written):
    problem, file, _ = written
    with pytest.raises(InputError, match="cannot be written"):
        write_scenario(problem, file.parent / "none" / "scenario.json")
