"""Forward and backward pass of a step in which only some experts cost anything.

The two passes are written out instead of left to `jax.grad`, for three reasons. Which experts a
batch trains is known only after its forward pass, and then needs no second one. Arrays over
experts have a row for each selected expert, not for each expert. And an expert's gradient is
consumed the moment it is computed, so no two of them exist at once.

The loops over slots run as often as a layer has selected experts; under a `vmap` with an axis name, as
often as the member with the most.

Axes: B batch, T tokens, N = B * T, L layers, E experts of this device, K experts of a token, R slots
of the forward pass, S tokens of a slot, D model, F hidden.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hfedmoe_jax.bank import flat, row_of
from hfedmoe_jax.models import MoeModel, Params, Slots, all_slots
from hfedmoe_jax.models.dispatch import SlotPlan, expert_capacity, plan_slots, take_rows
from hfedmoe_jax.models.routing import Assignment, assign, load_balancing_loss, own_choice


class Place(NamedTuple):
    """Where a computation runs, beside other members of a chunk and other shards of the experts.

    Attributes:
      chunk: name of the vmapped axis of clients, or None.
      shard: name of the mesh axis that a layer's experts are spread over, or None.
    """

    chunk: str | None = None
    shard: str | None = None


ALONE = Place()
UNROLL = 2  # layers a turn of a scan: fewer residuals to stack


class Seen(NamedTuple):
    """What the routers did with a batch.

    Attributes:
      gates: float32 [L, N, all experts], softmax over all experts, G(x) of (1).
      own: bool, same shape; the tokens' own top-k experts, whatever is open.
      sent, kept: int32 [L, all experts]; tokens that each expert was sent, and had room for.
    """

    gates: Float[Array, "layers tokens experts"]
    own: Bool[Array, "layers tokens experts"]
    sent: Int[Array, "layers experts"]
    kept: Int[Array, "layers experts"]


class SlotTokens(NamedTuple):
    """Which tokens the slots of one layer serve.

    Attributes:
      row: each assignment's row in arrays [R * S, ...], R * S where it has none here.
      token, weight: of each expert of this device, its tokens (N where empty) and their gates.
    """

    row: Int[Array, "k tokens"]
    token: Int[Array, "experts tokens"]
    weight: Float[Array, "experts tokens"]


class Residuals(NamedTuple):
    """What the backward pass needs; stacked over layers but for `hidden` and `y`, with a row a slot.

    `route` holds a layer's pullback, or with `remat` nothing but its input.
    """

    route: Any
    h: Float[Array, "layers tokens model"]
    weight: Float[Array, "layers tokens k"]
    expert: Int[Array, "layers tokens k"]
    served: SlotTokens
    y: Float[Array, "slots tokens model"]
    hidden: Float[Array, "slots tokens hidden"] | None


def total(values: Array, place: Place) -> Array:
    """Returns the sum over the shards of the experts."""
    return values if place.shard is None else jax.lax.psum(values, place.shard)


def experts_here(model: MoeModel, place: Place) -> tuple[int, Array | int]:
    """Returns how many experts of a layer this device holds, and the first of them."""
    if place.shard is None:
        return model.num_experts, 0
    held = model.num_experts // jax.lax.axis_size(place.shard)
    return held, jax.lax.axis_index(place.shard) * held


def here(model: MoeModel, of_all: Array | None, place: Place) -> Array | None:
    """Returns this device's part [L, held] of an array over all experts [L, E]."""
    if of_all is None or place.shard is None:
        return of_all
    held, first = experts_here(model, place)
    return jax.lax.dynamic_slice_in_dim(of_all, first, held, axis=1)


def everywhere(of_held: Array, place: Place) -> Array:
    """Returns an array over all experts [L, E] from each device's part [L, held]."""
    return of_held if place.shard is None else jax.lax.all_gather(of_held, place.shard, axis=1, tiled=True)


