"""The judge tells why a user is not served: by hand, by brute force, and of every solver's own answers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_by_hand import TWO_LAYERS, layers, problem_of
from slide_oracles import best_allocation
from slide_strategies import CORNERS, RATE_MODELS, random_problem, with_layers

from slide_jax import solve
from slide_jax.baselines import download_then_infer
from slide_jax.problem import REASONS
from slide_jax.solvers import SOLVERS
from slide_jax.verification import verify

LATE, WIDE, CROWDED = (
    REASONS.index(name)
    for name in (
        "deadline shorter than compute",
        "needs more than the whole spectrum",
        "spectrum used by others",
    )
)


def told(problem, answer, k, reason):
    """Returns what the judge says of an answer that gives user k this reason."""
    reasons = np.array(answer.reason)
    reasons[k] = reason
    return verify(problem, dataclasses.replace(answer, reason=reasons))


@pytest.mark.parametrize("rate_model", RATE_MODELS)
def test_deadline_and_spectrum_are_told_apart(rate_model):
    """1 s of work is late in 0.9 s; in 1.25 s the 4e6 bits have 0.75 s, 5.3 Mbit/s, and 2 MHz carry 4."""
    problem = problem_of(
        TWO_LAYERS, bandwidth_hz=2e6, deadline_s=[1.9, 2.25, 4.0], snr_hz=6e6, rate_model=rate_model
    )
    answer = best_allocation(problem)
    assert answer.reason.tolist() == [LATE, WIDE, 0] and verify(problem, answer) == []
    for k, true, wrong in ((0, LATE, WIDE), (0, LATE, CROWDED), (1, WIDE, LATE), (1, WIDE, CROWDED)):
        (violation,) = told(problem, answer, k, wrong)
        assert (violation.user, violation.constraint) == (f"u{k}", "reason")
        assert (violation.value, violation.limit) == (wrong, true)


def test_who_was_crowded_out_neither_was_late_nor_needed_too_much():
    """Each needs 0.8 MHz of 1."""
    problem = problem_of(TWO_LAYERS, bandwidth_hz=1e6, deadline_s=[4.0, 4.0])
    answer = best_allocation(problem)
    (k,) = np.flatnonzero(~answer.served)
    assert answer.reason[k] == CROWDED and verify(problem, answer) == []
    for wrong in (LATE, WIDE):
        (violation,) = told(problem, answer, k, wrong)
        assert (violation.constraint, violation.limit) == ("reason", CROWDED)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_is_accused_and_every_swapped_reason_is(solver):
    """Nothing of the families but `exact fit` lies within rounding of a limit."""
    swapped = set()
    for corner in CORNERS:
        for seed, rate_model in enumerate(RATE_MODELS):
            problem = random_problem(np.random.default_rng(seed + 11), 8, 3, 4, rate_model, corner)
            problem = with_layers(problem, 4)
            answer = solve(problem, solver)
            posed = download_then_infer(problem) if SOLVERS[solver].download_first else problem
            assert verify(posed, answer) == [], corner
            for k in np.flatnonzero(np.isin(answer.reason, (LATE, WIDE, CROWDED)) & (corner != "exact fit")):
                true = int(answer.reason[k])
                for wrong in {LATE, WIDE, CROWDED} - {true}:
                    (violation,) = told(posed, answer, k, wrong)
                    assert (violation.constraint, violation.limit) == ("reason", true)
                    swapped.add((true, wrong))
    assert {(LATE, WIDE), (WIDE, LATE)} <= swapped


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"min_accuracy": 0.95}, "no admissible model"),
        ({"memory_bits": 1e3}, "memory smaller than the model"),
        ({"energy_j": 1e-6}, "energy budget too small for the lowest clock"),
        (
            {"energy_j": 0.9, "kappa_j_per_hz2_cycle": 0.0, "static_power_w": 1.0},
            "energy budget too small for the lowest clock",
        ),
        ({"deadline_s": [1.9]}, "deadline shorter than compute"),
        ({"deadline_s": [2.02]}, "needs more than the whole spectrum"),
        ({"energy_j": 1e-15, "deadline_s": [1.9]}, "energy budget too small for the lowest clock"),
    ],
)
def test_the_reason_is_where_the_user_stopped(columns, reason):
    problem = problem_of(TWO_LAYERS, **{"deadline_s": [4.0]} | columns)
    nobody = best_allocation(problem)
    code = REASONS.index(reason)
    assert nobody.reason.tolist() == [code]
    for other in range(1, len(REASONS)):
        answer = dataclasses.replace(nobody, reason=np.array([other], np.int32))
        assert [v.constraint for v in verify(problem, answer)] == ["reason"] * (other != code)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    rate_model=st.sampled_from(RATE_MODELS),
    corner=st.sampled_from(("none", "shannon cap", "zero signal", "named models")),
)
def test_only_the_true_reason_is_taken(seed, rate_model, corner):
    """Nothing of these problems lies within rounding of a limit."""
    problem = random_problem(np.random.default_rng(seed), 6, 3, 4, rate_model, corner)
    for solver in ("exact", "equal_share"):
        answer = solve(problem, solver)
        assert verify(problem, answer) == []
        for k in np.flatnonzero(~answer.served):
            for other in set(range(1, len(REASONS))) - {int(answer.reason[k])}:
                reason = answer.reason.copy()
                reason[k] = other
                (violation,) = verify(problem, dataclasses.replace(answer, reason=reason))
                assert (violation.constraint, violation.limit) == ("reason", answer.reason[k])


@pytest.mark.parametrize(
    ("deadline_s", "reason"),
    [
        (3.3, "rate above what the channel can carry"),
        (3.5, "needs more than the whole spectrum"),
        (4.1, "served"),
    ],
)
def test_a_rate_above_the_channels_is_told_from_a_narrow_spectrum(deadline_s, reason):
    """2 Mbit in all but 1 s of the work: 1 MHz carries log2(1 + 1) Mbit/s, any spectrum below 1 / ln 2."""
    problem = problem_of(
        layers((2e6, 1e9)), deadline_s=[deadline_s], snr_hz=1e6, rate_model="shannon", bandwidth_hz=1e6
    )
    answer = best_allocation(problem)
    assert REASONS[answer.reason[0]] == reason and verify(problem, answer) == []


def test_without_a_signal_no_rate_is_refused():
    problem = problem_of(TWO_LAYERS, deadline_s=[4.0], spectral_efficiency_bps_hz=0.0)
    nobody = best_allocation(problem)
    assert REASONS[nobody.reason[0]] == "no signal" and verify(problem, nobody) == []
    answer = dataclasses.replace(nobody, reason=np.array([6], np.int32))
    assert [v.constraint for v in verify(problem, answer)] == ["reason"]
