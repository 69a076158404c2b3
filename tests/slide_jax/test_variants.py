"""Pure functions of arrays give the same with and without `jit`, of arrays on the device and of NumPy's."""

import chex
import jax
import numpy as np
from absl.testing import parameterized

from slide_jax import admission, baselines, device, latency, rates, relaxed
from slide_jax.extensions.layer_clocks import cheapest_clocks
from slide_jax.extensions.memory import peak_memory
from slide_jax.extensions.weighted import fractional_bound

LAYERS, USERS = 3, 5


def uniform(*shape, low=0.5, high=2.0):
    return np.random.default_rng(0).uniform(low, high, shape)


LAYER_TABLES = (uniform(LAYERS, USERS), uniform(LAYERS, USERS)[::-1].copy())
PACES = (uniform(USERS), uniform(USERS)[::-1].copy())
NEEDS = np.array([3.0, 1.0, np.inf, 0.0, 2.0])
CASES = {
    "latency": (latency.latency, (*LAYER_TABLES, *PACES)),
    "latency_associative": (latency.latency_associative, (*LAYER_TABLES, *PACES)),
    "latency_closed_form": (latency.latency_closed_form, (*LAYER_TABLES, *PACES)),
    "dai_latency": (latency.dai_latency, (*LAYER_TABLES, *PACES)),
    "timeline": (latency.timeline, (*LAYER_TABLES, *PACES)),
    "least_rate": (latency.least_rate, (*LAYER_TABLES, 6 * PACES[0], PACES[1])),
    "peak_memory": (peak_memory, (*LAYER_TABLES, *PACES)),
    "linear_rate": (rates.linear_rate, PACES),
    "linear_bandwidth": (rates.linear_bandwidth, PACES),
    "shannon_rate": (rates.shannon_rate, PACES),
    "shannon_bandwidth": (rates.shannon_bandwidth, (PACES[0], 3 * PACES[1])),
    "inference_energy": (device.inference_energy, (*PACES, *PACES)),
    "best_clock": (
        device.best_clock,
        (PACES[0], 3 * PACES[1], uniform(USERS, high=0.6), uniform(USERS, low=2, high=3), *PACES),
    ),
    "admit": (admission.admit, (NEEDS, np.float64(4.0))),
    "admit_in_order": (baselines.admit_in_order, (NEEDS, np.arange(5)[::-1].copy(), np.float64(4.0))),
    "relax": (relaxed.relax, (NEEDS, np.float64(4.0))),
    "certificate": (relaxed.certificate, (NEEDS < 2, NEEDS, np.float64(4.0))),
    "fractional_bound": (fractional_bound, (PACES[0], NEEDS, np.float64(4.0))),
    "cheapest_clocks": (
        cheapest_clocks,
        (PACES[0], np.cumsum(PACES[1]), *map(np.float64, (20.0, 0.1, 9.0, 1.0, 0.2))),
    ),
}


class Variants(chex.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(jax.enable_x64(True))

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters(*((name, name) for name in CASES))
    def test_same_values_of_float64(self, name):
        function, arrays = CASES[name]
        expected = jax.tree.map(np.asarray, jax.vmap(function)(*(np.stack([x, x]) for x in arrays)))
        found = self.variant(function)(*arrays)
        chex.assert_trees_all_close(found, jax.tree.map(lambda column: column[1], expected), rtol=1e-12)
        chex.assert_trees_all_equal_dtypes(found, expected)
