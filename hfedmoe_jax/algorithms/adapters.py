"""Averages of low-rank adapters, for `model.train=lora`.

The mean of factors, which every other algorithm takes, is not the factors of the mean: with A and B of each
client, mean(A) mean(B) differs from mean(A B).

- `flexlora` (FlexLoRA, arXiv 2402.11505): the server averages the products A B and cuts the mean to rank r by
  a singular value decomposition, so the mean is exact but for what the rank cannot hold. Uploads are the
  factors; the sums are as large as the matrices.
- `flora` (FLoRA, arXiv 2409.05976): the server stacks the factors, which is adding up the weighted products,
  and adds scale * sum_c p_c A_c B_c to W, as exactly as float32 holds it. The next round begins with new
  adapters: A drawn anew, B zero. Where `fl.base` spends no budgets on experts, ranks follow budgets as in
  `hetlora`. Our decisions: p_c are `fl.base`'s weights, an expert at a time; all clients draw the same A, by
  the round's key; an expert whose W did not change keeps its A.
- `hetlora` (HetLoRA, arXiv 2401.06432): a client trains rank ceil(r * budget / experts), the first columns
  of A and rows of B; the server pads with zeros and weighs a client, besides `fl.base`'s weights, by the
  Frobenius norm of its products. Our decisions: one norm an expert, one for all shared adapters; ranks are
  not pruned further; `fl.base` trains all experts, for the budget is spent on ranks.

Axes: L layers, E experts, D inputs, F outputs, R rank.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from hfedmoe_jax.models.frozen import QUANTISED
from hfedmoe_jax.models.lora import FACTORS, LORA, adapter_pairs, init_a, lora_rule, matrix_path

RANK_AXES: dict[str, int] = dict(zip(FACTORS, (-1, -2), strict=True))


@algorithms.register("flexlora")
def flexlora(config: ConfigDict) -> Method:
    """Returns `fl.base` whose server averages products."""
    method = adapted(config)

    def step(totals: Totals, extra: Any) -> tuple[Params, Any]:
        means = mean_products(totals.summed)
        new = {path: factorise(mean, config.model.lora_rank) for path, mean in means.items()}
        return replace_factors(totals, new), extra

    return method._replace(transform=sum_products(method, config), step=step)


@algorithms.register("flora")
def flora(config: ConfigDict) -> Method:
    """Returns `fl.base` whose server adds the mean product to the frozen matrices."""
    method, rule = adapted(config), lora_rule(config.model)
    assert rule is not None
    if config.model.base in QUANTISED:
        raise InputError("model.base", config.model.base, "flora adds to W, which quantised takes no sums",
                         "use float32 or bfloat16")  # fmt: skip
    if config.model.adapters:
        raise InputError("model.adapters", config.model.adapters, "flora begins each round with new adapters",
                         "leave it empty, and name a merged model as model.source")  # fmt: skip

    def nothing(params: Params) -> dict:
        products = {path: jnp.zeros_like(a @ b) for path, (a, b) in all_factors(params).items()}
        return traverse_util.unflatten_dict(products)

    def step(totals: Totals, added: Any) -> tuple[Params, Any]:
        means = mean_products(totals.summed)
        new = {}
        for number, (path, (a, b)) in enumerate(sorted(all_factors(totals.start).items())):
            key = jax.random.fold_in(totals.key, number)
            new[path] = init_a(key, a.shape, a.dtype), jnp.zeros_like(b)
        scaled = traverse_util.unflatten_dict({path: rule.scale * mean for path, mean in means.items()})
        return replace_factors(totals, new), optax.tree.add(added, scaled)

    if not method.rule.uses_budgets:
        method = with_ranks(method, rule.rank)
    return method._replace(
        transform=sum_products(method, config), step=step, extra=nothing,
        added=lambda extra: extra,
        terms=lambda shapes: Params(*map(factors_alone, shapes)),
    )  # fmt: skip


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

    return with_ranks(method, config.model.lora_rank)._replace(transform=transform, step=step)


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


def sum_products(method: Method, config: ConfigDict) -> Callable[[Change], Transformed]:
    """Returns a `Method.transform` that sums weighted products, each beside its weight, by matrix."""

    def transform(update: Change) -> Transformed:
        of_expert, of_rest = (
            weight(update.upload, config.aggregation)
            for weight in (method.weights.experts, method.weights.shared)
        )

        def weighted(path: tuple[str, ...], a: Array, b: Array) -> tuple[Array, Array]:
            product, weight = a @ b, of_expert if path[0] == "experts" else of_rest
            wide = widen(weight, product)
            return jnp.where(wide > 0, wide * product, 0), weight

        after = all_factors(optax.tree.add(update.start, update.change))
        return Transformed(update.change, summed={path: weighted(path, *ab) for path, ab in after.items()})

    return transform


def mean_products(summed: Any) -> dict[tuple[str, ...], Array]:
    """Returns by matrix what `sum_products` summed as a mean [..., D, F], zero where no client counts."""

    def mean(total: Array, weight: Array) -> Array:
        known = widen(weight, total) > 0
        return jnp.where(known, total / jnp.where(known, widen(weight, total), 1), 0)

    return {path: mean(*sums) for path, sums in summed.items()}


def replace_factors(totals: Totals, new: dict[tuple[str, ...], tuple[Array, Array]]) -> Params:
    """Returns the change that makes these the factors of the matrices for which some client counts."""
    leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(one_tree(totals.change)))
    for path, old in adapter_pairs(one_tree(totals.start)).items():
        total, weight = totals.summed[matrix_path(path)]
        for name, after, before in zip(FACTORS, new[matrix_path(path)], old, strict=True):
            leaves[(*path, name)] = jnp.where(widen(weight, total) > 0, after - before, 0)
    shared = traverse_util.unflatten_dict(leaves)
    return totals.change._replace(experts=shared.pop("experts"), shared=shared)


def one_tree(params: Params) -> dict:
    """Returns the experts beside the shared parameters."""
    return params.shared | {"experts": params.experts}


def all_factors(params: Params) -> dict[tuple[str, ...], tuple[Array, Array]]:
    """Returns the factors A, B by matrix."""
    return {matrix_path(path): ab for path, ab in adapter_pairs(one_tree(params)).items()}


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


def map_factors(function: Callable[[str, Any], Any], tree: dict) -> dict:
    """Returns a tree whose factors, and nothing else, are what a function makes of name and leaf."""
    leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(tree))
    changed = {path: function(path[-1], leaf) for path, leaf in leaves.items() if path[-1] in FACTORS}
    return traverse_util.unflatten_dict(leaves | changed)


def scale_adapters(tree: dict, scale: Array) -> dict:
    """Returns a tree whose factors are multiplied."""
    return map_factors(lambda name, leaf: leaf * scale, tree)


def factors_alone(tree: dict) -> dict:
    """Returns the factors of a tree, and nothing else of it."""
    leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(tree))
    return traverse_util.unflatten_dict({path: x for path, x in leaves.items() if path[-1] in FACTORS})


def with_ranks(method: Method, rank: int) -> Method:
    """Returns a method whose clients train ranks of adapters by their budgets, and receive and send those."""

    def own(name: str, leaf: jax.ShapeDtypeStruct, rank: int) -> jax.ShapeDtypeStruct:
        shape = list(leaf.shape)
        shape[RANK_AXES[name]] = rank
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    def part(shapes: Params, share: Float[np.ndarray, ""]) -> Params:
        cut = functools.partial(own, rank=int(client_rank(share, rank)))
        experts, shared = (map_factors(cut, tree) for tree in (shapes.experts, shapes.shared))
        return shapes._replace(experts=experts, shared=shared)

    return method._replace(rule=method.rule._replace(start=truncate(rank)), part=part)


def truncate(rank: int) -> Any:
    """Returns a `LocalRule.start`: of the factors the client's first ranks, zeros after them.

    Where both factors are zero their gradients are, so that they stay so.
    """

    def start(params: Params, share: Float[Array, ""]) -> Params:
        own = client_rank(share, rank)

        def cut(name: str, leaf: Array) -> Array:
            axis = RANK_AXES[name]
            index = jnp.arange(leaf.shape[axis]).reshape((-1,) + (1,) * (-1 - axis))
            return jnp.where(index < own, leaf, 0)

        experts, shared = (map_factors(cut, tree) for tree in (params.experts, params.shared))
        return params._replace(experts=experts, shared=shared)

    return start


def client_rank(share: Float[AnyArray, ""], rank: int) -> Int[Array, ""]:
    """Returns the rank that a client trains, at least 1.

    Args:
      share: its budget over all experts.
    """
    return jnp.maximum(jnp.ceil(share * rank - 1e-6), 1).astype(jnp.int32)
