"""DP-FedAvg: clients' updates clipped, their sum noisy (arXiv 1710.06963, with rounds of a fixed size).

Each client's whole change is clipped to an L2 norm of at most S = `dp.clip_norm`; all weights are one. To the
sum of the clipped changes the server adds Gaussian noise of standard deviation `dp.noise_multiplier` * S in
every coordinate of every parameter, untrained experts included, and divides by
`fl.clients_per_round`, however many clients finish.

epsilon, at `dp.delta`, is by Google's `dp-accounting`: Renyi accounting for samples without replacement
(arXiv 1808.00087), and neighbours that replace one client, with all of its data, by another. Two clipped
changes differ by up to 2 S, so the accountant's multiplier is half of `dp.noise_multiplier`.

What epsilon covers: the models of all rounds, as long as the seed is secret (cohorts and noise follow from
it) and clients drop out for reasons that do not depend on their data. Noise is drawn in float32; attacks on
the last bits of such noise are not defended against.

What it does not cover: everything else that the simulation reads of clients' data. That is the tokenizer, the
metrics and figures, and the best round, which the validation split chooses. Publish the last model.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload
from hfedmoe_jax.algorithms.algorithm import algorithms
from hfedmoe_jax.algorithms.composition import compose, refuse_literal_gating
from hfedmoe_jax.algorithms.method import Method
from hfedmoe_jax.algorithms.parts import Totals, Transformed, Weights
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import Params


@algorithms.register("dp_fedavg")
def dp_fedavg(config: ConfigDict) -> Method:
    """Returns the private algorithm; of `fl.base` it takes how clients train, and the server's optimizer."""
    check_privacy(config)
    refuse_literal_gating(config)
    dp, cohort = config.dp, config.fl.clients_per_round

    def step(totals: Totals, extra: Any) -> tuple[Params, Any]:
        clipped = optax.tree.scale(totals.count, totals.change)
        noisy = add_noise(clipped, dp.noise_multiplier * dp.clip_norm, totals.key)
        return optax.tree.scale(1 / cohort, noisy), extra

    def summary(rounds: int, population: int) -> dict[str, Any]:
        spent = epsilon(rounds, cohort, population, dp.noise_multiplier, dp.delta)
        return {"privacy": {"epsilon": spent, "unit": "client", **dp}}

    return compose(config)._replace(
        weights=Weights(one_an_expert, one, one),
        transform=lambda update: Transformed(clip(update.change, dp.clip_norm)),
        step=step,
        steps_always=True,  # noise also where no client finished
        summary=summary,
    )


def check_privacy(config: ConfigDict) -> None:
    """Raises InputError for a rule that weighs clients."""
    for rule in ("expert_rule", "gating_rule"):
        if config.fl[rule]:
            problem = "DP-FedAvg weighs all clients alike"
            raise InputError(f"fl.{rule}", config.fl[rule], problem, "leave it empty")


def one(upload: Upload, aggregation: ConfigDict) -> Array:
    """Weighs all clients alike."""
    return jnp.float32(1)


def one_an_expert(upload: Upload, aggregation: ConfigDict) -> Array:
    """Weighs all clients' experts alike, trained or not."""
    return jnp.ones_like(upload.usage)


def clip(change: Params, norm: float) -> Params:
    """Returns a change scaled down to an L2 norm over all parameters of at most `norm`."""
    return optax.tree.scale(norm / jnp.maximum(optax.tree.norm(change), norm), change)


def add_noise(sums: Params, deviation: float, key: Array) -> Params:
    """Returns sums with Gaussian noise in every coordinate, a key a tensor."""
    leaves, tree = jax.tree.flatten(sums)
    keys = jax.random.split(key, len(leaves))
    noise = [deviation * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return optax.tree.add(sums, tree.unflatten(noise))


def epsilon(rounds: int, cohort: int, population: int, noise_multiplier: float, delta: float) -> float:
    """Returns the epsilon spent; infinite without noise.

    Args:
      rounds: done so far.
      cohort, population: clients of a round, and in all.
      noise_multiplier, delta: of the config's section `dp`.
    """
    if noise_multiplier == 0:
        return math.inf
    import dp_accounting  # takes a second, which only private runs need to wait

    noise = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
    one_round = dp_accounting.SampledWithoutReplacementDpEvent(population, cohort, noise)
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    return accountant.compose(one_round, rounds).get_epsilon(delta)
