"""Averages of low-rank adapters, for `model.train=lora`.

The mean of factors, which every other algorithm takes, is not the factors of the mean: with A and B of each
client, mean(A) mean(B) differs from mean(A B).

- `flexlora` (FlexLoRA, arXiv 2402.11505): the server averages the products A B and cuts the mean to rank r by
  a singular value decomposition, so the mean is exact but for what the rank cannot hold. Uploads are the
  factors; the sums are as large as the matrices.
- `hetlora` (HetLoRA, arXiv 2401.06432): a client trains rank ceil(r * budget / experts), the first columns
  of A and rows of B; the server pads with zeros and weighs a client, besides `fl.base`'s weights, by the
  Frobenius norm of its products. Our decisions: one norm an expert, one for all shared adapters; ranks are
  not pruned further; `fl.base` trains all experts, for the budget is spent on ranks.

Axes: L layers, E experts, D inputs, F outputs, R rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation.running_mean import widen
from hfedmoe_jax.algorithms.algorithm import algorithms
from hfedmoe_jax.algorithms.composition import compose, refuse_literal_gating
from hfedmoe_jax.algorithms.method import Method
from hfedmoe_jax.algorithms.parts import Change, Totals, Transformed
from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import Params
from hfedmoe_jax.models.lora import FACTORS, LORA, adapter_pairs


@algorithms.register("flexlora")
def flexlora(config: ConfigDict) -> Method:
    """Returns `fl.base` whose server averages products."""
    method, aggregation = adapted(config), config.aggregation

    def transform(update: Change) -> Transformed:
        of_expert, of_rest = (
            weight(update.upload, aggregation) for weight in (method.weights.experts, method.weights.shared)
        )
        after = optax.tree.add(update.start, update.change)

        def sums(tree: Any, weight: Array) -> tuple[Array, list[Array]]:
            products = [a @ b for a, b in adapter_pairs(tree).values()]
            weighted = [jnp.where(w := widen(weight, x), w * x, 0) for x in products]
            return weight, weighted

        return Transformed(
            update.change, summed=(sums(after.experts, of_expert), sums(after.shared, of_rest))
        )

    def step(totals: Totals, extra: Any) -> tuple[Params, Any]:
        def refactored(change: dict, start: dict, summed: tuple[Array, list[Array]]) -> dict:
            weight, products = summed
            leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(change))
            for (path, old), total in zip(adapter_pairs(start).items(), products, strict=True):
                known = widen(weight, total) > 0
                new = factorise(total / jnp.where(known, widen(weight, total), 1), old[0].shape[-1])
                for name, after, before in zip(FACTORS, new, old, strict=True):
                    leaves[(*path, name)] = jnp.where(known, after - before, 0)
            return traverse_util.unflatten_dict(leaves)

        mean, start, (experts, shared) = totals.change, totals.start, totals.summed
        change = mean._replace(
            experts=refactored(mean.experts, start.experts, experts),
            shared=refactored(mean.shared, start.shared, shared),
        )
        return change, extra

    return method._replace(transform=transform, step=step)


@algorithms.register("hetlora")
def hetlora(config: ConfigDict) -> Method:
    """Returns `fl.base` whose clients train ranks by their budgets."""
    method, aggregation = adapted(config), config.aggregation
    if method.rule.uses_budgets:
        raise InputError("fl.base", config.fl.base, "spends budgets on experts, hetlora on ranks",
                         "use fl.base=fedavg")  # fmt: skip

    def transform(update: Change) -> Transformed:
        after = optax.tree.add(update.start, update.change)
        norms = product_norm(after.experts, 2), product_norm(after.shared, 0)
        change = update.change._replace(
            experts=jax.tree.map(lambda x: x * widen(norms[0], x), update.change.experts),
            shared=scale_adapters(update.change.shared, norms[1]),
        )
        weights = tuple(
            weight(update.upload, aggregation) for weight in (method.weights.experts, method.weights.shared)
        )
        pairs = tuple((w, w * norm) for w, norm in zip(weights, norms, strict=True))
        return Transformed(change, summed=pairs)

    def step(totals: Totals, extra: Any) -> tuple[Params, Any]:
        factors = [jnp.where(by_norm > 0, total / by_norm, 0) for total, by_norm in totals.summed]
        change = totals.change._replace(
            experts=jax.tree.map(lambda x: x * widen(factors[0], x), totals.change.experts),
            shared=scale_adapters(totals.change.shared, factors[1]),
        )
        return change, extra

    rule = method.rule._replace(start=truncate(config.model.lora_rank))
    return method._replace(rule=rule, transform=transform, step=step)


def adapted(config: ConfigDict) -> Method:
    """Returns `fl.base` for algorithms of adapters.

    Raises:
      InputError: there are none, or the server does not replace the model by the mean.
    """
    if config.model.train != LORA:
        problem, remedy = f"averages adapters, and model.train={config.model.train} has none", "use lora"
        raise InputError("fl.algorithm", config.fl.algorithm, problem, f"{remedy}, or another algorithm")
    refuse_literal_gating(config)
    method = compose(config)
    name, section = method.server
    if name != "sgd" or section.learning_rate != 1:
        problem = f"{config.fl.algorithm} replaces the adapters by their average"
        raise InputError("server.optimizer", name, problem, "use sgd with server.learning_rate=1")
    return method


def factorise(
    matrix: Float[AnyArray, "*lead inputs outputs"], rank: int
) -> tuple[Float[Array, "*lead inputs rank"], Float[Array, "*lead rank outputs"]]:
    """Returns the factors A, B of the best approximation of a rank, each with the roots of the values."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    room = min(rank, s.shape[-1])
    root = jnp.sqrt(s[..., :room])
    a, b = u[..., :room] * root[..., None, :], root[..., :, None] * v[..., :room, :]
    missing = rank - room  # of a matrix smaller than the rank
    lead = [(0, 0)] * (matrix.ndim - 2)
    return jnp.pad(a, [*lead, (0, 0), (0, missing)]), jnp.pad(b, [*lead, (0, missing), (0, 0)])


