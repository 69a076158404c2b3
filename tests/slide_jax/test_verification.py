"""The judge accepts what brute force finds and rejects every tampering; both against sums done by hand."""

import ast
import dataclasses
import inspect
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from slide_by_hand import CHAT, LAST, TWO_LAYERS, layers, problem_of
from slide_oracles import best_allocation, best_clock, best_throughput, least_bandwidth
from slide_strategies import CORNERS, RATE_MODELS, problems, random_problem

from slide_jax import verification as judge
from slide_jax.problem import REASONS
from slide_jax.verification import Violation, verify

# ------------------------------------------------------------------ brute force against sums by hand


@pytest.mark.parametrize(
    ("model", "columns", "expected"),
    [
        # 4e6 bits within 3 - 0.5 s bind, not 1e6 bits within 3 - 1 s.
        (TWO_LAYERS, {}, 4e6 / 2.5 / 2),
        # 1e6 bits within 3 - 2.9 s bind when the work is long.
        (layers((1e6, 2e9), (3e6, 9e8)), {}, 1e6 / 0.1 / 2),
        (layers((0.0, 1e9)), {}, 0.0),
        (layers((0.0, 3e9)), {}, 0.0),
        (layers((0.0, 3.1e9)), {}, math.inf),
        (layers((0.0, 1e9), (1e6, 2e9)), {}, 1e6 / 1 / 2),
        (layers((1e6, 0.0)), {}, 1e6 / 3 / 2),
        (layers((1e6, 3e9)), {}, math.inf),
        (layers((0.0, 2e9), (1e6, 1e9)), {"deadline_s": 4.0}, 1e6 / 2 / 2),
        (layers((1e6, 1e9), (0.0, 1e9)), {}, 1e6 / 1 / 2),
        (layers((1e6, 1e9)), {"deadline_s": 1.0}, math.inf),
        (layers((1e6, 1e9)), {"deadline_s": 0.5}, math.inf),
        (layers((0.0, 0.0)), {"deadline_s": 1.0}, 0.0),
        (layers((1e6, 1e9)), {"spectral_efficiency_bps_hz": 0.0}, math.inf),
        (layers((0.0, 1e9)), {"spectral_efficiency_bps_hz": 0.0}, 0.0),
        (TWO_LAYERS, {"memory_bits": 4e6}, 4e6 / 2.5 / 2),
        (TWO_LAYERS, {"memory_bits": 3.9e6}, math.inf),
        (TWO_LAYERS, {"min_accuracy": 0.7}, 4e6 / 2.5 / 2),
        (TWO_LAYERS, {"min_accuracy": 0.71}, math.inf),
        # 1e9 cycles for 0.25 J: a clock of 5e8 Hz, work of 1 + 1 s.
        (TWO_LAYERS, {"energy_j": 0.25}, 4e6 / 2 / 2),
    ],
)
def test_least_bandwidth_by_hand(model, columns, expected):
    np.testing.assert_allclose(least_bandwidth(problem_of(model, **columns)), [[expected]], rtol=1e-12)


