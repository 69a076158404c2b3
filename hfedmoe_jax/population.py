"""Runs a function over a population: devices side by side, chunks one after another, a vmap inside.

A population comes in blocks of a fixed size, so memory depends on the size of a block and of a
chunk but not on how many members there are, and one compiled program serves them all.

Axes: D devices along "clients", B members of a block on a device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from hfedmoe_jax.budgeted import Place
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelCost, Params

CLIENTS, EXPERTS = "clients", "experts"
EVERYWHERE, BY_CLIENT = PartitionSpec(), PartitionSpec(CLIENTS)
BLOCK = 16  # members of a block on a device, if a chunk is not larger
MOST_CHUNK = 64
IN_FLIGHT = 8  # blocks that the host is ahead of the devices
NOBODY = -1


def make_mesh(devices: Sequence[jax.Device] | None = None, experts: int = 1) -> Mesh:
    """Returns a mesh with the axes `clients` and `experts`.

    Args:
      devices: default all of all processes.
      experts: over how many devices the experts of one client's model are spread.

    Raises:
      InputError: `experts` does not divide the number of devices of a process.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if experts < 1 or len(devices) % experts:
        problem = f"does not divide the {len(devices)} devices"
        raise InputError("mesh.experts", experts, problem, "use a divisor of their number, e.g. 1")
    grid = np.array(devices).reshape(-1, experts)
    if any(len({device.process_index for device in row}) > 1 for row in grid):
        problem = "would spread the experts of one client over several processes"
        raise InputError("mesh.experts", experts, problem, "use a divisor of a process's devices")
    return Mesh(grid, (CLIENTS, EXPERTS), axis_types=(AxisType.Auto, AxisType.Auto))


def place_of(mesh: Mesh, chunk: int) -> Place:
    """Returns where members of this mesh and chunk run."""
    return Place(None if chunk == 1 else "chunk", EXPERTS if mesh.shape[EXPERTS] > 1 else None)


def params_specs(params: Params) -> Params:
    """Returns how parameters lie on a mesh: experts [L, E, ...] spread, the rest everywhere."""
    spread = PartitionSpec(None, EXPERTS)
    return Params(
        jax.tree.map(lambda _: spread, params.experts),
        *jax.tree.map(lambda _: EVERYWHERE, (params.router, params.shared)),
    )


class Block(NamedTuple):
    """Members to run together.

    Attributes:
      tier: which program runs them.
      members: int [D, B], their places in the population, NOBODY where there is none.
      count: int [D], how many there are.
    """

    tier: int
    members: Int[np.ndarray, "devices block"]
    count: Int[np.ndarray, " devices"]