def product_norm(tree: dict, kept: int) -> Array:
    """Returns the Frobenius norm of all A B of a tree together.

    Args:
      kept: leading axes that have a norm each.
    """

    def square(a: Array, b: Array) -> Array:
        inner = jnp.sum((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2)), (-1, -2))
        return jnp.sum(inner, tuple(range(kept, inner.ndim)))

    return jnp.sqrt(sum((square(a, b) for a, b in adapter_pairs(tree).values()), jnp.float32(0)))


def scale_adapters(tree: dict, scale: Array) -> dict:
    """Returns a tree whose factors, and nothing else, are multiplied."""
    leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(tree))
    return traverse_util.unflatten_dict(
        {path: leaf * scale if path[-1] in FACTORS else leaf for path, leaf in leaves.items()}
    )


def truncate(rank: int) -> Any:
    """Returns a `LocalRule.start`: of the factors the client's first ranks, zeros after them.

    Where both factors are zero their gradients are, so that they stay so.
    """

    def start(params: Params, share: Float[Array, ""]) -> Params:
        own = client_rank(share, rank)

        def cut(tree: dict) -> dict:
            leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(tree))
            for path, leaf in leaves.items():
                if path[-1] in FACTORS:
                    axis = -1 if path[-1] == FACTORS[0] else -2
                    index = jnp.arange(leaf.shape[axis]).reshape((-1,) + (1,) * (-1 - axis))
                    leaves[path] = jnp.where(index < own, leaf, 0)
            return traverse_util.unflatten_dict(leaves)

        return params._replace(experts=cut(params.experts), shared=cut(params.shared))

    return start


def client_rank(share: Float[AnyArray, ""], rank: int) -> Int[Array, ""]:
    """Returns the rank that a client trains, at least 1.

    Args:
      share: its budget over all experts.
    """
    return jnp.maximum(jnp.ceil(share * rank - 1e-6), 1).astype(jnp.int32)
