"""Baselines: download-then-infer, shares of the spectrum by a fixed rule, and users served in a fixed order.

Each user gets the model that needs the least bandwidth, at its best clock (`provisioning`); the baselines
differ in who is served and with how much bandwidth. The functions `decide_*` are pure, for `jit` and for
`vmap` over drops; `slide_jax.solvers` makes solvers of them.

Axes: K users, I models, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from slide_jax.admission import TOLERANCE
from slide_jax.allocation import allocate
from slide_jax.exact import exact
from slide_jax.hull import Hull
from slide_jax.problem import Allocation, Catalogue, Problem
from slide_jax.provisioning import Need, bandwidth_of, provision, signal_of
from slide_jax.sums import total


def collapse(catalogue: Catalogue) -> Catalogue:
    """Returns the catalogue with each model as a single layer that holds all its bits and work."""
    return dataclasses.replace(
        catalogue,
        layer_bits=catalogue.layer_bits.sum(axis=-1, keepdims=True),
        layer_flop=catalogue.layer_flop.sum(axis=-1, keepdims=True),
        num_layers=np.ones(np.shape(catalogue.num_layers), np.int32),
    )


def download_then_infer(problem: Problem) -> Problem:
    """Returns the problem under DAI, the convention: inference begins when the whole model has arrived.

    It is the same problem with models of one layer each, so every solver here solves it too.
    """
    return dataclasses.replace(problem, catalogue=collapse(problem.catalogue))


def dai(problem: Problem, left_over: str = "none") -> Allocation:
    """Returns the optimum under DAI.

    Its latencies are those of DAI, so it is to be verified against `download_then_infer(problem)`. It proves
    no bound on the users that SLIDE can serve.

    Args:
      left_over: as in `exact`.

    Raises:
      InputError: an unknown policy.
    """
    allocation = exact(download_then_infer(problem), left_over)
    return dataclasses.replace(allocation, upper_bound=float("nan"), solver="dai")


def decide_equal_share(hull: Hull, problem: Problem) -> Allocation:
    """Serves the most users of least bandwidth who can be served when they share the spectrum equally."""
    need = provision(hull, problem)
    return _serve_by_share(hull, problem, need, jnp.ones_like(need.bandwidth_hz))


def decide_proportional_share(hull: Hull, problem: Problem) -> Allocation:
    """Serves the most users of least bandwidth who can be served with shares in proportion to their loads.

    The load is the bandwidth that would download the user's model in all of its time, were there no compute.
    """
    users, need = problem.users, provision(hull, problem)
    slack_s = users.deadline_s - users.start_s
    bits = jnp.asarray(hull.total_bits)[need.model]
    rate = jnp.where(bits > 0, bits / jnp.where(slack_s > 0, slack_s, 1.0), 0.0)
    return _serve_by_share(hull, problem, need, bandwidth_of(rate, users, problem.rate_model))


def decide_best_channel_first(hull: Hull, problem: Problem) -> Allocation:
    """Gives users what they need, best channel first; whoever does not fit is left out."""
    return serve_in_order(hull, problem, jnp.argsort(-signal_of(problem.users, problem.rate_model)))


def decide_earliest_deadline_first(hull: Hull, problem: Problem) -> Allocation:
    """Gives users what they need, earliest deadline first; whoever does not fit is left out."""
    return serve_in_order(hull, problem, jnp.argsort(problem.users.deadline_s))


def decide_random_order(hull: Hull, problem: Problem, key: jax.Array) -> Allocation:
    """Gives users what they need, in a random order; whoever does not fit is left out."""
    users = jnp.arange(problem.num_users, dtype=jnp.uint32)
    # One draw for each user, whatever the number of users: added ones (`buckets`) leave the order as it is.
    draws = jax.vmap(lambda user: jax.random.uniform(jax.random.fold_in(key, user)))(users)
    return serve_in_order(hull, problem, jnp.argsort(draws))


def serve_in_order(hull: Hull, problem: Problem, order: Int[ArrayLike, " K"]) -> Allocation:
    """Returns the allocation that gives users what they need in this order, as long as it fits.

    Args:
      hull, problem: float64 arrays.
      order: permutation of the users, the first first.
    """
    need = provision(hull, problem)
    served = admit_in_order(need.bandwidth_hz, order, problem.bandwidth_hz)
    return allocate(hull, problem, need, served, need.bandwidth_hz)


def admit_in_order(
    bandwidth_hz: Float[ArrayLike, " K"], order: Int[ArrayLike, " K"], spectrum_hz: Float[ArrayLike, ""]
) -> Bool[Array, " K"]:
    """Returns who is admitted when each user in turn gets what it needs if that still fits.

    Args:
      bandwidth_hz: what each user needs, at least 0; infinite: cannot be served.
      order: permutation of the users, the first first.
      spectrum_hz: the available spectrum.

    >>> admit_in_order(jnp.array([3.0, 2.0, 1.0]), jnp.array([0, 1, 2]), 4.0).tolist()
    [True, False, True]
    """
    limit = spectrum_hz * (1 + TOLERANCE)

    def step(used, needed):
        fits = (used + needed <= limit) & (needed < jnp.inf)
        return jnp.where(fits, used + needed, used), fits

    _, admitted = lax.scan(step, jnp.zeros((), bandwidth_hz.dtype), bandwidth_hz[order])
    return jnp.zeros(bandwidth_hz.shape, bool).at[order].set(admitted)


def _serve_by_share(hull: Hull, problem: Problem, need: Need, load: Float[ArrayLike, " K"]) -> Allocation:
    """Splits the spectrum in proportion to the loads of the n users of least need, n the most that suffices.

    User k is served iff the loads of all n sum to at most B load_k / need_k; the sum rises with n, the
    least of these limits falls, so the n that suffice are the first ones.
    """
    order = jnp.argsort(need.bandwidth_hz)
    needed, loads = need.bandwidth_hz[order], load[order]
    reachable = needed < jnp.inf
    loaded = jnp.cumsum(jnp.where(reachable, loads, 0.0))
    # Half of what the sum of all shares may exceed the spectrum by; the rest is for rounding.
    whole = problem.bandwidth_hz * (1 + TOLERANCE / 2)
    limit = jnp.where(needed > 0, whole * loads / jnp.where(needed > 0, needed, 1.0), jnp.inf)
    suffices = reachable & (loaded <= lax.cummin(limit))
    served = jnp.zeros(suffices.shape, bool).at[order].set(suffices)
    shared = total(jnp.where(served, load, 0.0))
    share = problem.bandwidth_hz * load / jnp.where(shared > 0, shared, 1.0)
    return allocate(hull, problem, need, served, jnp.maximum(share, need.bandwidth_hz))
