"""The budgeted expert layer: a mixture of experts in which only some experts cost anything.

`mix_experts` stands inside an ordinary Flax module, and `jax.vjp` differentiates the whole model. Two
channels run beside the activations, and carry what only the backward pass needs:

- The **tape** is a tree of rows, threaded through all layers unchanged. Its cotangent runs backwards, and
  each layer writes what it makes of its experts' gradients into their rows. So gradients have a row
  for each trained expert of the network instead of an array over all of them.
- The **permit** [L, H] is an output of zeros. Its cotangent gives the backward pass each expert's row in the
  tape, or -1 for an expert that is a constant of this pass: neither its weights nor its input
  get a gradient. So a selection may be made after the forward pass, from what it has shown.

    def objective(params, multiplier, tape):
        out = module.apply({"params": params}, batch, budget._replace(tape=tape, ...))
        return (loss(out), out.tape, out.permit), out.routing

    (loss, tape, permit), pull, routing = jax.vjp(objective, params, ones, tape, has_aux=True)
    rows = select(routing)                                  # float [L, H]
    d_params, d_multiplier, d_tape = pull((1.0, start_of_tape, rows))

What a row of the tape is, `Rules` says: the gradient (`gradient_rules`), or weights and optimizer state that
take their step as soon as the gradient is there (`bank`), so that no two gradients exist at once.
The cotangent of `multiplier`, ones [L, E], is d loss / d z of (8)-(12) of arXiv 2601.00583.

Loops over experts run as often as a layer has selected experts; in a chunk of clients (a `vmap` with an axis
name) as often as the client with the most.

Axes: N tokens, L layers, E experts of a layer, H experts of a layer on this device, K experts of a token,
R experts that run, S slots of an expert, D model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.extend.core import Literal
from jaxtyping import Array, Bool, Float, Int

from hfedmoe_jax.arrays import AnyArray
from hfedmoe_jax.mesh import ALONE, Place, chunk_max, psum_experts, shard_of
from hfedmoe_jax.slots import plan_slots, take_rows

Expert = Callable[[Any, Array], Array]
"""(weights of one expert, its tokens [S, D]) -> outputs [S, D]: a pure function, of any family."""


class Rules(NamedTuple):
    """How a pass treats experts. Static: pure functions and sizes.

    Attributes:
      read: (bank, expert) -> weights in the forward pass; `expert` is layer * H + expert.
      reread: (tape, bank, row, expert) -> weights in the backward pass, of an expert that is trained.
      write: (tape, context, row, expert, weights, gradient, reached) -> tape; `reached` is False where the
        expert served no token, and the tape must stay as it is.
      most: experts that run, over all layers, at most; a bound on memory.
      keep: keep of the experts that run what their derivative needs, instead of computing them again: up to
        1.09 times as fast on a CPU, for 5-12% more temporary memory (docs/benchmarks.md).
      place: the named axes that the pass runs under.
    """

    read: Callable[[Any, Array], Any]
    reread: Callable[[Any, Any, Array, Array], Any]
    write: Callable[..., Any]
    most: int
    keep: bool = True
    place: Place = ALONE


@struct.dataclass
class Experts:
    """What every layer is given alike.

    Attributes:
      bank: arrays that `rules.read` reads, without derivative.
      context: arrays that `rules.write` reads.
      rules: see there.
    """

    bank: Any
    context: Any
    rules: Rules = struct.field(pytree_node=False)


class LayerBudget(NamedTuple):
    """What each layer is given, arrays [L, ...] that a scan over layers cuts.

    Attributes:
      layer: int32 [L], its number.
      multiplier: float32 [L, E], factors of the experts' outputs.
      forward: bool [L, E], the experts that tokens may be sent to; None for all.
      bias: float32 [L, E], added to the routers' logits; None for nothing.
    """

    layer: Int[Array, "*layers"]
    multiplier: Float[Array, "*layers experts"]
    forward: Bool[Array, "*layers experts"] | None = None
    bias: Float[Array, "*layers experts"] | None = None


class Budget(NamedTuple):
    """What a client lets a model do in one pass.

    Attributes:
      experts: for all layers.
      layers: layer by layer.
      tape: rows of zeros; in and out of every layer in turn.
    """

    experts: Experts
    layers: LayerBudget
    tape: Any = ()


class Visits(NamedTuple):
    """The experts of a layer that a loop visits.

    Attributes:
      expert: int32 [H], their indices first, in ascending order.
      place: int32 [H], where each stands in `expert`.
      count: how many; an int if it is known when compiling.
    """

    expert: Int[Array, " local_experts"]
    place: Int[Array, " local_experts"]
    count: Array | int


def visits(selected: Bool[AnyArray, " local_experts"] | None, held: int) -> Visits:
    """Returns the visits to the selected experts of a layer; None selects all of `held`."""
    every = jnp.arange(held, dtype=jnp.int32)
    if selected is None:
        return Visits(every, every, held)
    rank = jnp.cumsum(selected, dtype=jnp.int32)
    place = jnp.where(selected, rank - 1, held)
    return Visits(jnp.zeros(held, jnp.int32).at[place].set(every, mode="drop"), place, rank[-1])


def for_each(visit: Visits, place: Place, body: Callable[[Any, Array, Array, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(carry, index, expert, valid)` for each visit, and returns the last carry.

    `index` counts the visits, `expert` is the expert's number on this device. Clients of a chunk take as many
    turns as the one with the most; `valid` is False, and the expert any, in the turns that a client does
    not need.
    """
    if place.chunk is None or isinstance(visit.count, int):
        return jax.lax.fori_loop(0, visit.count, lambda i, c: body(c, i, visit.expert[i], True), carry)
    turns = chunk_max(visit.count, place)
    return jax.lax.fori_loop(0, turns, lambda i, c: body(c, i, visit.expert[i], i < visit.count), carry)


