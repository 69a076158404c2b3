"""The parts of a `Method`: weights, and what a client's update and a round's sums hold.

Axes: C clients in all, L MoE layers, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hfedmoe_jax.aggregation import Upload
from hfedmoe_jax.models import Params


class Weights(NamedTuple):
    """What a client's update counts: functions of its `Upload` and the config's section `aggregation`.

    Attributes:
      experts: -> float [L, E], an entry of `expert_rules`.
      router: -> float [], or [L, E]: one for each expert's row of the routers; an entry of `gating_rules`.
      shared: -> float [].
    """

    experts: Callable[[Upload, ConfigDict], Float[Array, "layers experts"]]
    router: Callable[[Upload, ConfigDict], Array]
    shared: Callable[[Upload, ConfigDict], Float[Array, ""]] = lambda upload, aggregation: upload.size


class Change(NamedTuple):
    """What a client changed, over all parameters, for an algorithm that transforms it.

    Attributes:
      start: the model before.
      change: after less before, zero where it trained nothing.
      sent: Params of bool arrays that broadcast against `change`: what has a weight above zero.
      moved: the same of what the client could move at all: experts that it trained, rows of its own tokens.
      upload: what it reports.
      rate: its learning rate over `client.learning_rate`.
      extra, state: the algorithm's broadcast arrays, and what it keeps of this client.
      key: of the client and round.
    """

    start: Params
    change: Params
    sent: Params
    moved: Params
    upload: Upload
    rate: Float[Array, ""]
    extra: Any
    state: Any
    key: Array


class Transformed(NamedTuple):
    """What becomes of a client's update.

    Attributes:
      change: what is summed.
      state: what is kept of the client; as it was, if its update does not count.
      summed: further arrays that are summed over the clients; numbers are cut to `sums.largest_term` of
        the cohort in magnitude, 2^14 up to a single client and e.g. 256 for 100.
    """

    change: Params
    state: Any = ()
    summed: Any = ()


class Totals(NamedTuple):
    """The sums of a round, for the server.

    Attributes:
      start: the model before.
      change: the weighted mean of the clients' changes.
      count: float32 [], clients that count.
      population: C.
      summed: sums of `Transformed.summed`.
      key: of the server in this round.
    """

    start: Params
    change: Params
    count: Float[Array, ""]
    population: int
    summed: Any
    key: Array
