"""Federated rounds for the suite `population`: clients with random texts, one round per call.

Axes: C clients, S local steps, B batch, T tokens.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from configs import hfedmoe
from hfedmoe_jax.algorithms import Portion, Setting, algorithms
from hfedmoe_jax.client import Broadcast, ClientData
from hfedmoe_jax.cost import model_cost
from hfedmoe_jax.devices import fraction_budget
from hfedmoe_jax.mesh import CLIENTS
from hfedmoe_jax.models import ModelSizes, build_model
from hfedmoe_jax.optimizers import build_optimizer
from hfedmoe_jax.population import put_members
from hfedmoe_jax.schedule import NOBODY, chunk_size
from hfedmoe_jax.slots import expert_capacity
from hfedmoe_jax.tasks import classification
from launch.hosts.compiled import Product, matrix_products

NUM_CLASSES = 5
SEED = 0
SHARE = 0.25  # of the experts, in tables with a single budget
LEARNING_RATE = 1e-3
"""Small enough that losses fall, agree between packages, and routing stays balanced.

At 0.01, differences of rounding route enough tokens to other experts to change a round's mean loss by 9e-4
nats within five rounds. At 0.1 the routing collapses to few experts within a round, which leaves a part of
the budgets unused.
"""


class Size(NamedTuple):
    """Sizes of a model and of a client's data.

    Attributes:
      name: of the model, in tables.
      width, hidden, num_experts, top_k, num_layers, num_heads, precision: see configs/hfedmoe.py.
      vocab_size, seq_len: of the texts.
      batch_size, steps: of a client's round.
    """

    name: str
    width: int
    hidden: int
    num_experts: int
    top_k: int
    num_layers: int = 2
    num_heads: int = 4
    precision: str = "float32"
    vocab_size: int = 8192
    seq_len: int = 64
    batch_size: int = 8
    steps: int = 4

    @property
    def all_experts(self) -> int:
        """Number of experts in all layers."""
        return self.num_layers * self.num_experts

    @property
    def capacity(self) -> int:
        """Slots of an expert for a batch."""
        factor = make_config(self).model.capacity_factor
        return expert_capacity(self.batch_size * self.seq_len, self.num_experts, self.top_k, factor)

    @property
    def expert_axes(self) -> tuple[int, int, int]:
        """The sizes (model, hidden units, slots) that together only the products of experts have."""
        return self.width, self.hidden, self.capacity


def make_fields(size: Size) -> dict[str, dict[str, Any]]:
    """Returns the config fields of a size with plain SGD, by section."""
    names = ("width", "hidden", "num_experts", "top_k", "num_layers", "num_heads", "precision")
    return {
        "model": {name: getattr(size, name) for name in names},
        "data": dict(vocab_size=size.vocab_size, seq_len=size.seq_len),
        "fl": dict(algorithm="fedavg", local_steps=size.steps, batch_size=size.batch_size),
        "client": dict(optimizer="sgd", learning_rate=LEARNING_RATE),
    }


def make_config(size: Size, **fields: Any) -> ConfigDict:
    """Returns the config of a size; `fields` override it by section, `fl=dict(...)`."""
    config = hfedmoe.get_config()
    for section, values in [*make_fields(size).items(), *fields.items()]:
        config[section].update(values)
    return config


def texts(size: Size, clients: Int[np.ndarray, " clients"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns random tokens [C, S, B, T] and labels [C, S, B], which depend on a client's index only."""
    tokens, labels = [], []
    for client in clients:
        rng = np.random.default_rng([SEED, client])
        shape = (size.steps, size.batch_size)
        tokens.append(rng.integers(1, size.vocab_size, (*shape, size.seq_len)))
        labels.append(rng.integers(0, NUM_CLASSES, shape))
    return np.array(tokens, np.int32), np.array(labels, np.int32)