class Pass(NamedTuple):
    """The static half of a layer's computation."""

    expert: Expert
    rules: Rules
    held: int


class Served(NamedTuple):
    """What a mixture of experts reports about its layer.

    Attributes:
      permit: float32 [H], zeros; see the module.
      sent, kept: int32 [E], tokens that each expert was sent, and had room for.
      slots: int32 [], the slots of all experts that ran.
    """

    permit: Float[Array, "*layers local_experts"]
    sent: Int[Array, "*layers experts"]
    kept: Int[Array, "*layers experts"]
    slots: Int[Array, "*layers"]


def mix_experts(
    expert: Expert,
    capacity: int,
    experts: Experts,
    layer: LayerBudget,
    tape: Any,
    h_nd: Float[Array, "tokens model"],
    index_nk: Int[Array, "tokens k"],
    weight_nk: Float[Array, "tokens k"],
) -> tuple[Float[Array, "tokens model"], Any, Served]:
    """Returns the weighted sum of the outputs of each token's experts.

    Args:
      expert: computes one expert.
      capacity: S, see `slots.expert_capacity`.
      experts, layer, tape: of the `Budget`, the layer's part of it.
      h_nd: what the experts read.
      index_nk, weight_nk: each token's experts and their weights; zero for an assignment that counts for
        nothing. A token is sent to experts of `layer.forward` only, which is the router's part.

    Returns:
      y [N, D] in the type of `h_nd`; the tape; the report of the layer.
    """
    num_experts, place = layer.multiplier.shape[0], experts.rules.place
    held, first = shard_of(num_experts, place)
    slots = plan_slots(index_nk, weight_nk > 0, num_experts, capacity, place)
    forward = layer.forward
    if forward is not None and place.shard is not None:
        forward = jax.lax.dynamic_slice_in_dim(forward, first, held)
    static = Pass(expert, experts.rules, held)
    y_nd, tape, permit = _mix(
        static, h_nd, weight_nk, layer.multiplier, tape,
        (index_nk, slots, forward, layer.layer * held), experts.bank, experts.context,
    )  # fmt: skip
    sent = jax.nn.one_hot(index_nk, num_experts, dtype=jnp.int32) * (weight_nk > 0)[..., None]
    ran = num_experts if layer.forward is None else jnp.sum(layer.forward, dtype=jnp.int32)
    return y_nd, tape, Served(permit, jnp.sum(sent, axis=(0, 1)), slots.kept, jnp.int32(capacity * ran))


def _mix_only(static: Pass, h_nd, weight_nk, multiplier_e, tape, plan, bank, context) -> tuple[Any, Any, Any]:
    return _forward(static, h_nd, weight_nk, multiplier_e, tape, plan, bank, context)[0]


