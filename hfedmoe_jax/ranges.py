"""What the numbers of a config may be: one table of ranges, read before anything is built or allocated.

The upper ends of sizes are far above what a device holds; they keep products of sizes within 64 bits. What
does not fit this machine `check_memory` refuses.
"""

import math
import os
from typing import Any, NamedTuple

from hfedmoe_jax.errors import InputError


class Range(NamedTuple):
    """From `low` to `high`, each with or without the end itself; `example` lies within."""

    low: float
    high: float
    example: float
    above_low: bool = False
    below_high: bool = False

    def holds(self, value: float) -> bool:
        """Says whether a number lies within; NaN does not."""
        over = value > self.low if self.above_low else value >= self.low
        return over and (value < self.high if self.below_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:,g}" if self.above_low else f"at least {self.low:,g}"
        return f"{low} and {f'below {self.high:,g}' if self.below_high else f'at most {self.high:,.15g}'}"


def size(high: float, example: float, low: float = 1) -> Range:
    """Returns the range of a size or a count."""
    return Range(low, high, example)


POSITIVE = Range(0, 1e9, 1.0, above_low=True)
NOT_NEGATIVE = Range(0, 1e9, 0.1)
# What float32 holds apart from zero, and from one.
RATE = Range(1e-37, 1e38, 1e-3)
MOMENTUM = Range(0, 1 - 1e-7, 0.9)
SHARE = Range(0, 1, 0.5)
EPSILON = Range(1e-37, 1, 1e-8)
MILLION, BILLION = 1e6, 1e9

RANGES = {
    # JAX reads 32 bits of a seed; a larger one would draw the same numbers as a smaller.
    "seed": Range(0, 2**32 - 1, 0),
    "data.seq_len": size(2**20, 64, low=2),
    "data.vocab_size": size(2**24, 8192),
    "model.num_layers": size(1000, 2),
    "model.width": size(2**17, 128),
    "model.num_heads": size(2**17, 4),
    "model.hidden": size(2**20, 256),
    "model.num_experts": size(2**14, 8, low=2),
    "model.top_k": size(2**14, 1),
    "model.lora_rank": size(2**12, 8),
    "model.lora_alpha": POSITIVE._replace(example=16.0),
    "model.capacity_factor": Range(0, 1e4, 1.5),  # 0: room for every token
    "model.eval_capacity_factor": Range(0, 1e4, 2.0),
    "model.load_balance": NOT_NEGATIVE,
    "fl.clients": size(10 * MILLION, 20),
    "fl.clients_per_round": size(10 * MILLION, 10),
    "fl.rounds": size(BILLION, 40, low=0),  # 0: the start is evaluated
    "fl.local_steps": size(MILLION, 8),
    "fl.batch_size": size(MILLION, 16),
    "fl.dropout_probability": Range(0, 1, 0.1, below_high=True),
    "fl.chunk": size(2**20, 0, low=0),
    "importance.lam": SHARE,
    "importance.beta": NOT_NEGATIVE,
    "aggregation.tau": Range(0, 1, 0.02),
    "client.learning_rate": RATE,
    "client.learning_rate_decay": Range(0, 1, 0.98, above_low=True),
    "client.momentum": MOMENTUM,
    "client.second_momentum": MOMENTUM._replace(example=0.999),
    "client.epsilon": EPSILON,
    "client.proximal_mu": NOT_NEGATIVE,
    "dp.clip_norm": POSITIVE,
    "dp.noise_multiplier": NOT_NEGATIVE._replace(example=1.0),
    "dp.delta": Range(0, 1, 1e-5, above_low=True, below_high=True),
    "compression.fraction": Range(0, 1, 0.1, above_low=True),
    "server.learning_rate": Range(0, 1e38, 1.0),
    "server.momentum": MOMENTUM,
    "server.second_momentum": MOMENTUM._replace(example=0.99),
    "server.epsilon": EPSILON._replace(example=1e-3),
    "budget.fraction": Range(0, 1, 0.25),
    "budget.tiers": size(2**14, 0, low=0),
    "mesh.experts": size(2**14, 1),
    "eval.every": size(BILLION, 2),
    "eval.batch_size": size(MILLION, 64),
    "eval.max_examples": size(BILLION, 0, low=0),
    "checkpoint.every": size(BILLION, 5),
    "checkpoint.keep": size(BILLION, 3),
}
"""By field; the fields of `data` and `partition` that are not here are checked where the data are read."""


def check_ranges(lookup: Any) -> None:
    """Raises InputError for the first field out of its range.

    Args:
      lookup: field -> its value.
    """
    for field, allowed in RANGES.items():
        value = lookup(field)
        if not allowed.holds(value):
            raise InputError(field, value, f"must be {allowed}", f"use e.g. {allowed.example:g}")


def check_memory(model_bytes: int, memory_bytes: float | None = None) -> None:
    """Raises InputError for a model that is larger than the memory that is to hold it.

    Args:
      model_bytes: of one copy of the parameters.
      memory_bytes: of the devices of a copy; None: of this machine, if it says.
    """
    check_bytes(
        "model", f"{model_bytes / 1e9:,.4g} GB", "its parameters are", model_bytes,
        "use fewer layers or experts, a smaller width or vocabulary", memory_bytes,
    )  # fmt: skip


def check_batch(batch_size: int, step_bytes: int, memory_bytes: float | None = None) -> None:
    """Raises InputError for batches of which a step of one client does not fit the memory.

    Args:
      step_bytes: that it takes, without experts.
      memory_bytes: as in `check_memory`.
    """
    what, remedy = "what a client computes of such a batch is", "use smaller batches or shorter texts"
    check_bytes("fl.batch_size", batch_size, what, step_bytes, remedy, memory_bytes)


def check_local_steps(local_steps: int, block_bytes: float) -> None:
    """Raises InputError for rounds whose batches do not fit this machine.

    Args:
      block_bytes: what the clients of a block train on in a round.
    """
    what = "the batches of a block of clients, assembled and on the devices, are"
    check_bytes("fl.local_steps", local_steps, what, 2 * block_bytes, "use fewer steps or smaller batches")


def check_evaluation(
    batch_size: int, array_bytes: float, layer_bytes: float, memory_bytes: float | None = None
) -> None:
    """Raises InputError for batches too large to evaluate a model on.

    Args:
      array_bytes: of all batches, on this machine.
      layer_bytes: that a layer makes of a batch.
      memory_bytes: as in `check_memory`, for the latter.
    """
    remedy = "use smaller batches, e.g. 64"
    what = "the arrays of such batches, one a client among them, are"
    check_bytes("eval.batch_size", batch_size, what, array_bytes, remedy)
    what = "what a layer makes of such a batch is"
    check_bytes("eval.batch_size", batch_size, what, layer_bytes, remedy, memory_bytes)


def check_bytes(
    field: str, value: Any, what: str, num_bytes: float, remedy: str, memory_bytes: float | None = None
) -> None:
    """Raises InputError for a value that asks for more memory than there is.

    Args:
      field, value, remedy: of the error.
      what: takes the memory, and its verb, e.g. "its parameters are".
      num_bytes: that it takes.
      memory_bytes: that there are; None: of this machine, if it says.
    """
    if memory_bytes is None:
        try:
            memory_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, ValueError, OSError):  # not on every system
            memory_bytes = math.inf
    if num_bytes > memory_bytes:
        problem = f"{what} more than the memory of {memory_bytes / 1e9:,.4g} GB"
        raise InputError(field, value, problem, remedy)
