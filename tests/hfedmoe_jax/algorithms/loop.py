"""Rounds as loops over clients in NumPy: what the tests of algorithms compare with.

Clients are trained one by one; what the server makes of their changes is the test's own arithmetic.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from tiny import (
    TOKENS,
    VOCABULARY,
    tiny_algorithm,
    tiny_cohort,
    tiny_config,
    tiny_frozen,
    tiny_model,
    tiny_params,
)

from hfedmoe_jax.aggregation import Upload
from hfedmoe_jax.algorithms import compose
from hfedmoe_jax.client import Broadcast, make_client
from hfedmoe_jax.models import Params
from hfedmoe_jax.models.frozen import add_to_frozen
from hfedmoe_jax.optimizers import build_optimizer
from hfedmoe_jax.tasks import tasks

CLIENTS = 5
MODEL = {"model__num_layers": 1, "model__num_experts": 6}  # one layer: less to compile
FIELDS = MODEL | {"client__optimizer": "sgd", "client__learning_rate": 0.5, "fl__batch_size": 2}
BUDGETS = (2, 3, 4, 2, 3)
ROUNDS = (((0, 2, 3), None), ((0, 3, 4), (True, False, True)), ((1, 2, 3), None))
"""Cohorts, and which of their members do not drop out."""

TABLE_ROWS = 3 * 2 * TOKENS  # as many as a client's round has tokens, and fewer than the vocabulary


def config_of(**fields):
    return tiny_config(**({"budget__tiers": 1} | FIELDS | fields))


def algorithm_of(config, mesh=None):
    return tiny_algorithm(config, BUDGETS, mesh, table_rows=TABLE_ROWS)


def start() -> Params:
    return tiny_params(**MODEL)


def rounds(config):
    """Yields the cohort's data and the key of each round."""
    for number, (members, available) in enumerate(ROUNDS):
        yield tiny_cohort(config, members, BUDGETS, available), jax.random.key(number)


def doubles(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


class Member(NamedTuple):
    """A client of a round whose update counts: its number, what it changed (float64), what it reports."""

    client: int
    change: Params
    upload: Upload


def trained_alone(config, rule=None, frozen_fields=MODEL):
    """Returns `members(params, data, key, extra=(), added=None) -> list[Member]` without who dropped out.

    Args:
      rule: how they train; default as the compositions do.
      frozen_fields: of the config, that its frozen parameters depend on.
    """
    model = tiny_model(config)
    optimizer = build_optimizer(config.client, config.client.optimizer, "client")
    train = jax.jit(
        make_client(
            model, tasks["classification"], optimizer, rule or compose(config).rule, config, max(BUDGETS),
            TABLE_ROWS,
        )
    )  # fmt: skip

    def members(params, data, key, extra=(), added=None):
        found, frozen = [], add_to_frozen(tiny_frozen(**frozen_fields), added)
        for row in range(len(data.client)):
            one = jax.tree.map(lambda x, row=row: x[row], data)
            if one.available:
                update = train(Broadcast(params, frozen, extra, key), one)
                upload = jax.tree.map(np.asarray, update.upload)
                found.append(Member(int(one.client), change_of(update, params), upload))
        return found

    return members


def change_of(update, before) -> Params:
    """Returns a client's change of every parameter, by the rows that it says it holds."""
    before = doubles(before)
    after = jax.tree.map(np.copy, before)
    count = int(update.trained.count)
    owners, rows = (np.asarray(x)[:count] for x in (update.trained.expert, update.trained.row))
    for whole, held in zip(*map(jax.tree.leaves, (after.experts, update.params.experts)), strict=True):
        whole.reshape(-1, *whole.shape[2:])[owners] = np.asarray(held)[rows]
    shared = doubles(update.params.shared)
    if update.token is not None:
        used = np.asarray(update.token) < VOCABULARY
        after.shared["embed"][np.asarray(update.token)[used]] = shared["embed"][used]
        shared |= {"embed": after.shared["embed"]}
    after = Params(after.experts, doubles(update.params.router), shared)
    return jax.tree.map(np.subtract, after, before)


def by_expert(function, *trees):
    """Maps a function of (its place, or its group; tensors), of an expert or other, over Params."""

    def experts(*leaves):
        result = np.zeros_like(leaves[0])
        for place in np.ndindex(leaves[0].shape[:2]):
            result[place] = function(place, *(leaf[place] for leaf in leaves))
        return result

    return Params(
        jax.tree.map(experts, *(tree.experts for tree in trees)),
        *(
            jax.tree.map(functools.partial(function, group), *(getattr(tree, group) for tree in trees))
            for group in ("router", "shared")
        ),
    )


def assert_close(tree, expected, **tolerance) -> None:
    tolerance = {"rtol": 1e-5, "atol": 2e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, **tolerance), tree, expected)


def assert_same(tree, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def client(states, number: int):
    """Returns what the algorithm keeps of a client."""
    return jax.tree.map(lambda x: np.asarray(x)[number], states)


def mean(members: list[Member]) -> Params:
    """Returns the mean of the members' changes, weighted by the sizes of their data."""
    size = sum(float(member.upload.size) for member in members)
    scaled = [jax.tree.map(lambda x, m=m: x * float(m.upload.size) / size, m.change) for m in members]
    return jax.tree.map(lambda *changes: sum(changes), *scaled)
