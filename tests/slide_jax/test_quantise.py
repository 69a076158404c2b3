"""Bits a layer: the budget of noise holds in whole numbers, nobody is worse off, gradients find what pays."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.problem import Users
from slide_jax.quantise import FEWEST_BITS, MOST_BITS, at_bits, noise, quantise
from slide_jax.scenario import make_problem
from slide_jax.verification import verify

EMBEDDING_FIRST = np.array([[900_000] + 23 * [30_000], [600_000] + 19 * [40_000] + 4 * [0]])
FLOP = np.array([[0.0] + 23 * [3 / 23], [0.0] + 19 * [3 / 19] + 4 * [0.0]])


def make(seed=0, users=40, compute=(0.85, 0.99), spectrum=None, bits=8):
    """Returns users whose compute takes a part of their deadline, and spectrum for half of them."""
    rng = np.random.default_rng(seed)
    deadline = rng.uniform(2, 8, users)
    models = [
        {
            "name": f"m{i}",
            "task": "t",
            "accuracy": 0.5 + 0.1 * i,
            "layers": [
                {"bits": float(n * bits), "flop": w} for n, w in zip(EMBEDDING_FIRST[i], FLOP[i], strict=True)
            ],
        }
        for i in range(2)
    ]
    columns = Users(
        task=-1,
        min_accuracy=0.0,
        deadline_s=deadline,
        start_s=0.0,
        energy_j=np.inf,
        spectral_efficiency_bps_hz=rng.uniform(1, 6, users),
        snr_hz=0.0,
        f_min_hz=1.0,
        f_max_hz=3 / (deadline * rng.uniform(*compute, users)),
        flop_per_cycle=1.0,
        kappa_j_per_hz2_cycle=0.0,
        static_power_w=0.0,
        memory_bits=np.inf,
        allowed=np.arange(2) == rng.integers(2, size=users)[:, None],
    )
    columns = dataclasses.replace(columns, f_min_hz=columns.f_max_hz / 2)
    problem = make_problem(models, columns, 1e12)
    if spectrum is None:
        spectrum = np.sort(exact(problem).bandwidth_hz)[: users // 2].sum()
    return dataclasses.replace(problem, bandwidth_hz=np.float64(spectrum))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("seed", range(2))
def test_the_budget_holds_and_nobody_serves_fewer_than_equal_bits(seed, bits):
    problem = make(seed, bits=bits)
    result = quantise(problem, EMBEDDING_FIRST, bits)
    present = EMBEDDING_FIRST > 0
    assert (result.bits_per_parameter[~present] == 0).all()
    assert (result.bits_per_parameter[present] >= FEWEST_BITS).all()
    assert (result.bits_per_parameter[present] <= MOST_BITS).all()
    for row, layers in zip(result.bits_per_parameter, present, strict=True):
        assert noise(row) <= layers.sum() * 4 ** (16 - bits)
        # The float sum agrees: 4^-q beside as many equal bits.
        assert (4.0 ** -row[layers]).sum() <= layers.sum() * 4.0**-bits * (1 + 1e-12)
    answer = exact(result.problem)
    assert verify(result.problem, answer) == []
    assert answer.throughput == result.served >= max(result.served_uniform, result.served_smallest)
    assert result.served_uniform == exact(problem).throughput
    sizes = EMBEDDING_FIRST * result.bits_per_parameter
    np.testing.assert_array_equal(result.problem.catalogue.layer_bits, sizes)


def test_gradients_serve_more_where_an_early_layer_decides():
    results = [quantise(make(seed), EMBEDDING_FIRST, 8) for seed in range(3)]
    served, smallest = sum(r.served for r in results), sum(r.served_smallest for r in results)
    assert served > smallest >= sum(r.served_uniform for r in results)
    first, *others = results[0].bits_per_parameter[0]
    assert first < 8 < max(others)


def test_equal_bits_stay_where_nothing_serves_more():
    plenty = quantise(make(spectrum=1e12), EMBEDDING_FIRST, 8)
    nothing = quantise(make(spectrum=0.0), EMBEDDING_FIRST, 8)
    for result in (plenty, nothing):
        np.testing.assert_array_equal(result.bits_per_parameter, np.where(EMBEDDING_FIRST > 0, 8, 0))
    assert plenty.served == plenty.served_uniform == 40
    assert nothing.served == 0


def test_one_user_gets_nearly_what_a_convex_solver_finds():
    problem = make(3, users=1, compute=(0.9, 0.9), spectrum=1e12)
    model = int(exact(problem).model[0])
    present = EMBEDDING_FIRST[model] > 0
    counts, flop = EMBEDDING_FIRST[model][present], FLOP[model][present]
    deadline, efficiency = problem.users.deadline_s[0], problem.users.spectral_efficiency_bps_hz[0]
    spare = deadline - np.cumsum(flop[::-1])[::-1] / problem.users.f_max_hz[0]
    unit = 8 * counts.sum() / deadline

    def constraint(x):
        return x[-1] - np.cumsum(counts * x[:-1]) / spare / unit

    best = minimize(
        lambda x: x[-1],
        np.r_[np.full(len(counts), 8.0), 100.0],
        constraints=[
            {"type": "ineq", "fun": constraint},
            {"type": "ineq", "fun": lambda x: len(counts) - np.sum(4 ** (8 - x[:-1]))},
        ],
        bounds=[(2, 16)] * len(counts) + [(0, None)],
        method="SLSQP",
    )
    least = best.x[-1] * unit / efficiency
    equal = exact(problem).bandwidth_hz[0]
    assert least < 0.95 * equal
    # Spectrum between the two: equal bits do not fit.
    spectrum = 0.3 * least + 0.7 * equal
    result = quantise(make(3, users=1, compute=(0.9, 0.9), spectrum=spectrum), EMBEDDING_FIRST, 8)
    assert (result.served_uniform, result.served) == (0, 1)
    assert exact(result.problem).bandwidth_hz[0] >= least * (1 - 1e-6)


def test_order_of_users_does_not_matter():
    problem = make(1)
    order = np.random.default_rng(0).permutation(40)
    columns = {f.name: getattr(problem.users, f.name)[order] for f in dataclasses.fields(problem.users)}
    shuffled = dataclasses.replace(problem, users=Users(**columns))
    one, other = (quantise(p, EMBEDDING_FIRST, 8) for p in (problem, shuffled))
    assert (one.served_uniform, one.served_smallest) == (other.served_uniform, other.served_smallest)
    assert one.served == other.served


def test_sizes_are_counts_times_bits():
    problem = at_bits(make(), EMBEDDING_FIRST, np.full((2, 24), 3))
    np.testing.assert_array_equal(problem.catalogue.layer_bits, 3 * EMBEDDING_FIRST)


@pytest.mark.parametrize(
    ("parameters", "bits", "message"),
    [
        (EMBEDDING_FIRST[:, :2], 8, "parameters="),
        (EMBEDDING_FIRST * 1.0, 8, "parameters="),
        (-EMBEDDING_FIRST, 8, "parameters="),
        (EMBEDDING_FIRST, 1, "uniform_bits=1: cannot be; give a whole number from 2 to 16"),
        (EMBEDDING_FIRST, 17, "uniform_bits=17"),
        (EMBEDDING_FIRST, 4.5, "uniform_bits=4.5"),
        (EMBEDDING_FIRST, True, "uniform_bits=True"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input_is_refused_by_name(parameters, bits, message):
    with pytest.raises(InputError) as error:
        quantise(make(), parameters, bits)
    assert str(error.value).startswith(message)
