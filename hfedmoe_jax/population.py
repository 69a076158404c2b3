"""Runs a function over a population: devices side by side, chunks one after another, a vmap inside.

A population comes in blocks of a fixed size, so memory depends on the size of a block and of a
chunk but not on how many members there are, and one compiled program serves them all.

Axes: C members that have a state, D devices along "clients", B members of a block on a device.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from hfedmoe_jax.mesh import BY_CLIENT, CLIENTS, REPLICATED, shapes_on_mesh
from hfedmoe_jax.schedule import NOBODY, Block

IN_FLIGHT = 8  # blocks that the host is ahead of the devices


def stack_members(tree: Any, members: Int[np.ndarray, "devices block"]) -> Any:
    """Returns the block's rows of arrays over the population; places without a member get row 0."""
    rows = np.maximum(members, 0).reshape(-1)
    return jax.tree.map(lambda x: np.asarray(x)[rows], tree)


def put_members(mesh: Mesh, tree: Any) -> Any:
    """Returns arrays [D * B, ...] on the devices; a process reads the rows of its own devices only."""
    sharding = NamedSharding(mesh, BY_CLIENT)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def unstack_members(blocks: Sequence[Block], outputs: Sequence[Any], size: int) -> Any:
    """Returns host arrays over the population from the outputs [D * B, ...] of its blocks, in order."""
    rows = np.concatenate([block.members.reshape(-1) for block in blocks])
    real = rows != NOBODY
    order = np.empty(size, np.int64)
    order[rows[real]] = np.flatnonzero(real)
    return jax.tree.map(lambda *parts: np.concatenate([np.asarray(x) for x in parts])[order], *outputs)


def stream(
    visit: Callable[[Any, Any], tuple[Any, Any]],
    merge: Callable[[Any, Any, Any], Any] | None,
    mesh: Mesh,
    chunk: int,
    broadcast_specs: Any,
    sums_specs: Any = (),
) -> Callable[[Any, Any, Any, Any], tuple[Any, Any]]:
    """Returns `program(sums, broadcast, members, count) -> (sums, outputs)`, jitted, `sums` donated.

    Args:
      visit: (broadcast, member) -> (contribution, output).
      merge: (sums, broadcast, contributions [chunk, ...]) -> sums; None where there is nothing to sum.
      mesh, chunk: members computed at once on a device.
      broadcast_specs, sums_specs: how these lie on the mesh, prefix trees; sums have a leading axis D.

    `members` is a tree of arrays [D * B, ...], `count` [D] how many of each device's B there are; chunks
    without any are not computed, and their outputs are zero.
    """

    # jit, inlined, traces the visit once for its shapes and for the loop.
    @functools.partial(jax.jit, inline=True)
    def visit_group(broadcast: Any, group: Any) -> tuple[Any, Any]:
        if chunk > 1:
            return jax.vmap(visit, (None, 0), axis_name="chunk")(broadcast, group)
        # A batch axis of one costs a CPU a slower matrix product.
        result = visit(broadcast, jax.tree.map(lambda x: x[0], group))
        return jax.tree.map(lambda x: x[None], result)

    def run_on_device(sums: Any, broadcast: Any, members: Any, count: Any) -> tuple[Any, Any]:
        sums, size = jax.tree.map(lambda x: x[0], sums), jax.tree.leaves(members)[0].shape[0]

        def group_at(start):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), members)

        _, shapes = jax.eval_shape(visit_group, broadcast, jax.eval_shape(group_at, 0))
        outputs = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), shapes)

        def turn(index, carry):
            sums, outputs = carry
            start = index * chunk
            contribution, output = visit_group(broadcast, group_at(start))
            if merge is not None:
                sums = merge(sums, broadcast, contribution)
            outputs = jax.tree.map(
                lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, 0), outputs, output
            )
            return sums, outputs

        turns = (count[0] + chunk - 1) // chunk
        sums, outputs = jax.lax.fori_loop(0, turns, turn, (sums, outputs))
        return jax.tree.map(lambda x: x[None], sums), outputs

    program = jax.shard_map(
        run_on_device,
        mesh=mesh,
        in_specs=(sums_specs, broadcast_specs, BY_CLIENT, BY_CLIENT),
        out_specs=(sums_specs, BY_CLIENT),
        check_vma=False,
    )
    return jax.jit(program, donate_argnums=0)


