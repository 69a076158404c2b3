"""Mixtures of experts from the dense networks of a pretrained model, by name.

A method sees a dense model and public text, and returns experts and routers, nothing else. Most methods see
one layer at a time (`by_layer`): its network, and vectors that enter it. What several methods share is here.

    copy      every expert is the network (sparse upcycling, arXiv 2212.05055): identical experts, the control
    split     hidden units that are active together become an expert (MoEfication, arXiv 2110.01786), then
              router and experts learn for some seconds to give what the whole network gives
    cluster   an expert a cluster of inputs: the network, reduced to what that cluster uses (cluster-aware
              upcycling, arXiv 2604.13508); the centroids are the router's rows
    btx       an expert a domain: copies of the networks that learned on that domain alone, then routers that
              learn on all of them (Branch-Train-MiX, arXiv 2403.07816), see `hfedmoe_jax.btx`

Axes: L layers, N tokens, E experts, D model, F hidden, U units of an expert.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import Registry

CLUSTER_TURNS = 20
DISTILL_STEPS, DISTILL_BATCH = 250, 1024
ROUTER_RATE, EXPERT_RATE = 3e-3, 5e-4
BALANCE = 0.01  # weight of the load-balancing loss while a mixture learns from its network
KEPT_ENERGY = 0.99  # of a cluster's products with a matrix, which its reduced matrix keeps
SHARPNESS = 10.0  # of a router whose rows are centroids on the unit sphere


class Network(NamedTuple):
    """A dense network of one layer, without the bias of its output, or several on leading axes.

    Arrays are NumPy's or JAX's.

    Attributes:
      in_df, out_fd: float32 [D, F], [F, D].
      bias_f: [F] of plain hidden units, gelu(x in + bias); None if they are gated.
      gate_df: [D, F] of gated ones, silu(x gate) * (x in); None if they are plain.
    """

    in_df: Any
    out_fd: Any
    bias_f: Any = None
    gate_df: Any = None

    def arrays(self) -> dict[str, Any]:
        """Returns those that there are, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}


class Mixture(NamedTuple):
    """The mixture that a network became.

    Attributes:
      experts: a network each; [E, D, U], [E, U, D], and [E, U] or [E, D, U].
      router_de, router_e: kernel and bias of the router.
    """

    experts: Network
    router_de: Any
    router_e: Any


class Shape(NamedTuple):
    """What a mixture is to be: E experts, of which a token takes `top_k`."""

    num_experts: int
    top_k: int


class DenseModel(NamedTuple):
    """A dense model of which mixtures are to be made, and public text; a row is a text or a part of one.

    Attributes:
      module: that the mixtures are for, with the losses `network_loss` and `mixture_loss`.
      params: of the dense model.
      networks: of the layers that become mixtures.
      inputs_lnd: float32 [L, N, D], what enters them, of real tokens.
      features_rtd: float32 [rows, T, D], what enters the first of these layers.
      tokens_rt: int32 [rows, T], 0 is padding; `module.text_parts` rows a text.
      rng: of what chance decides.
    """

    module: Any
    params: dict
    networks: list[Network]
    inputs_lnd: np.ndarray
    features_rtd: np.ndarray
    tokens_rt: np.ndarray
    rng: np.random.Generator

    @property
    def shape(self) -> Shape:
        return Shape(self.module.num_experts, self.module.top_k)


upcyclings = Registry("model.upcycling")
"""Methods `DenseModel -> Mixture`, arrays [L, ...], by name."""


def by_layer(make: Callable[..., Mixture]) -> Callable[[DenseModel], Mixture]:
    """Returns the method that makes each layer's mixture by `make(network, inputs [N, D], shape, rng)`."""

    @functools.wraps(make)
    def method(dense: DenseModel) -> Mixture:
        layers = zip(dense.networks, dense.inputs_lnd, strict=True)
        return stack([make(network, inputs, dense.shape, dense.rng) for network, inputs in layers])

    return method


def stack(layers: Sequence[Any]) -> Any:
    """Returns trees of arrays as one, with a leading axis."""
    return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def expert_size(config: ConfigDict, layers: int, hidden_units: int) -> tuple[int, float]:
    """Returns the hidden units of an expert, and the scale of a token's renormalised weights.

    Args:
      config: the section `model`.
      layers, hidden_units: of the dense checkpoint.

    Raises:
      InputError: an unknown method, more mixtures than layers, or units that cannot be cut into experts.
    """
    upcyclings[config.upcycling]  # refuses an unknown name
    if config.num_layers > layers:
        problem = f"above the checkpoint's {layers} layers"
        raise InputError("model.num_layers", config.num_layers, problem, "make mixtures of the last few")
    if config.upcycling != "split":
        return hidden_units, 1.0
    if hidden_units % config.num_experts:
        problem = f"does not divide the checkpoint's {hidden_units} hidden units"
        raise InputError("model.num_experts", config.num_experts, problem, "use a divisor")
    return hidden_units // config.num_experts, float(config.top_k)


