"""What another megahertz, 100 ms more, and a smaller layer would be worth.

python examples/gradients.py
"""

import slide_jax
from configs import slide
from slide_jax.settings import sample_drop

problem = sample_drop(slide.get_config())
allocation = slide_jax.solve(problem)

margins = slide_jax.margins(problem)
print(f"users served for another MHz: {1e6 * margins.spectrum_users_per_hz:.3f}")

sensitivities = slide_jax.sensitivities(problem, allocation)
user = allocation.served.argmax()
deadline_hz_per_s = sensitivities.deadline_hz_per_s[user]
print(f"spectrum that user {user} needs with another 100 ms: {0.1e-6 * deadline_hz_per_s:.3f} MHz")

layer_hz_per_bit = sensitivities.layer_bits_hz_per_bit[user]
layer = layer_hz_per_bit.argmax()
print(f"and with its layer {layer} a megabit smaller: {-layer_hz_per_bit[layer]:.3f} MHz")