_mix = jax.custom_vjp(_mix_only, nondiff_argnums=(0,))


def _forward(static: Pass, h_nd, weight_nk, multiplier_e, tape, plan, bank, context):
    expert, rules, held = static
    index_nk, slots, forward, base = plan
    ran = visits(forward, held)
    rows, capacity = min(held, rules.most), slots.token.shape[1]

    def compute(which):
        return run_keeping(
            expert, rules.keep, rules.read(bank, base + which), take_rows(h_nd, slots.token[which])
        )

    buffers = jax.tree.map(
        lambda x: jnp.zeros((rows, *x.shape), x.dtype), jax.eval_shape(compute, ran.expert[0])
    )

    def run(buffers, place, which, valid):
        place = jnp.minimum(place, rows - 1)
        return jax.tree.map(lambda rows, row: put(rows, place, row, valid), buffers, compute(which))

    y_rsd, kept = for_each(ran, rules.place, run, buffers)
    # From an expert's slots to its place among those that ran.
    place = jnp.append(ran.place, rows)[slots.of_assignment // capacity]
    row = jnp.where(place < rows, place * capacity + slots.of_assignment % capacity, rows * capacity)
    y_knd = take_rows(y_rsd.reshape(rows * capacity, -1), row)
    weight = (weight_nk * multiplier_e[index_nk]).astype(y_knd.dtype)
    y_nd = jnp.einsum("nk,knd->nd", weight, y_knd, preferred_element_type=jnp.float32)
    y_nd = psum_experts(y_nd, rules.place).astype(h_nd.dtype)
    residuals = (h_nd, weight_nk, multiplier_e, plan, bank, context, y_knd, kept)
    return (y_nd, tape, jnp.zeros(held, jnp.float32)), residuals


def _backward(static: Pass, residuals, cotangents):
    expert, rules, held = static
    h_nd, weight_nk, multiplier_e, (index_nk, slots, forward, base), bank, context, y_knd, kept = residuals
    dy_nd, tape, row_e = cotangents
    inner_nk = psum_experts(
        jnp.einsum("nd,knd->nk", dy_nd, y_knd, preferred_element_type=jnp.float32), rules.place
    )
    one_hot_nke = jax.nn.one_hot(index_nk, multiplier_e.shape[0])
    d_multiplier = jnp.einsum("nk,nke->e", weight_nk * inner_nk, one_hot_nke)
    factor_nk = weight_nk * multiplier_e[index_nk]
    factor_hs = take_rows(factor_nk.T.reshape(-1), slots.assignment)
    ran_place = visits(forward, held).place

    def train(carry, _, which, valid):
        dh, tape = carry
        row, token = row_e[which].astype(jnp.int32), slots.token[which]
        dy_sd = take_rows(dy_nd, token) * factor_hs[which][:, None].astype(dy_nd.dtype)
        # Read once and for all: a second read of rows that `write` changes would cost a copy of them.
        weights = jax.lax.optimization_barrier(rules.reread(tape, bank, row, base + which))
        saved = jax.tree.map(lambda x: x[jnp.minimum(ran_place[which], x.shape[0] - 1)], kept)
        gradient, dx_sd = pull_kept(expert, weights, take_rows(h_nd, token), saved, dy_sd)
        reached = jnp.any(token < h_nd.shape[0]) & valid
        tape = rules.write(tape, context, row, base + which, weights, gradient, reached)
        return dh.at[token].add(jnp.where(valid, dx_sd, 0).astype(dh.dtype), mode="drop"), tape

    trained = visits(row_e >= 0, held)
    dh, tape = for_each(trained, rules.place, train, (jnp.zeros(h_nd.shape, jnp.float32), tape))
    dh = psum_experts(dh, rules.place).astype(h_nd.dtype)
    return dh, inner_nk * multiplier_e[index_nk], d_multiplier, tape, None, None, None


_mix.defvjp(_forward, _backward)


def put(rows: Array, place: Array, row: Array, valid: Array | bool) -> Array:
    """Returns `rows` [R, ...] with `row` [...] at `place`, or unchanged where `valid` is False."""
    return rows.at[place].set(row if valid is True else jnp.where(valid, row, rows[place]))


def run_keeping(expert: Expert, keep: bool, weights: Any, x_sd: Array) -> tuple[Array, list[Array]]:
    """Returns an expert's outputs [S, D], and the residuals that `pull_kept` need not compute again.

    Args:
      keep: keep them; False returns none, and the backward pass computes the expert once more.
      weights: of one expert.
    """
    if not keep:
        return expert(weights, x_sd), []
    y_sd, pull = jax.vjp(expert, weights, x_sd)
    leaves = jax.tree.leaves(pull)
    return y_sd, [leaves[i] for i in kept_residuals(expert, weights, x_sd)]


def pull_kept(
    expert: Expert, weights: Any, x_sd: Array, saved: list[Array], dy_sd: Array
) -> tuple[Any, Array]:
    """Returns the gradients of an expert's weights and tokens.

    Args:
      saved: of `run_keeping`. Its values take the places of those that are computed here, which are then
        dead code; an empty list means that the expert is computed once more.
    """
    _, pull = jax.vjp(expert, weights, x_sd)
    if saved:
        leaves, tree = jax.tree.flatten(pull)
        for i, value in zip(kept_residuals(expert, weights, x_sd), saved, strict=True):
            leaves[i] = value
        pull = jax.tree.unflatten(tree, leaves)
    return pull(dy_sd)


def kept_residuals(expert: Expert, weights: Any, x_sd: Array) -> tuple[int, ...]:
    """Returns which leaves of an expert's pullback are worth keeping: those computed from its tokens.

    Weights and tokens are at hand in the backward pass, and casts of weights are cheap. An expert may narrow
    the list by `jax.checkpoint` with a policy.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights, x_sd))
    jaxpr = jax.make_jaxpr(lambda w, x: jax.tree.leaves(jax.vjp(expert, w, x)[1]))(*shapes).jaxpr
    return computed_from(jaxpr, jaxpr.invars[-1:])


def computed_from(jaxpr: Any, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Returns which outputs of a traced program are computed from some of its inputs, those left out."""
    computed = set(inputs)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in computed for v in equation.invars):
            computed.update(equation.outvars)
    computed.difference_update(inputs)
    return tuple(i for i, v in enumerate(jaxpr.outvars) if not isinstance(v, Literal) and v in computed)


