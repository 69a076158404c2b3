"""Branch-Train-MiX (arXiv 2403.07816): an expert learns on one domain, then routers learn on all of them.

Domains are clusters of the texts, equally large, found by k-means on mean-pooled features (as c-BTM,
arXiv 2303.14177); there are as many as experts. Only the networks of the layers that become mixtures are
copied and trained. So, unlike in the paper, all other weights stay the dense model's, where it trains whole
copies and averages what is no network; and what enters these layers is computed once.

Axes: L layers, E experts, D model, T tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from hfedmoe_jax.upcycling import (
    DenseModel,
    Mixture,
    Network,
    balanced_clusters,
    stack,
    unit_rows,
    upcyclings,
)

EXPERT_STEPS, EXPERT_RATE = 16, 1e-4
ROUTER_STEPS, ROUTER_RATE = 24, 1e-3
BALANCE = 0.01  # weight of the load-balancing loss while routers learn
ROOM = 2.0  # slots of an expert over an even share of the tokens, while routers learn
RIDGE = 0.1  # of the mean variance, added to each direction's


@upcyclings.register("btx")
def btx(dense: DenseModel) -> Mixture:
    """Returns experts of F units, each trained on one domain, and routers trained on all domains."""
    group = domains(dense)
    parts = dense.module.text_parts
    experts = train_experts(dense, group)
    row_domain = np.repeat(group, parts)
    token_domain = np.broadcast_to(row_domain[:, None], dense.tokens_rt.shape)[dense.tokens_rt != 0]
    routers = [discriminant(inputs, token_domain, dense.shape.num_experts) for inputs in dense.inputs_lnd]
    return train_routers(dense, Mixture(experts, *stack(routers)))


def domains(dense: DenseModel) -> Int[np.ndarray, " texts"]:
    """Returns the domain of each text; -1 for those that no equal share has room for."""
    real = (dense.tokens_rt != 0)[..., None]
    pooled = np.sum(dense.features_rtd * real, 1) / np.maximum(np.sum(real, 1), 1)
    pooled = pooled.reshape(-1, dense.module.text_parts, pooled.shape[1]).mean(1)
    count = dense.shape.num_experts
    group = np.full(len(pooled), -1)
    whole = len(pooled) // count * count
    group[:whole] = balanced_clusters(unit_rows(pooled - pooled.mean(0))[:whole], count, dense.rng)
    return group


def rows_of(texts: Int[np.ndarray, " texts"], parts: int) -> Int[np.ndarray, " rows"]:
    """Returns the rows of texts, text after text."""
    return (texts[:, None] * parts + np.arange(parts)).reshape(-1)


def train_experts(dense: DenseModel, group: Int[np.ndarray, " texts"]) -> Network:
    """Returns copies of the networks, [L, E, ...], each of which learned on its domain for `EXPERT_STEPS`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(EXPERT_RATE, EXPERT_STEPS))

    @jax.jit
    def learn(carry: Any, params: dict, features_rtd: Any, tokens_rt: Any) -> Any:
        networks, state = carry
        slope = jax.grad(dense.module.network_loss, 1)(params, networks, features_rtd, tokens_rt)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(networks, updates), state

    start: Any = jax.tree.map(jnp.asarray, stack(dense.networks))
    trained = []
    for domain in range(dense.shape.num_experts):
        carry, texts = (start, optimizer.init(start)), np.flatnonzero(group == domain)
        for step in batches(texts, dense.module.step_texts, EXPERT_STEPS, dense.rng):
            rows = rows_of(step, dense.module.text_parts)
            carry = learn(carry, dense.params, dense.features_rtd[rows], dense.tokens_rt[rows])
        trained.append(jax.tree.map(np.asarray, carry[0]))
    return jax.tree.map(lambda *each: np.stack(each, 1), *trained)


def batches(
    texts: Int[np.ndarray, " texts"], size: int, steps: int, rng: np.random.Generator
) -> list[Int[np.ndarray, " batch"]]:
    """Returns batches of unlike texts, in turns over all of them in random order."""
    size = min(size, len(texts))
    made: list[np.ndarray] = []
    while len(made) < steps:
        order = rng.permutation(texts)
        made += [order[begin : begin + size] for begin in range(0, len(order) - size + 1, size)]
    return made[:steps]


def discriminant(
    inputs: Float[np.ndarray, "N D"], domain: Int[np.ndarray, " N"], count: int
) -> tuple[Float[np.ndarray, "D E"], Float[np.ndarray, " E"]]:
    """Returns kernel and bias of a router that gives each domain's probability, if vectors were Gaussian.

    That is Fisher's linear discriminant: W = S^-1 M, b = -diag(M' S^-1 M) / 2, with M the domains' means and
    S the covariance within domains, to which `RIDGE` is added.
    """
    mean = np.stack([inputs[domain == e].mean(0) for e in range(count)]).astype(np.float64)
    known = domain >= 0
    rest = inputs[known] - mean[domain[known]]
    spread = rest.T @ rest / len(rest)
    spread += RIDGE * np.trace(spread) / len(spread) * np.eye(len(spread))
    mean -= mean.mean(0)  # the same for all domains: it changes no probability
    kernel = np.linalg.solve(spread, mean.T)
    # Vectors are not centred: what they have in common is taken off in the bias.
    bias = -0.5 * np.sum(mean * kernel.T, 1) - inputs[known].mean(0) @ kernel
    return kernel.astype(np.float32), bias.astype(np.float32)


def train_routers(dense: DenseModel, mixtures: Mixture) -> Mixture:
    """Returns mixtures whose routers, and nothing else, learned on all texts for `ROUTER_STEPS`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(ROUTER_RATE, max(ROUTER_STEPS, 1)))

    def objective(routers: Any, params: dict, experts: Network, features_rtd: Any, tokens_rt: Any) -> Any:
        loss, balance = dense.module.mixture_loss(
            params, Mixture(experts, *routers), features_rtd, tokens_rt, ROOM
        )
        return loss + BALANCE * balance

    @jax.jit
    def learn(carry: Any, *arrays: Any) -> Any:
        routers, state = carry
        updates, state = optimizer.update(jax.grad(objective)(routers, *arrays), state)
        return optax.apply_updates(routers, updates), state

    experts = jax.tree.map(jnp.asarray, mixtures.experts)
    routers: Any = tuple(jnp.asarray(part) for part in mixtures[1:])
    carry, parts = (routers, optimizer.init(routers)), dense.module.text_parts
    texts = np.arange(len(dense.tokens_rt) // parts)
    for step in batches(texts, dense.module.step_texts, ROUTER_STEPS, dense.rng):
        rows = rows_of(step, parts)
        carry = learn(carry, dense.params, experts, dense.features_rtd[rows], dense.tokens_rt[rows])
    return Mixture(mixtures.experts, *(np.asarray(part) for part in carry[0]))
