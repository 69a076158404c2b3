"""The population engine against a Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfedmoe_jax.aggregation import mean_finalize
from hfedmoe_jax.population import make_mesh, map_population, padded_size


def visit(offset, member):
    value, weight = member
    return {"a": value + offset, "b": value[0]}, {"a": weight, "b": 2 * weight}, jnp.sum(value)


def members(size):
    rng = np.random.default_rng(size)
    return rng.standard_normal((size, 4)).astype(np.float32), rng.random(size).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_every_chunk_size_gives_the_weighted_mean_and_the_outputs_in_order(chunk):
    values, weights = members(6)
    run = jax.jit(map_population(visit, make_mesh(jax.devices()[:1]), chunk))
    mean, outputs = run(jnp.float32(0.5), (values, weights))
    result = mean_finalize(mean, {"a": jnp.zeros(4), "b": jnp.zeros(())})
    wide = values.astype(np.float64)
    np.testing.assert_allclose(result["a"], np.average(wide + 0.5, axis=0, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(result["b"], np.average(wide[:, 0], weights=weights), rtol=1e-5)
    np.testing.assert_allclose(outputs, wide.sum(axis=1), rtol=1e-5, atol=1e-6)


def test_a_population_without_values_returns_outputs_alone():
    run = jax.jit(map_population(lambda _, x: ((), (), x**2), make_mesh(jax.devices()[:1]), 1))
    mean, outputs = run((), jnp.arange(4.0))
    assert jax.tree.leaves(mean) == []
    np.testing.assert_array_equal(outputs, [0, 1, 4, 9])


def test_memory_of_the_sums_does_not_grow_with_the_population():
    """Temporaries of the compiled program stay the same for 8 and for 512 members."""
    size = 10_000

    def heavy(scale, seed):
        value = scale * jax.random.normal(jax.random.key(seed), (size,))
        return value, jnp.float32(1.0), jnp.sum(value)

    def temporaries(population):
        run = jax.jit(map_population(heavy, make_mesh(jax.devices()[:1]), 1))
        compiled = run.lower(jnp.float32(1.0), jnp.arange(population)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(512) < temporaries(8) + 64 * 1024


@pytest.mark.parametrize(("size", "chunk", "padded"), [(1, 1, 1), (5, 2, 6), (6, 2, 6), (7, 4, 8)])
def test_padding_fills_chunks(size, chunk, padded):
    assert padded_size(size, make_mesh(jax.devices()[:1]), chunk) == padded