def most_turns(count: Array, place: Place) -> Array:
    """Returns the largest count of a chunk's members: a bound that they share keeps a loop a loop."""
    return count if place.chunk is None else jax.lax.pmax(count, place.chunk)


def for_each_slot(slots: Slots, layer: Array, place: Place, body: Callable, carry: Any) -> Any:
    """Runs `carry = body(carry, slot, valid)` over a layer's slots.

    Members of a chunk take as many turns as the one with the most slots; `valid` is False, and `slot`
    any, in turns that a member has no slot for.
    """
    first, count, last = slots.first[layer], slots.count[layer], slots.expert.shape[0] - 1
    if slots.most is not None or place.chunk is None:
        turns = count if slots.most is None else slots.most
        return jax.lax.fori_loop(0, turns, lambda i, carry: body(carry, first + i, True), carry)

    def visit(i, carry):
        return body(carry, jnp.minimum(first + i, last), i < count)

    return jax.lax.fori_loop(0, most_turns(count, place), visit, carry)


def make_route(model: MoeModel, token_mask_bt: Bool[Array, "batch tokens"]) -> Callable:
    """Returns everything of a block before its experts, as a function to differentiate."""
    token_mask = token_mask_bt.reshape(-1)

    def route(shared, router, x, forward):
        x, h = model.pieces.attend(shared, x, token_mask_bt)
        forward = jnp.ones(model.num_experts, bool) if forward is None else forward
        gates, assignment = assign(model.pieces.route(router, h), forward, token_mask, model.top_k)
        own = own_choice(gates, token_mask, model.top_k)
        balance = load_balancing_loss(gates, own, token_mask)
        return (x, h, assignment.weight, balance), (assignment.expert, gates, own)

    return route


def local_slots(
    plan: SlotPlan, weight: Array, slot: Int[Array, " experts"], first: Array | int, rows: int
) -> SlotTokens:
    """Returns the part of a layer's plan that this device's slots serve.

    Args:
      plan: of all experts.
      weight: of the assignments [N, K].
      slot: of each of this device's experts; `rows` for none.
      first: its first expert.
      rows: R.
    """
    num_experts, capacity = plan.token.shape
    held = slot.shape[0]
    expert = plan.slot // capacity - first
    row = jnp.where((expert >= 0) & (expert < held), slot[jnp.clip(expert, 0, held - 1)], rows)
    row = jnp.where(
        plan.slot < num_experts * capacity, row * capacity + plan.slot % capacity, rows * capacity
    )
    gate = jnp.zeros(num_experts * capacity, weight.dtype).at[plan.slot].set(weight.T, mode="drop")
    own = (first, 0), (held, capacity)
    return SlotTokens(
        jnp.minimum(row, rows * capacity),
        jax.lax.dynamic_slice(plan.token, *own),
        jax.lax.dynamic_slice(gate.reshape(num_experts, capacity), *own),
    )