def hidden(network: Network, x_nd: Float[AnyArray, "N D"]) -> Float[Array, "*E N F"]:
    """Returns the hidden units; of each network, if they have a leading axis E."""
    if network.gate_df is not None:
        return jax.nn.silu(x_nd @ network.gate_df) * (x_nd @ network.in_df)
    assert network.bias_f is not None
    return jax.nn.gelu(x_nd @ network.in_df + network.bias_f[..., None, :], approximate=False)


def output(network: Network, x_nd: Float[AnyArray, "N D"]) -> Float[Array, "N D"]:
    """Returns [N, D], without the bias."""
    return hidden(network, x_nd) @ network.out_fd


@upcyclings.register("copy")
@by_layer
def copy(network: Network, inputs: np.ndarray, shape: Shape, rng: np.random.Generator) -> Mixture:
    """Returns identical experts and a random router: the function stays, whoever is chosen."""
    experts = jax.tree.map(lambda part: np.repeat(part[None], shape.num_experts, 0), network)
    router = rng.normal(0, 0.02, (inputs.shape[1], shape.num_experts)).astype(np.float32)
    return Mixture(experts, router, np.zeros(shape.num_experts, np.float32))


@upcyclings.register("split")
@by_layer
def split(network: Network, inputs: np.ndarray, shape: Shape, rng: np.random.Generator) -> Mixture:
    """Returns experts of F / E units each, which learned with their router to stand in for the network."""
    sample = inputs[rng.permutation(len(inputs))[:4096]]
    strength = np.asarray(hidden(network, sample)) * np.linalg.norm(network.out_fd, axis=1)
    if network.gate_df is not None:  # gated units are active in either sign
        strength = np.abs(strength)
    group = balanced_clusters(unit_rows(strength.T), shape.num_experts, rng)
    order = np.argsort(group, kind="stable").reshape(shape.num_experts, -1)
    inwards, outwards = (network.in_df, network.bias_f, network.gate_df), network.out_fd[order]
    in_edu, bias_eu, gate_edu = jax.tree.map(lambda part: np.moveaxis(part[..., order], -2, 0), inwards)
    experts = Network(in_edu, outwards, bias_eu, gate_edu)
    # The router begins as the linear fit of how much each expert's units do.
    done = np.sqrt(np.stack([np.sum(strength[:, units] ** 2, 1) for units in order], 1))
    done = (done - done.mean()) / done.std()
    with_one = np.concatenate([sample, np.ones((len(sample), 1), np.float32)], 1)
    ridge = with_one.T @ with_one + len(sample) * 1e-3 * np.eye(with_one.shape[1], dtype=np.float32)
    fit = np.linalg.solve(ridge, with_one.T @ done).astype(np.float32)
    return distill(network, Mixture(experts, fit[:-1], fit[-1]), inputs, shape, rng)


def distill(
    network: Network, mixture: Mixture, inputs: np.ndarray, shape: Shape, rng: np.random.Generator
) -> Mixture:
    """Returns a mixture trained for `DISTILL_STEPS` of Adam to give the network's output."""
    rates = {"router": ROUTER_RATE, "experts": EXPERT_RATE}
    labels: Any = Mixture("experts", "router", "router")  # pyright: ignore[reportArgumentType]
    optimizer = optax.multi_transform(
        {
            name: optax.adam(optax.cosine_decay_schedule(rate, max(DISTILL_STEPS, 1)))
            for name, rate in rates.items()
        },
        labels,
    )
    loss = functools.partial(distill_loss, network=network, top_k=shape.top_k)

    @jax.jit
    def learn(carry, x_nd):
        mixture, state = carry
        updates, state = optimizer.update(jax.grad(loss)(mixture, x_nd), state)
        return optax.apply_updates(mixture, updates), state

    start: Any = jax.tree.map(jnp.asarray, mixture)
    carry = (start, optimizer.init(start))
    for _ in range(DISTILL_STEPS):
        carry = learn(carry, inputs[rng.integers(0, len(inputs), DISTILL_BATCH)])
    return jax.tree.map(np.asarray, carry[0])


def distill_loss(mixture: Mixture, x_nd: AnyArray, network: Network, top_k: int) -> Array:
    """Returns the squared error over the squared output, and the load-balancing loss by `BALANCE`."""
    wanted = output(network, x_nd)
    found, gates, weight = mix(mixture, x_nd, top_k, float(top_k))
    error = jnp.sum((found - wanted) ** 2) / jnp.sum(wanted**2)
    used = jnp.mean(weight > 0, axis=0) / top_k
    return error + BALANCE * len(used) * jnp.sum(used * jnp.mean(gates, axis=0))