def test_least_bandwidth_by_hand_when_power_is_shared():
    # b log2(1 + 1e7 / b) = 1e7 at b = 1e7; the most is 1e7 / ln 2.
    model = layers((1e7, 2e9))
    problem = problem_of(model, rate_model="shannon")
    np.testing.assert_allclose(least_bandwidth(problem), [[1e7]], rtol=1e-12)
    for factor, possible in ((1.44, True), (1.45, False)):
        model = layers((1e7 * factor, 2e9))
        assert np.isfinite(least_bandwidth(problem_of(model, rate_model="shannon"))).item() == possible


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, 1e9),
        ({"energy_j": 1.0}, 1e9),
        ({"energy_j": 0.25}, 5e8),
        ({"energy_j": 0.01}, 1e8),
        ({"energy_j": 0.0099}, math.nan),
        # 1e9 cycles cost f^2 + p / f joules, f in GHz: 3 at f = 1 with p = 2,
        ({"energy_j": 3.1, "static_power_w": 2.0}, 1e9),
        # 0.4375 at f = 0.25 and at f = 0.5 with p = 0.09375, less between,
        ({"energy_j": 0.4375, "static_power_w": 0.09375}, 5e8),
        ({"energy_j": 0.4375, "static_power_w": 0.09375, "f_min_hz": 6e8}, math.nan),
        ({"energy_j": 0.4375, "static_power_w": 0.09375, "f_max_hz": 2e8}, math.nan),
        # and never below 0.75 with p = 0.25.
        ({"energy_j": 0.5, "static_power_w": 0.25}, math.nan),
    ],
)
def test_best_clock_by_hand(columns, expected):
    np.testing.assert_allclose(best_clock(problem_of(TWO_LAYERS, **columns)), [[expected]], rtol=1e-12)


def test_best_throughput_by_hand():
    # The smaller model needs 0.8, 0.8 and (4e6 bits within 1 s) 2 MHz, the other more.
    problem = problem_of(TWO_LAYERS, LAST, deadline_s=[4.0, 4.0, 2.5])
    need = least_bandwidth(problem)[:, 0]
    np.testing.assert_allclose(need, [8e5, 8e5, 2e6], rtol=1e-12)
    for spectrum, served in ((0.0, 0), (7.9e5, 0), (8e5, 1), (1.6e6, 2), (3.5e6, 2), (3.6e6, 3)):
        assert best_throughput(dataclasses.replace(problem, bandwidth_hz=spectrum)) == served


def test_families_are_what_they_are_called():
    served = {}
    for corner in CORNERS:
        drawn = [random_problem(np.random.default_rng(seed), 5, 3, 3, corner=corner) for seed in range(12)]
        served[corner] = [best_throughput(problem) for problem in drawn]
        if corner == "one layer":
            assert all(problem.catalogue.layer_bits.shape[1] == 1 for problem in drawn)
        if corner == "no spectrum":
            assert all(problem.bandwidth_hz == 0 for problem in drawn)
        if corner == "shannon cap":
            assert all(problem.rate_model == "shannon" for problem in drawn)
        if corner == "equal users":
            assert all(np.ptp(problem.users.deadline_s) == 0 for problem in drawn)
        if corner == "zero layers":
            assert any((problem.catalogue.layer_bits[:, 0] == 0).any() for problem in drawn)
    assert max(served.pop("no feasible user")) == 0
    for corner, counts in served.items():
        assert 0 < sum(counts) < 60, corner


# ------------------------------------------------------------------ the judge


@given(problems())
def test_what_brute_force_finds_is_feasible(problem):
    allocation = best_allocation(problem)
    assert allocation.throughput == best_throughput(problem)
    assert verify(problem, allocation) == []


@given(problems())
def test_less_than_the_least_bandwidth_misses_the_deadline(problem):
    allocation = best_allocation(problem)
    starved = dataclasses.replace(allocation, bandwidth_hz=allocation.bandwidth_hz * (1 - 1e-3))
    late = {v.user for v in verify(problem, starved) if v.constraint == "deadline_s"}
    assert late == {f"u{k}" for k in np.flatnonzero(allocation.bandwidth_hz > 0)}


def tight():
    """Returns a problem whose constraints all bind, and its answer: u0 and u1 are served, u2 is not."""
    problem = problem_of(
        TWO_LAYERS,
        LAST,
        CHAT,
        bandwidth_hz=2e6,
        energy_j=[0.25, 1.0, 1.0],
        deadline_s=[4.0, 4.0, 1.0],
        memory_bits=4e6,
    )
    return problem, dataclasses.replace(best_allocation(problem), upper_bound=2.0)


