"""Choose the bits of every layer so that the most users are served, with the noise of 8 bits everywhere.

python examples/quantise.py
"""

import numpy as np

from configs import slide
from slide_jax.profiles import profile
from slide_jax.quantise import quantise
from slide_jax.settings import sample_drop

# Users whose devices need 85-99% of the deadline for compute: for them the first layers decide.
config = slide.get_config()
config.setting.update(
    models=("gpt2",), accuracy_min=0.0, accuracy_max=0.0, compute_min=0.85, compute_max=0.99
)
config.setting.update(users=200, bandwidth_hz=1.5e10)

parameters = np.array([[layer.parameters for layer in profile("gpt2").layers]])
result = quantise(sample_drop(config), parameters, uniform_bits=8)

print(f"served with 8 bits everywhere: {result.served_uniform}")
print(f"served by the smallest model of the same noise: {result.served_smallest}")
print(f"served by the best bits found: {result.served}")
print(f"bits by layer: {result.bits_per_parameter[0].tolist()}")