def mix(
    mixture: Mixture, x_nd: Float[AnyArray, "N D"], top_k: int, scale: float
) -> tuple[Float[Array, "N D"], Float[Array, "N E"], Float[Array, "N E"]]:
    """Returns the output, the gates over all experts, and the weights of those that a token takes."""
    gates = jax.nn.softmax(x_nd @ mixture.router_de + mixture.router_e)
    best, index = jax.lax.top_k(gates, top_k)
    best = scale * best / jnp.sum(best, axis=-1, keepdims=True)
    weight = jnp.sum(jax.nn.one_hot(index, gates.shape[-1]) * best[..., None], axis=-2)
    used_enu = hidden(mixture.experts, x_nd) * weight.T[..., None]
    return jnp.einsum("enu,eud->nd", used_enu, mixture.experts.out_fd), gates, weight


@upcyclings.register("cluster")
@by_layer
def cluster(network: Network, inputs: np.ndarray, shape: Shape, rng: np.random.Generator) -> Mixture:
    """Returns experts of F units, each the network as far as the inputs of its cluster use it."""
    rows = unit_rows(inputs)
    centre = rows[rng.choice(len(rows), shape.num_experts, replace=False)]
    for _ in range(CLUSTER_TURNS):
        nearest = np.argmax(rows @ centre.T, 1)
        mean = np.stack([rows[nearest == e].sum(0) if (nearest == e).any() else centre[e]
                         for e in range(shape.num_experts)])  # fmt: skip
        centre = unit_rows(mean)
    nearest = np.argmax(rows @ centre.T, 1)
    parts = [reduced(network, inputs[nearest == e]) for e in range(shape.num_experts)]
    experts = jax.tree.map(lambda *each: np.stack(each), *parts)
    length = np.linalg.norm(inputs, axis=1).mean()  # a router reads inputs as they are
    return Mixture(experts, (SHARPNESS / length * centre.T).astype(np.float32),
                   np.zeros(shape.num_experts, np.float32))  # fmt: skip


def reduced(network: Network, inputs: np.ndarray) -> Network:
    """Returns the network with matrices of the least rank that keep `KEPT_ENERGY` of their products."""
    if not len(inputs):
        return network
    inwards, units = (network.in_df, network.gate_df), np.asarray(hidden(network, inputs))
    in_df, gate_df = jax.tree.map(lambda matrix: low_rank(matrix, inputs), inwards)
    return Network(in_df, low_rank(network.out_fd, units), network.bias_f, gate_df)


def low_rank(matrix: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Returns the matrix W' of least rank with |X (W - W')|^2 <= (1 - KEPT_ENERGY) |X W|^2.

    The best one of each rank follows from the singular values of the products: W' = W V V' with V the leading
    right vectors of X W. These are those of C^(1/2) W with C = X' X, which has fewer rows.
    """
    inputs, matrix = inputs.astype(np.float64), matrix.astype(np.float64)
    if matrix.shape[0] < matrix.shape[1]:
        values, vectors = np.linalg.eigh(inputs.T @ inputs)
        root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
        _, strength, rows = np.linalg.svd(root @ matrix, full_matrices=False)
        values, vectors = strength[::-1] ** 2, rows[::-1].T
    else:
        products = inputs @ matrix
        values, vectors = np.linalg.eigh(products.T @ products)
    kept = np.cumsum(values[::-1]) / values.sum()
    rank = int(np.searchsorted(kept, KEPT_ENERGY) + 1)
    leading = vectors[:, ::-1][:, :rank]
    return (matrix @ leading @ leading.T).astype(np.float32)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Returns rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, 1e-12)


def balanced_clusters(
    rows: Float[np.ndarray, "items features"], count: int, rng: np.random.Generator
) -> Int[np.ndarray, " items"]:
    """Returns each item's cluster by k-means with clusters of equal size, on unit rows.

    An item goes to the best cluster with room; those that would lose most by another one choose first.
    """
    size = len(rows) // count
    centre = rows[rng.choice(len(rows), count, replace=False)]
    group = np.zeros(len(rows), int)
    for _ in range(CLUSTER_TURNS):
        likeness = rows @ centre.T
        preferred = np.argsort(-likeness, axis=1)
        best_two = -np.partition(-likeness, 1, axis=1)[:, :2]
        room = np.full(count, size)
        for item in np.argsort(best_two[:, 1] - best_two[:, 0]):
            group[item] = next(choice for choice in preferred[item] if room[choice])
            room[group[item]] -= 1
        centre = unit_rows(np.stack([rows[group == each].sum(0) for each in range(count)]))
    return group
