"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix W and a trained one of rank r, W + scale * A B.

Every matrix of every expert has factors of its own, and so have attention's projections. `model.train=lora`
asks for them. The factors of the experts are then what the rest of the package calls experts
(`Params.experts`): they are scored, selected, trained, sent and aggregated, while the matrices lie among the
frozen parameters, once on the mesh.

Axes: L layers with experts, E experts, H experts of a layer on this device, D inputs, F outputs, R rank.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hfedmoe_jax.experts import Budget, row_of

LORA = "lora"
"""Of `model.train`."""
FACTORS = ("lora_a", "lora_b")


class LoraRule(NamedTuple):
    """Sizes of the adapters.

    Attributes:
      rank: r.
      scale: factor of A B, alpha / r.
    """

    rank: int
    scale: float


def lora_rule(config: ConfigDict) -> LoraRule | None:
    """Returns the adapters of a config's section `model`, None where it trains the matrices themselves."""
    return LoraRule(config.lora_rank, config.lora_alpha / config.lora_rank) if config.train == LORA else None


@struct.dataclass
class Adapted:
    """A matrix with its adapter, W + scale * A B; `precision.matmul` multiplies by it.

    Attributes:
      base: W [D, F], frozen, see `models.frozen`.
      a_dr, b_rf: A [D, R], B [R, F].
      scale: see `LoraRule`.
    """

    base: Any
    a_dr: Any
    b_rf: Any
    scale: float = struct.field(pytree_node=False)


def init_a(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Returns factors A [..., D, R], uniform within 1 / sqrt(D); B begins as zeros."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_factors(key: Array, experts: dict, rule: LoraRule) -> dict:
    """Returns factors for the matrices of experts, {..., "lora_a": [L, E, D, R], "lora_b": [L, E, R, F]}.

    Args:
      experts: a tree of [L, E, ...]; vectors of an expert have no factors and stay as they are.
    """
    factors = {}
    for number, (path, leaf) in enumerate(sorted(traverse_util.flatten_dict(experts).items())):
        if len(leaf.shape) == 4:
            *lead, inputs, outputs = leaf.shape
            a = init_a(jax.random.fold_in(key, number), (*lead, inputs, rule.rank))
            factors[(*path, FACTORS[0])] = a
            factors[(*path, FACTORS[1])] = jnp.zeros((*lead, rule.rank, outputs))
    return traverse_util.unflatten_dict(factors)


def join(experts: dict, factors: dict, scale: float) -> dict:
    """Returns a tree like `experts` with `Adapted` matrices where there are factors."""
    known = traverse_util.flatten_dict(factors)
    joined = {}
    for path, base in traverse_util.flatten_dict(experts).items():
        a, b = (known.get((*path, name)) for name in FACTORS)
        joined[path] = base if a is None else Adapted(base, a, b, scale)
    return traverse_util.unflatten_dict(joined)


def factors_of(weights: dict) -> dict:
    """Returns the factors of what `join` returned, or of a gradient of it."""
    factors = {}
    for path, leaf in traverse_util.flatten_dict(weights).items():
        if isinstance(leaf, Adapted):
            factors |= {(*path, FACTORS[0]): leaf.a_dr, (*path, FACTORS[1]): leaf.b_rf}
    return traverse_util.unflatten_dict(factors)


def adapt(budget: Budget, base: dict, scale: float) -> Budget:
    """Returns a budget whose experts are adapters of frozen matrices.

    Args:
      budget: of the factors.
      base: of all experts, a tree of [L * H, ...].
    """
    rules = budget.experts.rules

    def read(bank, expert):
        own, base = bank
        return join(row_of(base, expert), rules.read(own, expert), scale)

    def reread(tape, bank, row, expert):
        own, base = bank
        return join(row_of(base, expert), rules.reread(tape, own, row, expert), scale)

    def write(tape, context, row, expert, weights, gradient, reached):
        return rules.write(tape, context, row, expert, factors_of(weights), factors_of(gradient), reached)

    adapted = rules._replace(read=read, reread=reread, write=write)
    experts = dataclasses.replace(budget.experts, bank=(budget.experts.bank, base), rules=adapted)
    return budget._replace(experts=experts)


def adapter_pairs(tree: dict) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Returns the factors A, B of nested dicts by the path that they lie under."""
    leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(tree))
    return {
        path[:-1]: (a, leaves[(*path[:-1], FACTORS[1])])
        for path, a in leaves.items() if path[-1] == FACTORS[0]
    }  # fmt: skip


def matrix_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns where the matrix of factors that lie under a path is, among all parameters."""
    return path if path[0] == "experts" else (*path, "kernel")


class Dense(nn.Module):
    """A linear map as `nn.Dense`, with an adapter if there is a rule for one.

    Attributes:
      features: F.
      use_bias, dtype: as of `nn.Dense`.
      lora: see `LoraRule`.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    lora: LoraRule | None = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """Returns [..., F]."""
        x, width = inputs.astype(self.dtype), inputs.shape[-1]

        def times(x, name, init, *shape):
            return x @ self.param(name, init, shape).astype(self.dtype)

        y = times(x, "kernel", nn.initializers.lecun_normal(), width, self.features)
        if self.lora is not None:
            low = times(x, FACTORS[0], init_a, width, self.lora.rank)
            y += self.lora.scale * times(
                low, FACTORS[1], nn.initializers.zeros, self.lora.rank, self.features
            )
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y
