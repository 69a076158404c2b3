"""The parameters that a run starts from: read where there are any, drawn where not, and never both."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from own_process import run_python

from hfedmoe_jax import initial, make_mesh
from hfedmoe_jax.mesh import BY_EXPERT, REPLICATED
from hfedmoe_jax.models.frozen import keep_frozen
from hfedmoe_jax.models.names import StoredParam

SHAPES = {
    ("experts", "up_df"): (2, 4, 6, 3),
    ("blocks", "router", "kernel"): (2, 6, 4),
    ("embed",): (9, 6),
    ("head", "bias"): (3,),
}
KEY = jax.random.key(7)


def init(key):
    """Returns nested dicts of arrays drawn at random."""
    leaves = {path: jax.random.normal(jax.random.fold_in(key, len(path)), x) for path, x in SHAPES.items()}
    return traverse_util.unflatten_dict(leaves)


def start_of(*paths):
    """Returns a start that has these: every second one lies in files."""
    rng, found = np.random.default_rng(1), {}
    for number, path in enumerate(paths):
        array = rng.standard_normal(SHAPES[path]).astype(np.float32)
        stored = StoredParam(array.shape, lambda index, array=array: np.array(array[index]))
        found[path] = stored if number % 2 == 0 else array
    return found


@pytest.mark.parametrize("count", range(len(SHAPES) + 1))
def test_what_a_start_has_is_read_and_the_rest_is_as_it_is_drawn(count):
    mesh, given = make_mesh(jax.devices()[:1]), list(SHAPES)[:count]
    start = start_of(*given)
    found: dict[Any, Any] = dict(traverse_util.flatten_dict(initial.fill(init, KEY, start, mesh)))
    drawn = traverse_util.flatten_dict(init(KEY))
    assert found.keys() == drawn.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, np.asarray(start[path] if path in given else drawn[path]))
        assert leaf.sharding.spec == (BY_EXPERT if path[0] == "experts" else REPLICATED)


def test_nothing_is_drawn_in_place_of_what_is_read():
    """The draw of a large parameter that a start has would not fit any machine."""

    def huge(key):
        return init(key) | {"huge": jnp.zeros((2**20, 2**20, 2**10))}

    class ReadError(Exception):
        """What placing it comes to."""

    def read(index):
        raise ReadError

    start = {("huge",): StoredParam((2**20, 2**20, 2**10), read)}
    with pytest.raises(ReadError):
        initial.fill(huge, KEY, start, make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize("part_bytes", [1, 200, 2**20])
def test_parts_come_to_the_whole(part_bytes, monkeypatch):
    """However many rows are read at once; bfloat16 is placed in parts on a CPU, too."""
    monkeypatch.setattr(initial, "PART_BYTES", part_bytes)
    path, read = ("experts", "up_df"), []
    start = start_of(path)
    stored = start[path]

    def watched(index):
        read.append(index[0].stop - index[0].start)
        return stored.read(index)

    start[path] = stored._replace(read=watched)

    def kept(key):
        tree = init(key)
        return tree | {"experts": {"up_df": tree["experts"]["up_df"].astype(jnp.bfloat16)}}

    found = initial.fill(kept, KEY, start, make_mesh(jax.devices()[:1]), "bfloat16")
    np.testing.assert_array_equal(found["experts"]["up_df"], np.asarray(stored).astype(jnp.bfloat16))
    assert read == ([2] if part_bytes > 1000 else [1, 1])


def spread_quantised():
    """Asserts that experts of few bits, read onto two devices, are those quantised at once."""
    path = ("experts", "up_df")
    start = start_of(path)

    def kept(key):
        return keep_frozen(init(key), "nf4")

    mesh = make_mesh(experts=2)
    found = initial.fill(kept, KEY, start, mesh, "nf4")["experts"]["up_df"]
    whole = keep_frozen({"experts": {"up_df": jnp.asarray(np.asarray(start[path]))}}, "nf4")
    for mine, expected in zip(*map(jax.tree.leaves, (found, whole["experts"]["up_df"])), strict=True):
        np.testing.assert_array_equal(mine, expected)
        assert mine.sharding.spec == BY_EXPERT and len(mine.sharding.device_set) == 2


def test_experts_of_few_bits_are_spread_as_they_are_read():
    run_python("from test_initial import spread_quantised; spread_quantised()", 2)