def block_size(chunk: int) -> int:
    """Returns B, the members of a block on a device: whole chunks."""
    return -(-BLOCK // chunk) * chunk


def chunk_size(wanted: int, cost: ModelCost, mesh: Mesh) -> int:
    """Returns how many clients run at once on a device, vmapped.

    A CPU takes one, whatever is wanted: a batch axis costs it a slower matrix product, and XLA rounds a
    program with one otherwise (it contracts multiply-adds by the shape of a loop). So a run on CPUs has
    the same bits at any setting. An accelerator takes what is wanted.

    Args:
      wanted: 0 for the largest power of two, at most 64, with which the clients' parameters, gradients,
        optimizer state and activations fill half of the memory.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return 1
    if wanted:
        return wanted
    limit = (device.memory_stats() or {}).get("bytes_limit", 16 * 2**30)
    held = cost.num_experts // mesh.shape[EXPERTS]
    one = cost.shared_training_bytes + held * (cost.expert_parameter_bytes + cost.expert_training_bytes)
    chunk = 2 ** int(np.clip(np.log2(max(1, 0.5 * limit / one)), 0, np.log2(MOST_CHUNK)))
    # Every process must run the same program, whatever its own device says.
    return int(np.min(multihost_utils.process_allgather(np.int32(chunk))))


def plan_blocks(
    tiers: Int[np.ndarray, " members"],
    mesh: Mesh,
    chunk: int,
    hosts: Int[np.ndarray, " members"] | None = None,
) -> list[Block]:
    """Deals a population out to the devices, tier by tier, the largest first.

    Args:
      tiers: of each member.
      mesh, chunk: where and in what portions they run.
      hosts: the process that has each member's data; default: any.

    Every process plans the same blocks. A process's members go to its own devices.
    """
    size = block_size(chunk)
    processes = np.array([device.process_index for device in mesh.devices[:, 0]])
    seats = [np.flatnonzero(processes == host) for host in range(processes.max() + 1)]
    if hosts is None:
        seats, hosts = [np.arange(len(processes))], np.zeros(len(tiers), int)
    dealt = [0] * len(seats)
    blocks = []
    for tier in sorted(set(tiers.tolist()), reverse=True):
        queues: list[list[int]] = [[] for _ in processes]
        for member in np.flatnonzero(tiers == tier):
            host = int(hosts[member])
            # Dealing goes on where the last tier ended, so that no device gets all the remainders.
            queues[seats[host][dealt[host] % len(seats[host])]].append(int(member))
            dealt[host] += 1
        for start in range(0, max(map(len, queues)), size):
            members = np.full((len(queues), size), NOBODY)
            for device, queue in enumerate(queues):
                part = queue[start : start + size]
                members[device, : len(part)] = part
            blocks.append(Block(tier, members, np.sum(members != NOBODY, axis=1, dtype=np.int32)))
    return blocks


def empty_places(blocks: Sequence[Block], chunk: int) -> float:
    """Returns the share of the computed places of chunks that have no member."""
    count = np.array([block.count for block in blocks])
    computed = np.sum(-(-count // chunk) * chunk)
    return float(1 - count.sum() / computed)


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
    """Returns `run(sums, broadcast, members, count) -> (sums, outputs)`, jitted, `sums` donated.

    Args:
      visit: (broadcast, member) -> (contribution, output).
      merge: (sums, broadcast, contributions [chunk, ...]) -> sums; None where there is nothing to sum.
      mesh, chunk: members computed at once on a device.
      broadcast_specs, sums_specs: how these lie on the mesh, prefix trees; sums have a leading axis D.

    `members` is a tree of arrays [D * B, ...], `count` [D] how many of each device's B there are; chunks
    without any are not computed, and their outputs are zero.
    """

    def run_on_device(sums: Any, broadcast: Any, members: Any, count: Any) -> tuple[Any, Any]:
        sums = jax.tree.map(lambda x: x[0], sums)

        def alone(member):
            return jax.tree.map(lambda x: x[None], visit(broadcast, jax.tree.map(lambda x: x[0], member)))

        def together(group):
            return jax.vmap(lambda member: visit(broadcast, member), axis_name="chunk")(group)

        _, shapes = jax.eval_shape(together, members)
        outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def turn(index, carry):
            sums, outputs = carry
            start = index * chunk
            group = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), members)
            # A batch axis of one costs a CPU a slower matrix product.
            contribution, output = alone(group) if chunk == 1 else together(group)
            if merge is not None:
                sums = merge(sums, broadcast, contribution)
            outputs = jax.tree.map(
                lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, 0), outputs, output
            )
            return sums, outputs

        turns = (count[0] + chunk - 1) // chunk
        sums, outputs = jax.lax.fori_loop(0, turns, turn, (sums, outputs))
        return jax.tree.map(lambda x: x[None], sums), outputs

    run = jax.shard_map(
        run_on_device,
        mesh=mesh,
        in_specs=(sums_specs, broadcast_specs, BY_CLIENT, BY_CLIENT),
        out_specs=(sums_specs, BY_CLIENT),
        check_vma=False,
    )
    return jax.jit(run, donate_argnums=0)


def collect(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function that makes arrays over the members readable on every process."""
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return lambda tree: tree
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, EVERYWHERE))


def fetch_finished(outputs: list[Any]) -> None:
    """Moves the outputs of a block to the host once `IN_FLIGHT` later ones are on their way to the devices.

    A round of so few blocks never waits; in a longer one device memory does not follow the population.
    """
    if len(outputs) > IN_FLIGHT:
        outputs[-1 - IN_FLIGHT] = jax.device_get(outputs[-1 - IN_FLIGHT])


def map_members(
    visit: Callable[[Any, Any], tuple[tuple, Any]], mesh: Mesh, chunk: int, broadcast_specs: Any
) -> Callable[[Any, Iterable[tuple[Block, Any]]], Any]:
    """Returns `run(broadcast, blocks) -> outputs` over the population, on the host; nothing is summed.

    Args:
      visit: (broadcast, member) -> ((), output).
      mesh, chunk, broadcast_specs: see `stream`.

    `blocks` are pairs of a `Block` and its members [D * B, ...] as host arrays.
    """
    program, readable = stream(visit, None, mesh, chunk, broadcast_specs), collect(mesh)

    def run(broadcast: Any, blocks: Iterable[tuple[Block, Any]]) -> Any:
        done, outputs = [], []
        for block, members in blocks:
            _, output = program((), broadcast, put_members(mesh, members), put_members(mesh, block.count))
            done.append(block)
            outputs.append(readable(output))
            fetch_finished(outputs)
        return unstack_members(done, outputs, sum(int(block.count.sum()) for block in done))

    return run
