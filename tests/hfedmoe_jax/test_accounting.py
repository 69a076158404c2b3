"""What a round costs, against sums worked out by hand from the device profiles."""

import numpy as np
import pytest

from hfedmoe_jax.accounting import account_round, enter, open_ledger
from hfedmoe_jax.algorithms import RoundMetrics
from hfedmoe_jax.cost import ModelCost
from hfedmoe_jax.devices import NO_SCORING, DeviceProfile, ScoringPasses
from hfedmoe_jax.reports import DROPPED_OUT, NONFINITE, OK, OVER_BUDGET, ClientReport

STEPS, EXPERTS = 2, 4
COST = ModelCost(
    all_experts=EXPERTS,
    shared_parameter_bytes=1000,
    frozen_bytes=10**9,  # does not travel
    shared_training_bytes=0,
    activation_bytes=0,
    expert_parameter_bytes=250,
    expert_training_bytes=0,
    shared_flop=100.0,
    assignment_flop=10.0,
)
MODEL_BYTES = 1000 + EXPERTS * 250
FAST = DeviceProfile("fast", 1e9, flop_per_s=1000.0, uplink_bps=8000.0, downlink_bps=16000.0)
SLOW = DeviceProfile("slow", 1e9, flop_per_s=100.0, uplink_bps=800.0, downlink_bps=8000.0)


def round_metrics(status, uploaded, assignments=20.0, trained=5.0, down=MODEL_BYTES):
    """Returns metrics of a cohort with these statuses that sent the given numbers of experts."""
    members = len(status)
    zero = np.zeros(members, np.float32)
    report = ClientReport(**dict.fromkeys(ClientReport._fields, zero))._replace(
        status=np.array(status, np.int32),
        assignments=np.full(members, assignments, np.float32),
        trained_assignments=np.full(members, trained, np.float32),
    )
    sent = np.arange(EXPERTS).reshape(2, 2) < np.reshape(uploaded, (-1, 1, 1))
    up = np.where(np.array(status) == OK, 1000 + 250 * np.array(uploaded), 0)
    return RoundMetrics(report, sent, zero, np.full(members, down), up)


def seconds(profile, experts_sent, sends=True):
    """Download, compute and upload of one client, one after another."""
    down = 8 * MODEL_BYTES / profile.downlink_bps
    up = 8 * (1000 + 250 * experts_sent) / profile.uplink_bps if sends else 0
    # Backward costs twice the forward, and only where an expert was trained.
    compute = STEPS * (3 * 100 + 20 * 10 + 2 * 5 * 10) / profile.flop_per_s
    return down + compute + up


def account(status, uploaded, profiles, scoring=NO_SCORING, down=MODEL_BYTES):
    return account_round(round_metrics(status, uploaded, down=down), profiles, COST, STEPS, scoring)


def test_the_slowest_client_decides_how_long_a_round_takes():
    result = account([OK, OK], [1, 3], [SLOW, FAST])
    slow, fast = seconds(SLOW, 1), seconds(FAST, 3)
    assert slow > fast
    assert result.round_time_s == pytest.approx(slow)
    assert result.waiting_share == pytest.approx((1 - fast / slow) / 2)
    assert account([OK], [3], [FAST]).round_time_s == pytest.approx(fast)
    assert account([OK], [3], [FAST]).waiting_share == 0


def test_a_client_sends_the_shared_part_and_the_experts_it_trained():
    result = account([OK, OK], [1, 3], [SLOW, FAST])
    assert result.bytes_up == 2 * 1000 + (1 + 3) * 250
    assert result.bytes_down == 2 * MODEL_BYTES


def test_what_clients_download_takes_time():
    result = account([OK, DROPPED_OUT], [1, 3], [SLOW, FAST], down=MODEL_BYTES + 600)
    assert result.bytes_down == 2 * (MODEL_BYTES + 600)
    assert result.bytes_up == 1000 + 250
    assert result.round_time_s == pytest.approx(seconds(SLOW, 1) + 8 * 600 / SLOW.downlink_bps)


@pytest.mark.parametrize("status", [DROPPED_OUT, OVER_BUDGET])
def test_a_client_that_fails_only_downloads_and_nobody_waits_for_it(status):
    result = account([status, OK], [0, 2], [SLOW, FAST])
    assert result.bytes_down == 2 * MODEL_BYTES
    assert result.bytes_up == 1000 + 2 * 250
    assert result.round_time_s == pytest.approx(seconds(FAST, 2))
    assert result.waiting_share == 0


def test_a_client_whose_loss_is_not_finite_is_waited_for_and_sends_nothing():
    result = account([NONFINITE, OK], [0, 2], [SLOW, FAST])
    assert result.bytes_up == 1000 + 2 * 250
    assert result.round_time_s == pytest.approx(seconds(SLOW, 0, sends=False))


def test_a_round_in_which_everyone_fails_takes_no_time():
    result = account([DROPPED_OUT, OVER_BUDGET], [0, 0], [SLOW, FAST])
    assert result == (0.0, 0.0, 0.0, 2 * MODEL_BYTES)


def test_scoring_takes_time_too():
    """Two passes, each of three shared and four expert forward passes."""
    without = account([OK], [3], [FAST])
    result = account([OK], [3], [FAST], scoring=ScoringPasses(2, 3, 4))
    assert result.round_time_s - without.round_time_s == pytest.approx(2 * (3 * 100 + 4 * 20 * 10) / 1000)
    assert (result.bytes_up, result.bytes_down) == (without.bytes_up, without.bytes_down)


def test_where_nothing_travels_only_compute_takes_time():
    metrics, nothing = round_metrics([OK, OK], [0, 0]), np.zeros(2, np.int64)
    metrics = metrics._replace(bytes_down=nothing, bytes_up=nothing)
    result = account_round(metrics, [SLOW, FAST], COST, STEPS, NO_SCORING)
    assert (result.bytes_up, result.bytes_down) == (0, 0)
    assert result.round_time_s == pytest.approx(STEPS * (3 * 100 + 20 * 10 + 2 * 5 * 10) / 100)


def test_a_ledger_sums_rounds_and_counts_statuses():
    ledger, rounds = open_ledger(), []
    for status in ([OK, OK, DROPPED_OUT], [NONFINITE, OK, OVER_BUDGET], [OK, OK, OK]):
        result = account(status, [1, 2, 0], [SLOW, FAST, SLOW])
        ledger = enter(ledger, result, round_metrics(status, [1, 2, 0]))
        rounds.append(result)
    assert ledger.simulated_time_s == sum(result.round_time_s for result in rounds)
    assert ledger.bytes_up == sum(result.bytes_up for result in rounds)
    assert ledger.bytes_down == sum(result.bytes_down for result in rounds)
    assert ledger.status_counts.tolist() == [6, 1, 1, 1]
    assert ledger.status_counts.dtype == np.int64