@functools.cache
def collect(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function that makes arrays over the members readable on every process."""
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return lambda tree: tree
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, REPLICATED))


def fetch_finished(outputs: list[Any]) -> None:
    """Moves the outputs of a block to the host once `IN_FLIGHT` later ones are on their way to the devices.

    A round of so few blocks never waits; in a longer one device memory does not follow the population.
    """
    if len(outputs) > IN_FLIGHT:
        outputs[-1 - IN_FLIGHT] = jax.device_get(outputs[-1 - IN_FLIGHT])


def map_members(program: Callable, mesh: Mesh, broadcast: Any, blocks: Iterable[tuple[Block, Any]]) -> Any:
    """Returns the outputs of a program that sums nothing, over a population, on the host.

    Args:
      program: of `stream`, without `merge`.
      mesh: of the program.
      blocks: with the members of each [D * B, ...], on the devices.
    """
    readable, done, outputs = collect(mesh), [], []
    for block, members in blocks:
        _, output = program((), broadcast, members, put_members(mesh, block.count))
        done.append(block)
        outputs.append(readable(output))
        fetch_finished(outputs)
    return unstack_members(done, outputs, sum(int(block.count.sum()) for block in done))


class StateStore:
    """What is kept of every member between rounds: arrays [C, ...], spread over the devices.

    C is rounded up to a multiple of 8 and of the devices, so that most numbers of devices share one shape,
    and a checkpoint.

    Args:
      mesh: devices.
      size: members.
    """

    def __init__(self, mesh: Mesh, size: int):
        step = int(np.lcm(8, mesh.shape[CLIENTS]))
        self.size, self.mesh = -(-size // step) * step, mesh
        sharding = NamedSharding(mesh, BY_CLIENT)
        self._open = jax.jit(self._repeat, out_shardings=sharding)
        self._gather = jax.jit(
            lambda store, index: jax.tree.map(lambda x: x[index], store), out_shardings=sharding
        )
        self._scatter = jax.jit(self._write, donate_argnums=0, out_shardings=sharding)

    def _repeat(self, state: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.size, *jnp.shape(x))), state)

    def _write(self, store: Any, index: Any, rows: Any) -> Any:
        return jax.tree.map(lambda x, new: x.at[index].set(new, mode="drop"), store, rows)

    @property
    def programs(self) -> dict[str, Callable]:
        """The compiled functions by name."""
        return {"gather states": self._gather, "scatter states": self._scatter}

    def arguments(self, state: Any, rows: int) -> dict[str, tuple]:
        """Returns the shapes of the programs' arguments; none for members without a state.

        Args:
          state: shapes of a member's.
          rows: D * B.
        """
        if not jax.tree.leaves(state):
            return {}

        def several(count: int) -> Any:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), state)
            return shapes_on_mesh(self.mesh, BY_CLIENT, shapes)

        index = jax.ShapeDtypeStruct((rows,), np.int32, sharding=NamedSharding(self.mesh, BY_CLIENT))
        store = several(self.size)
        return {"gather states": (store, index), "scatter states": (store, index, several(rows))}

    def open(self, state: Any) -> Any:
        """Returns a store in which every member has this state."""
        return self._open(state)

    def gather(self, store: Any, members: Int[np.ndarray, " rows"]) -> Any:
        """Returns the states of members [D * B], on their devices; of NOBODY any."""
        if not jax.tree.leaves(store):
            return store
        return self._gather(store, put_members(self.mesh, np.maximum(members, 0)))

    def scatter(self, store: Any, members: Int[np.ndarray, " rows"], rows: Any) -> Any:
        """Returns the store, which is consumed, with these states [D * B, ...]; NOBODY's are dropped."""
        if not jax.tree.leaves(store):
            return store
        index = np.where(members == NOBODY, self.size, members)
        return self._scatter(store, put_members(self.mesh, index), rows)