def test_the_tight_answer_is_feasible():
    problem, allocation = tight()
    assert allocation.throughput == 2
    np.testing.assert_allclose(allocation.bandwidth_hz, [1e6, 8e5, 0])
    np.testing.assert_allclose(allocation.frequency_hz, [5e8, 1e9, 0])
    assert verify(problem, allocation) == []


@pytest.mark.parametrize("epoch_s", [0.0, 1.7e9])
def test_seconds_count_whatever_the_clock_counts_from(epoch_s):
    """Times of today as seconds since 1970: what slack a relative tolerance gave would be 1.7 s."""
    problem, allocation = tight()
    users = problem.users
    start, deadline = users.start_s + epoch_s, users.deadline_s + epoch_s
    shifted = dataclasses.replace(
        problem, users=dataclasses.replace(users, start_s=start, deadline_s=deadline)
    )
    answer = dataclasses.replace(allocation, latency_s=allocation.latency_s + epoch_s)
    assert verify(shifted, answer) == []

    late = np.array([4.5, 4.0, math.nan]) + epoch_s
    # 4e6 bits in 3 - 0.5 s of which 1 s, at half the clock, is for the last layer.
    slower = np.array([4e6 / 2.5 / 2, *allocation.bandwidth_hz[1:]])
    violations = verify(shifted, dataclasses.replace(answer, bandwidth_hz=slower, latency_s=late))
    assert [(v.user, v.constraint) for v in violations] == [("u0", "deadline_s")]
    # To say that it was in time is another lie.
    violations = verify(shifted, dataclasses.replace(answer, bandwidth_hz=slower))
    assert [v.constraint for v in violations] == ["deadline_s", "reported latency_s"]


@pytest.mark.parametrize(
    ("field", "k", "value", "constraint"),
    [
        ("model", 0, 3, "model"),
        ("model", 0, -2, "model"),
        ("model", 0, 1, "memory_bits"),
        ("model", 0, 2, "admissible_model"),
        ("bandwidth_hz", 1, 7.99e5, "deadline_s"),
        ("bandwidth_hz", 1, 0.0, "deadline_s"),
        ("bandwidth_hz", 1, -8e5, "bandwidth_hz"),
        ("bandwidth_hz", 1, math.nan, "bandwidth_hz"),
        ("bandwidth_hz", 2, 1.0, "bandwidth_hz"),
        ("frequency_hz", 0, 4.99e8, "deadline_s"),
        ("frequency_hz", 0, 5.01e8, "energy_j"),
        ("frequency_hz", 1, 1.001e9, "f_max_hz"),
        ("frequency_hz", 1, 9.99e7, "f_min_hz"),
        ("frequency_hz", 1, 0.0, "f_min_hz"),
        ("frequency_hz", 1, math.nan, "f_min_hz"),
        ("frequency_hz", 2, 1e9, "frequency_hz"),
        ("frequency_hz", 2, math.nan, "frequency_hz"),
        ("latency_s", 0, 3.999, "reported latency_s"),
        ("latency_s", 2, 1.0, "reported latency_s"),
        ("latency_s", 1, math.nan, "reported latency_s"),
        ("energy_j", 0, 0.2499, "reported energy_j"),
        ("energy_j", 1, math.nan, "reported energy_j"),
        ("energy_j", 2, 0.0, "reported energy_j"),
        ("reason", 0, 8, "reason"),
        ("reason", 2, 1, "reason"),  # it has models that are admissible, fit and run
        ("reason", 2, 5, "reason"),  # and a signal
        ("reason", 2, 0, "reason"),
        ("reason", 2, len(REASONS), "reason"),
        ("reason", 2, -1, "reason"),
    ],
)
def test_each_tampering_is_named(field, k, value, constraint):
    problem, allocation = tight()
    column = np.array(getattr(allocation, field))
    column[k] = value
    violations = verify(problem, dataclasses.replace(allocation, **{field: column}))
    assert (f"u{k}", constraint) in [(v.user, v.constraint) for v in violations]
    # No one else is accused.
    assert {v.user for v in violations} <= {f"u{k}", None}
    if field in ("latency_s", "energy_j", "reason"):
        assert [v.constraint for v in violations] == [constraint]


