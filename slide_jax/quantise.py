"""Bits per parameter of each layer that serve the most users, found by gradient ascent.

A layer of n parameters sent at q bits takes n q bits. Fewer bits cost accuracy. The proxy for that loss is
the ratio of quantisation noise to signal at the model's output: one bit less raises a layer's noise by 6 dB,
and the noise of the layers adds up, whatever their sizes. So the noise budget is the sum of 4^-q_l over a
model's layers, which may not exceed that of equal bits everywhere.

Under this budget the bits of the smallest model fall by half a bit with every doubling of n. But the latency
of a user is determined by one layer and the bits up to it (`latency`): later layers can be sent at more bits,
and the noise budget be spent on the earlier ones. The search starts from the smallest model, follows the
gradient of the relaxed number of users served (`sensitivity`), rounds to whole bits within the budget and
compares the result with equal bits and with the smallest model by `exact`.

The gain depends on which layer determines the latency (`python -m launch.bench --suite=slide`: 400 users of
the plain cell, spectrum for half of them at 8 bits):
- compute 25 to 55% of the deadline: it is the last large layer; the smallest models serve 1 to 3% more
  users than equal bits, and the gradient adds nothing;
- 85 to 99%: GPT-2 and SmolLM2 wait for their embedding, and the gradient adds 1.4 and 9.4% to what the
  smallest models bring (6.8 and 7.2%); to ViT-B/16 1.3%, all there is.
With noise weighted by parameters (n_l 4^-q_l, Bennett 1948) equal bits are the smallest model.

Source of the proxy: Lin, Talathi and Annapureddy, "Fixed point quantization of deep convolutional networks",
ICML 2016 (arXiv 1511.06393). It is a proxy: no model is run.

Axes: I models, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Float, Int

from slide_jax.errors import InputError
from slide_jax.exact import exact
from slide_jax.float64 import to_float64
from slide_jax.hull import convex_hull
from slide_jax.problem import Problem
from slide_jax.provisioning import provision
from slide_jax.sensitivity import relax_problem

FEWEST_BITS, MOST_BITS = 2, 16
STEPS = 150


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """Bits of every layer, and the users served with them.

    Attributes:
      bits_per_parameter: of each layer; 0 where it has no parameters.
      problem: the problem at these bits.
      served: users that `exact` serves at these bits, never fewer than at the other two.
      served_uniform: at equal bits.
      served_smallest: at the bits that make each model smallest.
    """

    bits_per_parameter: Int[np.ndarray, "I L"]
    problem: Problem
    served: int
    served_uniform: int
    served_smallest: int


def quantise(problem: Problem, parameters: Int[ArrayLike, "I L"], uniform_bits: int) -> Quantisation:
    """Returns bits for each layer that serve the most users found, with no more noise than equal bits.

    Args:
      problem: its `layer_bits` are replaced.
      parameters: of each layer; 0 beyond a model's own layers.
      uniform_bits: the equal bits whose noise is the budget, `FEWEST_BITS` to `MOST_BITS`.

    Returns:
      The best of equal bits, the smallest models and those that climbed; of equals the first.

    Raises:
      InputError: parameters of another shape than `layer_bits`, negative or not whole; bits out of range.
    """
    parameters = _checked(problem, parameters, uniform_bits)
    equal = np.where(parameters > 0, uniform_bits, 0)
    uniform = at_bits(problem, parameters, equal)
    sizes = parameters.astype(np.float64)
    with jax.enable_x64(True):
        hull = convex_hull(uniform.catalogue.layer_bits, uniform.catalogue.layer_flop)
        climbed = _climb(hull, to_float64(uniform), sizes, np.float64(uniform_bits))
        smallest, bits, worth = map(np.asarray, climbed)
    candidates = [
        equal,
        _whole(smallest, np.ones_like(sizes), parameters, uniform_bits),
        _whole(bits, worth, parameters, uniform_bits),
    ]
    problems = [at_bits(problem, parameters, bits) for bits in candidates]
    served = [exact(candidate).throughput for candidate in problems]
    best = int(np.argmax(served))
    return Quantisation(candidates[best], problems[best], served[best], served[0], served[1])


def at_bits(
    problem: Problem, parameters: Int[ArrayLike, "I L"], bits_per_parameter: Int[ArrayLike, "I L"]
) -> Problem:
    """Returns the problem with its layers sent at these bits a parameter."""
    sizes = np.asarray(parameters, np.float64) * bits_per_parameter
    return dataclasses.replace(problem, catalogue=dataclasses.replace(problem.catalogue, layer_bits=sizes))


def noise(bits_per_parameter: Int[ArrayLike, " L"]) -> int:
    """Returns the sum of 4^(16 - q_l) over a model's layers with parameters, a whole number.

    >>> noise(np.array([16, 15, 0]))
    5
    """
    return sum(4 ** (MOST_BITS - int(bits)) for bits in bits_per_parameter if bits)


@jax.jit
def _climb(hull, problem, parameters, uniform_bits):
    """Returns the bits of the smallest models, those that serve the most, relaxed, and a bit's worth there.

    Each model's shares take normalised steps that shorten with the root of their number, as the number
    served has kinks; the best of all steps counts. The worth [users per bit of size] is at least 0.
    `jaxopt.ProjectedGradient` with line search, shares projected on the simplex, finds bits that serve as
    many users in all cases of the bench and takes 1.3 to 10 times as long.
    """
    model = provision(hull, problem).model

    def served(layer_bits):
        catalogue = dataclasses.replace(problem.catalogue, layer_bits=layer_bits)
        return relax_problem(dataclasses.replace(problem, catalogue=catalogue), model).served

    def step(state, number):
        shares, best_shares, most = state
        value, slope = jax.value_and_grad(
            lambda shares: served(parameters * _bits(shares, parameters, uniform_bits))
        )(shares)
        best_shares = jnp.where(value > most, shares, best_shares)
        length = jnp.sqrt(jnp.sum(slope**2, axis=1, keepdims=True))
        shares = shares + slope / jnp.where(length > 0, length, 1.0) / jnp.sqrt(number)
        return (shares, best_shares, jnp.maximum(value, most)), None

    smallest = jnp.log(jnp.where(parameters > 0, parameters, 1.0))
    first = (smallest, smallest, jnp.full((), -jnp.inf))
    (_, shares, _), _ = lax.scan(step, first, jnp.arange(1.0, STEPS + 1))
    bits = _bits(shares, parameters, uniform_bits)
    return _bits(smallest, parameters, uniform_bits), bits, -jax.grad(served)(parameters * bits)


def _bits(shares, parameters, uniform_bits):
    """Returns bits, not yet whole, that split the noise in shares, given by logarithms up to a constant.

    Within the range of bits, the noise is that of equal bits.
    """
    present = parameters > 0
    shares = jax.nn.log_softmax(shares, axis=1, where=present)
    layers = jnp.sum(present, axis=1, keepdims=True)
    bits = uniform_bits - jnp.log2(jnp.maximum(layers, 1)) / 2 - jnp.where(present, shares, 0.0) / np.log(4)
    return jnp.where(present, jnp.clip(bits, FEWEST_BITS, MOST_BITS), 0.0)


def _whole(
    bits: Float[np.ndarray, "I L"],
    worth: Float[np.ndarray, "I L"],
    parameters: Int[np.ndarray, "I L"],
    uniform_bits: int,
) -> Int[np.ndarray, "I L"]:
    """Returns whole bits within the budget, rounded up at first.

    Then, where the budget is kept, what is worth most for its noise loses a bit, as often as the rest of
    the budget allows; where it is not, because the range stops at `MOST_BITS`, the noisiest gains one.
    """
    whole = np.ceil(bits - 1e-9).astype(int)
    for row, gain in zip(whole, worth * parameters, strict=True):
        present = row > 0
        spare = int(present.sum()) * 4 ** (MOST_BITS - uniform_bits) - noise(row)
        while spare < 0:
            noisiest = int(np.argmin(np.where(present, row, MOST_BITS + 1)))
            spare += 3 * 4 ** (MOST_BITS - int(row[noisiest]) - 1)
            row[noisiest] += 1
        while True:
            added = 3.0 * 4.0 ** (MOST_BITS - row)
            value = np.where(present & (row > FEWEST_BITS) & (added <= spare), gain / added, 0.0)
            layer = int(np.argmax(value))
            if value[layer] <= 0:
                break
            spare -= 3 * 4 ** (MOST_BITS - int(row[layer]))
            row[layer] -= 1
    return whole


def _checked(
    problem: Problem, parameters: Int[ArrayLike, "I L"], uniform_bits: int
) -> Int[np.ndarray, "I L"]:
    parameters, shape = np.asarray(parameters), np.shape(problem.catalogue.layer_bits)
    if parameters.shape != shape:
        raise InputError("parameters", parameters.shape, f"is not of shape {shape}", "give one a layer")
    if parameters.dtype.kind not in "iu" or (parameters < 0).any():
        raise InputError("parameters", str(parameters.dtype), "are not counts", "give whole numbers from 0")
    is_whole = isinstance(uniform_bits, (int, np.integer)) and not isinstance(uniform_bits, bool)
    if not (is_whole and FEWEST_BITS <= uniform_bits <= MOST_BITS):
        remedy = f"give a whole number from {FEWEST_BITS} to {MOST_BITS}"
        raise InputError("uniform_bits", uniform_bits, "cannot be", remedy)
    return parameters.astype(np.int64)