def forward_pass(
    model: MoeModel,
    params: Params,
    read: Callable[[Array], Any],
    slots: Slots,
    forward: Bool[Array, "layers experts"] | None,
    tokens: Int[Array, "batch tokens"],
    capacity_factor: float,
    place: Place = ALONE,
    remat: bool = False,
) -> tuple[Float[Array, "batch tokens model"], Seen, Float[Array, ""], Residuals]:
    """Runs the embedding and the blocks, of the experts only those in `slots`.

    Args:
      params: its router and shared parameters are read.
      read: expert -> its weights; `expert` is layer * E + expert.
      slots: experts of this device that serve tokens.
      forward: the experts that tokens may be sent to; None for all.
      capacity_factor: see `expert_capacity`.
      remat: keep of a layer its input and what its experts read and gave; the backward pass computes the
        rest again.

    Returns:
      The input of the head, what the routers did, the load-balancing loss, and the residuals.
    """
    pieces, rows = model.pieces, slots.expert.shape[0]
    token_mask_bt = model.real(tokens)
    held, first_held = experts_here(model, place)
    capacity = expert_capacity(tokens.size, model.num_experts, model.top_k, capacity_factor)
    route = make_route(model, token_mask_bt)
    x = pieces.embed({name: params.shared[name] for name in pieces.embed_parts}, tokens)
    of_slot = jax.ShapeDtypeStruct((capacity, x.shape[-1]), x.dtype)
    y, hidden = jax.eval_shape(lambda which, x: pieces.expert(read(which), x), slots.expert[0], of_slot)
    y_rows = jnp.zeros((rows, *y.shape), y.dtype)
    hidden_rows = None if remat else jnp.zeros((rows, *hidden.shape), hidden.dtype)

    def block(carry, layer):
        x, y_rows, hidden_rows = carry
        index, shared, router, layer_forward = layer
        outputs, pullback, (expert, gates, own) = jax.vjp(
            lambda *inputs: route(*inputs, layer_forward), shared, router, x, has_aux=True
        )
        saved_route = x if remat else pullback
        x, h, weight, balance = outputs
        plan = plan_slots(Assignment(expert, weight), model.num_experts, capacity)
        served = local_slots(plan, weight, slots.slot[index], first_held, rows)

        # One by one also where all run: on a CPU 5% faster than the batched product, which copies them.
        def run(carry, slot, valid):
            y_rows, hidden_rows = carry
            which = slots.expert[slot]
            y, hidden = pieces.expert(read(which), take_rows(h, served.token[which - index * held]))
            y_rows = put(y_rows, slot, y, valid)
            return y_rows, None if remat else put(hidden_rows, slot, hidden, valid)

        y_rows, hidden_rows = for_each_slot(slots, index, place, run, (y_rows, hidden_rows))
        y_knd = take_rows(y_rows.reshape(rows * capacity, -1), served.row)
        y_nd = jnp.einsum("nk,knd->nd", weight.astype(y_knd.dtype), y_knd, preferred_element_type=jnp.float32)
        x = x + total(y_nd, place).astype(x.dtype).reshape(x.shape)
        sent = jnp.sum(jax.nn.one_hot(expert, model.num_experts) * (weight > 0)[..., None], (0, 1), jnp.int32)
        kept = jnp.sum(plan.token < tokens.size, axis=1, dtype=jnp.int32)
        return (x, y_rows, hidden_rows), (
            Seen(gates, own, sent, kept),
            balance,
            (saved_route, h, weight, expert, served),
        )

    layers = (jnp.arange(model.num_layers), params.shared["blocks"], params.router["blocks"], forward)
    (x, y_rows, hidden_rows), (seen, balance, saved) = jax.lax.scan(
        block, (x, y_rows, hidden_rows), layers, unroll=UNROLL
    )
    return x, seen, jnp.mean(balance), Residuals(*saved, y_rows, hidden_rows)


def put(rows: Array, slot: Array, row: Array, valid: Array | bool) -> Array:
    """Writes a row, or leaves it as it is."""
    return rows.at[slot].set(jnp.where(valid, row, rows[slot]))


