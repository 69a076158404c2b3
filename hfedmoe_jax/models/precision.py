"""Products in a chosen precision, with float32 parameters and float32 gradients of them.

Axes: S rows, D inputs, F outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfedmoe_jax.models.frozen import as_floats
from hfedmoe_jax.models.lora import Adapted

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""What models compute in. Parameters, gradients of experts, routers, losses, optimizers and the sums over
clients are float32 always; gradients of attention leave its products in the chosen precision."""


def matmul(x_sd: Float[Array, "rows inputs"], w: Any) -> Float[Array, "rows outputs"]:
    """Returns x w [S, F] in the precision of x; gradients of matrices are summed in float32.

    Args:
      w: a matrix [D, F], or one with an adapter: x W + scale * (x A) B, without a gradient of W.
    """
    if not isinstance(w, Adapted):
        return product(x_sd, w)
    y_sf = product(x_sd, jax.lax.stop_gradient(as_floats(w.base)))
    return y_sf + w.scale * product(product(x_sd, w.a_dr), w.b_rf)


@jax.custom_vjp
def product(
    x_sd: Float[Array, "rows inputs"], w_df: Float[Array, "inputs outputs"]
) -> Float[Array, "rows outputs"]:
    """Returns x w in the precision of x; the gradient of w is summed in float32."""
    return x_sd @ w_df.astype(x_sd.dtype)


def _forward(x_sd: Array, w_df: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x_sd, w_df), (x_sd, w_df)


def _backward(residuals: tuple[Array, Array], dy_sf: Array) -> tuple[Array, Array]:
    x_sd, w_df = residuals
    dw_df = jnp.einsum("sd,sf->df", x_sd, dy_sf, preferred_element_type=jnp.float32)
    return jnp.einsum("sf,df->sd", dy_sf, w_df.astype(dy_sf.dtype)), dw_df.astype(w_df.dtype)


product.defvjp(_forward, _backward)