class Rounds:
    """A population of clients in the engine, with the state of its server.

    Args:
      size: of the model.
      num_clients: C.
      mesh: the devices.
      chunk: clients computed together on a device; default: the engine's choice.
      budgets: shares of the experts, assigned to the clients in turn.
      fields: of the config, see `make_config`.

    Attributes:
      report: of the last round, by client.
      losses: of all rounds, a list of float [C].
    """

    def __init__(
        self,
        size: Size,
        num_clients: int,
        mesh: Mesh,
        chunk: int | None = None,
        budgets: Iterable[float] = (1.0,),
        **fields: Any,
    ):
        self.size, self.mesh, self.config = size, mesh, make_config(size, **fields)
        batch = {
            "tokens": jax.ShapeDtypeStruct((size.batch_size, size.seq_len), np.int32),
            "labels": jax.ShapeDtypeStruct((size.batch_size,), np.int32),
        }
        sizes = ModelSizes(NUM_CLASSES, size.vocab_size, size.seq_len)
        self.model = build_model(self.config.model, sizes, batch)
        self.params, frozen = jax.jit(self.model.init)(jax.random.key(SEED))
        experts = [fraction_budget(share, size.all_experts) for share in budgets]
        self.budget = np.resize(np.array(experts, np.int32), num_clients)
        optimizer = build_optimizer(self.config.client, "sgd", "client")
        cost = model_cost(self.model, classification, self.config.model, optimizer, batch)
        self.chunk = chunk or chunk_size(0, cost, mesh, num_clients)
        most_tokens = min(size.vocab_size, 1 + size.steps * size.batch_size * size.seq_len)
        setting = Setting(
            self.config, self.model, classification, frozen, self.budget, most_tokens, mesh, self.chunk
        )
        self.frozen = frozen
        self.algorithm = algorithms[self.config.fl.algorithm](self.config)(setting)
        # A copy, because each round donates its state, and peers start from the same parameters.
        self.state = self.algorithm.init(jax.tree.map(jnp.copy, self.params))
        self.losses = []

    def client_data(self, clients: Int[np.ndarray, " clients"]) -> ClientData:
        """Returns the data of clients for one round."""
        tokens, labels = texts(self.size, clients)
        same = np.ones(len(clients), np.float32)
        numbers = clients.astype(np.int32)
        batch = {"tokens": tokens, "labels": labels}
        return ClientData(numbers, batch, same, self.budget[clients], same > 0, same)

    def portions(self, cohort: int) -> Iterator[Portion]:
        """Yields the data of a round of the first `cohort` clients, block by block."""
        for block in self.algorithm.plan(np.arange(cohort)):
            members = block.members.reshape(-1)
            data = self.client_data(np.maximum(members, 0))
            data = data._replace(available=members != NOBODY)
            yield Portion(block, members, put_members(self.mesh, data))

    def train(self, portions: Iterable[Portion]) -> None:
        """Trains one round and waits for its end."""
        self.state, metrics = self.algorithm.round(self.state, portions, jax.random.key(SEED))
        jax.block_until_ready(self.state.params)
        self.report = metrics.report
        self.losses.append(np.asarray(metrics.report.loss))

    def call(self, cohort: int) -> Callable[[], None]:
        """Returns a call that trains one round of the first `cohort` clients, with data on the devices."""
        portions = list(self.portions(cohort))
        return lambda: self.train(portions)

    def compile(self, portion: Portion) -> tuple[jax.stages.Compiled, float, float]:
        """Returns the compiled program of a portion's tier, with the seconds of tracing and of compiling."""
        programs = self.algorithm.programs
        count = put_members(self.mesh, portion.block.count)
        broadcast = Broadcast(self.state.params, self.frozen, (), jax.random.key(SEED))
        arguments = (programs["open"](), broadcast, portion.data, count)
        begun = time.perf_counter()
        lowered = programs[f"tier {portion.block.tier}"].lower(*arguments)
        traced = time.perf_counter()
        program = lowered.compile()
        return program, traced - begun, time.perf_counter() - traced

    def step_products(self, program: jax.stages.Compiled, portion: Portion) -> list[Product]:
        """Returns the matrix products of one client step, `times` as an average over the program's steps.

        A loop over the selected experts is counted as if each batch used its whole budget, evenly over
        the layers.
        """
        block = portion.block
        chunks = -(-block.members.shape[1] // self.chunk)
        text = program.as_text()
        assert text is not None  # every backend of JAX's own has it
        found = matrix_products(text, (chunks, block.tier / self.size.num_layers))
        steps = chunks * self.chunk * self.size.steps
        return [each._replace(times=each.times / steps) for each in found]

    @property
    def num_devices(self) -> int:
        """Number of devices that the clients are spread over."""
        return self.mesh.shape[CLIENTS]