def backward_pass(
    model: MoeModel,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    residuals: Residuals,
    forward_slots: Slots,
    forward: Bool[Array, "layers experts"] | None,
    dx: Float[Array, "batch tokens model"],
    balance: float,
    slots: Slots,
    read: Callable[[Any, Array], Any],
    consume: Callable[[Any, Array, Any, Array], Any],
    carry: Any,
    place: Place = ALONE,
) -> tuple[Params, Float[Array, "layers experts"], Any]:
    """Returns the gradients of everything but the experts, those of the multipliers, and the carry.

    An expert that is not in `slots` is a constant: neither its weights nor its input get a gradient.

    Args:
      residuals, forward_slots, forward: of the forward pass.
      dx: gradient of what the head reads.
      balance: weight of the load-balancing loss.
      slots: experts of this device to train.
      read: (carry, expert) -> its weights.
      consume: (carry, expert, weights, gradient, reached) -> carry, once for each slot; `reached` is False
        if no token was served, or nothing is to be done.

    Returns:
      Gradients (experts None); d loss / d z_e [L, all experts], the multipliers of the experts' outputs at
      one, for experts that may serve tokens; the last carry.
    """
    pieces = model.pieces
    num_tokens = tokens.size
    held, _ = experts_here(model, place)
    route = make_route(model, model.real(tokens))
    rows, capacity, width = residuals.y.shape
    y_flat = residuals.y.reshape(rows * capacity, width)

    def block(outer, layer):
        dx, carry = outer
        index, shared, router, layer_forward, saved_route, h, weight, expert, served = layer
        pullback = saved_route
        if residuals.hidden is None:
            _, pullback, _ = jax.vjp(
                lambda *inputs: route(*inputs, layer_forward), shared, router, saved_route, has_aux=True
            )
        dy_nd = dx.reshape(num_tokens, width)
        dweight = total(
            jnp.einsum(
                "nd,knd->nk", dy_nd, take_rows(y_flat, served.row), preferred_element_type=jnp.float32
            ),
            place,
        )
        of_expert = jax.nn.one_hot(expert, model.num_experts)
        multiplier = jnp.einsum("nk,nke->e", weight * dweight, of_expert)

        def train(inner, slot, valid):
            dh, carry = inner
            which = slots.expert[slot]
            token, gate = served.token[which - index * held], served.weight[which - index * held]
            x_sd = take_rows(h, token)
            dy_sd = take_rows(dy_nd, token) * gate[:, None].astype(dx.dtype)
            # Read once and for all: a second read of rows that `consume` writes would cost a copy of them.
            weights = jax.lax.optimization_barrier(read(carry, which))
            if residuals.hidden is None:
                _, hidden = pieces.expert(weights, x_sd)
            else:
                hidden = residuals.hidden[forward_slots.slot.reshape(-1)[which]]
            gradient, dx_sd = pieces.expert_gradient(weights, x_sd, hidden, dy_sd)
            reached = jnp.any(token < num_tokens) & valid
            carry = consume(carry, which, weights, gradient, reached)
            return dh.at[token].add(jnp.where(valid, dx_sd, 0).astype(dh.dtype), mode="drop"), carry

        dh, carry = for_each_slot(slots, index, place, train, (jnp.zeros(h.shape, jnp.float32), carry))
        outputs = (dx, total(dh, place).astype(h.dtype), dweight, jnp.float32(balance / model.num_layers))
        d_shared, d_router, dx = pullback(outputs)
        return (dx, carry), (d_shared, d_router, multiplier)

    saved = (residuals.route, residuals.h, residuals.weight, residuals.expert, residuals.served)
    layers = (
        jnp.arange(model.num_layers),
        params.shared["blocks"],
        params.router["blocks"],
        forward,
        *saved,
    )
    (dx, carry), (d_blocks, d_router, multiplier) = jax.lax.scan(
        block, (dx, carry), layers, reverse=True, unroll=UNROLL
    )
    parts = {name: params.shared[name] for name in pieces.embed_parts}
    _, pull_embed = jax.vjp(lambda parts: pieces.embed(parts, tokens), parts)
    (d_embed,) = pull_embed(dx)
    return Params(None, {"blocks": d_router}, {"blocks": d_blocks, **d_embed}), multiplier, carry


def predict(
    model: MoeModel, params: Params, tokens: Int[Array, "batch tokens"], capacity_factor: float, place: Place
) -> tuple[Float[Array, "batch classes"], Seen]:
    """Returns the logits of a model that runs all of its experts, and what its routers did.

    Args:
      params: experts [L, H, ...] of this device.
    """
    held, _ = experts_here(model, place)
    read = functools.partial(row_of, flat(params.experts))
    slots = all_slots(model.num_layers, held)
    x, seen, _, _ = forward_pass(model, params, read, slots, None, tokens, capacity_factor, place)
    head = {name: params.shared[name] for name in model.pieces.head_parts}
    return model.pieces.head(head, x, model.real(tokens)), seen
