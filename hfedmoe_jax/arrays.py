"""The array type of functions that take NumPy arrays as well as JAX arrays, such as the equations."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
