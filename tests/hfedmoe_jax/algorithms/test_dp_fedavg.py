"""DP-FedAvg against a loop: clipping, sums, noise, and what the accountant says."""

import functools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop import algorithm_of, assert_close, assert_same, config_of, doubles, rounds, start, trained_alone
from tiny import run_round

from hfedmoe_jax.algorithms.dp_fedavg import add_noise, clip, epsilon
from hfedmoe_jax.models import Params
from hfedmoe_jax.reports import OK

CLIP, NOISE, COHORT = 0.05, 2.0, 4  # the rounds have three members, as if the fourth never came


def nobody(data):
    return data._replace(available=np.zeros_like(data.available))


def norm(change) -> float:
    return math.sqrt(sum(float(np.sum(np.float64(leaf) ** 2)) for leaf in jax.tree.leaves(change)))


@functools.cache
def built():
    config = config_of(
        fl__algorithm="dp_fedavg",
        fl__clients_per_round=COHORT,
        dp__clip_norm=CLIP,
        dp__noise_multiplier=NOISE,
    )
    return config, algorithm_of(config)


def test_beside_the_noise_a_round_adds_the_clipped_changes_over_the_cohorts_size():
    """The noise is that of a round of the same key in which nobody answers."""
    config, algorithm = built()
    train, clipped = trained_alone(config), 0
    for data, key in rounds(config):
        noisy, _ = run_round(algorithm, algorithm.init(start()), nobody(data), key)
        expected = doubles(noisy.params)
        for member in train(start(), data, key):
            factor = min(1.0, CLIP / norm(member.change))
            clipped += factor < 1
            expected = jax.tree.map(lambda p, x, f=factor: p + f * x / COHORT, expected, member.change)
        state, metrics = run_round(algorithm, algorithm.init(start()), data, key)
        assert_close(state.params, expected)
        assert metrics.uploaded[metrics.report.status == OK].all()  # zeros are sent too
    assert clipped > 0


@given(st.floats(1e-3, 1e3), st.integers(0, 9))
def test_a_change_is_cut_to_the_norm_and_keeps_its_direction(bound, seed):
    rng = np.random.default_rng(seed)
    change = Params(*(jnp.float32(rng.normal(size=shape)) for shape in ((1, 2, 3), (2,), (5,))))
    cut = clip(change, bound)
    assert norm(cut) == pytest.approx(min(bound, norm(change)), rel=1e-5)
    assert_close(cut, jax.tree.map(lambda x: np.asarray(x) * norm(cut) / norm(change), change))


def test_noise_is_normal_and_its_own_in_every_tensor():
    sums = Params({"a": jnp.ones((2, 3, 4000))}, {"b": jnp.ones(24000)}, {"c": jnp.ones(24000)})
    noisy = add_noise(sums, 0.7, jax.random.key(3))
    noise = [np.asarray(leaf).reshape(-1) - 1 for leaf in jax.tree.leaves(noisy)]
    for part in noise:
        assert abs(part.mean()) < 4 * 0.7 / math.sqrt(part.size)
        assert part.std() == pytest.approx(0.7, rel=4 / math.sqrt(2 * part.size))
        assert np.mean(np.abs(part) < 0.7) == pytest.approx(0.6827, abs=0.015)
    assert np.all(np.abs(np.corrcoef(noise) - np.eye(3)) < 4 / math.sqrt(24000))
    assert_same(add_noise(sums, 0.7, jax.random.key(3)), noisy)
    assert np.any(jax.tree.leaves(add_noise(sums, 0.7, jax.random.key(4)))[0] != noisy.experts["a"])


def test_noise_comes_to_every_parameter_even_if_nobody_answers():
    config, algorithm = built()
    data, key = next(rounds(config))
    state, again = (run_round(algorithm, algorithm.init(start()), nobody(data), key)[0] for _ in range(2))
    assert_same(again.params, state.params)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: COHORT * np.float64(a - b), state.params, start()))
    assert all(np.all(leaf != 0) for leaf in moved)
    values = np.concatenate([leaf.reshape(-1) for leaf in moved])
    assert values.std() == pytest.approx(NOISE * CLIP, rel=4 / math.sqrt(2 * values.size))


def test_the_summary_is_what_the_accountant_says():
    _, algorithm = built()
    one_round = dp_accounting.SampledWithoutReplacementDpEvent(
        5, COHORT, dp_accounting.GaussianDpEvent(NOISE / 2)
    )
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    for _ in range(7):
        accountant.compose(one_round)
    assert algorithm.summary(7)["privacy"] == {
        "epsilon": pytest.approx(accountant.get_epsilon(1e-5)),
        "delta": 1e-5,
        "noise_multiplier": NOISE,
        "clip_norm": CLIP,
        "unit": "client",
    }


@pytest.mark.parametrize(("noise", "rounds"), [(4.0, 1), (10.0, 20), (30.0, 300)])
def test_epsilon_is_just_above_the_exact_one_where_everybody_takes_part(noise, rounds):
    """n rounds with noise s over a sensitivity of two norms are one with noise s / 2 / sqrt(n)."""
    exact = dp_accounting.get_epsilon_gaussian(noise / 2 / math.sqrt(rounds), 1e-5)
    assert exact <= epsilon(rounds, 50, 50, noise, 1e-5) <= 1.25 * exact


def test_epsilon_moves_with_what_it_depends_on():
    values = dict(rounds=10, cohort=10, population=1000, noise_multiplier=2.0, delta=1e-5)
    of = lambda **changed: epsilon(**(values | changed))  # noqa: E731
    assert of(cohort=1000) > of(cohort=100) > of() > of(population=10000) > 0
    assert of(rounds=100) > of() > of(rounds=1)
    assert of(noise_multiplier=0.0) == math.inf > of(noise_multiplier=1.0) > of() > of(noise_multiplier=8.0)
    assert of(delta=1e-8) > of() > of(delta=1e-3)
