"""SLIDE problems small enough for sums by hand."""

import numpy as np

from slide_jax.problem import Users
from slide_jax.scenario import make_problem

TWO_LAYERS = {
    "name": "two",
    "task": "vision",
    "accuracy": 0.7,
    "layers": [{"bits": 1e6, "flop": 5e8}, {"bits": 3e6, "flop": 5e8}],
}
LAST = {"name": "last", "task": "vision", "accuracy": 0.9, "layers": [{"bits": 1e7, "flop": 1e8}]}
CHAT = {"name": "chat", "task": "language", "accuracy": 0.9, "layers": [{"bits": 1e6, "flop": 1e8}]}


def problem_of(*models: dict, bandwidth_hz: float = 1e7, rate_model: str = "linear", **columns):
    """Returns a problem whose device does 1e9 FLOP/s, at 2 bit/s/Hz, with a deadline of 3 s from second 1."""
    users = dict(
        task=0,
        min_accuracy=0.5,
        deadline_s=4.0,
        start_s=1.0,
        energy_j=np.inf,
        spectral_efficiency_bps_hz=2.0,
        snr_hz=1e7,
        f_min_hz=1e8,
        f_max_hz=1e9,
        flop_per_cycle=1.0,
        kappa_j_per_hz2_cycle=1e-27,
        static_power_w=0.0,
        memory_bits=np.inf,
    )
    return make_problem(models, Users(**users | columns), bandwidth_hz, rate_model)


def layers(*pairs) -> dict:
    return {**LAST, "layers": [{"bits": bits, "flop": flop} for bits, flop in pairs]}