def row_of(rows: Any, row: Array | int) -> Any:
    """Returns a row of a tree of arrays."""
    return jax.tree.map(lambda x: x[row], rows)


def flat(experts: Any) -> Any:
    """Returns a tree of arrays [L, H, ...] as [L * H, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), experts)


def gradient_rules(most: int, keep: bool = True, place: Place = ALONE) -> Rules:
    """Returns the rules of a plain pass: the bank is weights [L * H, ...], a row of the tape a gradient."""

    def write(tape, context, row, expert, weights, gradient, reached):
        return jax.tree.map(lambda rows, g: put(rows, row, g, reached), tape, gradient)

    return Rules(row_of, lambda tape, bank, row, expert: row_of(bank, expert), write, most, keep, place)


def open_layers(num_layers: int, num_experts: int, bias: Array | None = None) -> LayerBudget:
    """Returns what layers are given where all experts run."""
    ones = jnp.ones((num_layers, num_experts), jnp.float32)
    return LayerBudget(jnp.arange(num_layers, dtype=jnp.int32), ones, bias=bias)


def open_budget(weights: Any, num_experts: int, place: Place = ALONE, bias: Array | None = None) -> Budget:
    """Returns the budget of a pass that runs all experts, and has no use for their gradients.

    Gradients of everything else pass through all experts.

    Args:
      weights: of the experts, a tree of [L, H, ...].
      num_experts: E.
      place: where it runs.
      bias: see `LayerBudget`.

    Raises:
      TypeError: the pass is differentiated by the weights; their gradients come through the tape alone.
    """
    weights = _constant(weights)
    num_layers, held = jax.tree.leaves(weights)[0].shape[:2]
    rules = gradient_rules(num_layers * held, False, place)._replace(write=lambda tape, *_: tape)
    return Budget(Experts(flat(weights), (), rules), open_layers(num_layers, num_experts, bias))


@jax.custom_vjp
def _constant(weights: Any) -> Any:
    return weights


def _refuse(weights: Any) -> Any:
    raise TypeError("experts have no gradient of their own here: use a budget with a tape, see this module")


_constant.defvjp(_refuse, lambda _, cotangent: (cotangent,))