@pytest.mark.parametrize(
    ("field", "dtype"), [("model", float), ("model", bool), ("reason", float), ("latency_s", object)]
)
def test_indices_are_integers(field, dtype):
    problem, allocation = tight()
    column = getattr(allocation, field).astype(dtype)
    (violation,) = verify(problem, dataclasses.replace(allocation, **{field: column}))
    assert violation.constraint == "dtype" and field in violation.value


def test_the_users_own_models_are_all_that_counts():
    problem, allocation = tight()
    allowed = np.array([[False, True, True], [True, True, True], [True, True, True]])
    users = dataclasses.replace(problem.users, allowed=allowed)
    (violation,) = verify(dataclasses.replace(problem, users=users), allocation)
    assert (violation.user, violation.constraint) == ("u0", "admissible_model")


def test_accuracy_counts():
    problem, allocation = tight()
    users = dataclasses.replace(problem.users, min_accuracy=np.array([0.7, 0.71, 0.5]))
    (violation,) = verify(dataclasses.replace(problem, users=users), allocation)
    assert (violation.user, violation.constraint) == ("u1", "admissible_model")


def test_the_spectrum_is_shared_by_all():
    problem, allocation = tight()
    for spectrum, violations in (
        (1.8e6, []),
        (1.8e6 * (1 - 5e-13), []),
        (1.8e6 * (1 - 1e-11), [Violation(None, "bandwidth_hz", 1.8e6, 1.8e6 * (1 - 1e-11))]),
    ):
        found = verify(dataclasses.replace(problem, bandwidth_hz=spectrum), allocation)
        assert [(v.user, v.constraint) for v in found] == [(v.user, v.constraint) for v in violations]


def test_a_bound_below_the_throughput_is_false():
    problem, allocation = tight()
    (violation,) = verify(problem, dataclasses.replace(allocation, upper_bound=1.0))
    assert violation == Violation(None, "upper_bound", 1.0, 2)
    assert verify(problem, dataclasses.replace(allocation, upper_bound=math.nan)) == []


def test_an_answer_to_another_problem_is_named():
    problem, allocation = tight()
    (violation,) = verify(problem, dataclasses.replace(allocation, energy_j=np.zeros(2)))
    assert violation.constraint == "shape"


def test_violations_name_the_users_id_in_one_line():
    problem, allocation = tight()
    labels = dataclasses.replace(problem.labels, users=("ann", "bob", "cem"))
    starved = dataclasses.replace(allocation, bandwidth_hz=allocation.bandwidth_hz / 2)
    violations = verify(dataclasses.replace(problem, labels=labels), starved)
    assert {v.user for v in violations} == {"ann", "bob"}
    assert all("\n" not in str(v) for v in violations)
    assert any(str(v).startswith("bob: deadline_s is 6.5") for v in violations)
    assert str(Violation(None, "bandwidth_hz", 2.0, 1.0)) == "all users: bandwidth_hz is 2.0, limit 1.0"


def test_no_users_break_nothing():
    problem = random_problem(np.random.default_rng(0), 1, 2, 2)
    users = jax.tree.map(lambda column: column[:0], problem.users)
    problem = dataclasses.replace(problem, users=users)
    assert verify(problem, best_allocation(problem)) == []


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_arrays_of_any_kind_are_judged_in_float64(rate_model):
    problem = random_problem(np.random.default_rng(3), 5, 3, 3, rate_model)
    allocation = best_allocation(problem)
    with jax.enable_x64(True):
        assert verify(*jax.tree.map(jax.numpy.asarray, (problem, allocation))) == []


def test_the_judge_knows_no_solver():
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(judge))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"dataclasses", "math", "typing", "numpy", "slide_jax.problem"}
