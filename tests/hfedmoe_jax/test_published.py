"""Published sizes against the numbers of parameters that their papers and model cards give."""

import jax
import jax.numpy as jnp
import pytest

from configs.hfedmoe import get_config
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.models import ModelSizes, families
from hfedmoe_jax.pretrained import find_source
from hfedmoe_jax.published import PUBLISHED

BILLIONS = {
    "switch_base_8": 0.62,
    "switch_base_64": 3.79,
    "olmoe_1b_7b": 6.92,
    "mixtral_8x7b": 46.7,
    "deepseek_moe_16b": 16.38,
    "deepseek_v2_lite": 15.7,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_the_published_number_of_parameters(name):
    config = get_config("switch_base_64" if name.startswith("switch") else "decoder").model
    config.update(source=name, train="all", base="float32")
    module = families[config.family](config, ModelSizes(1, 1, 8))
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), {"tokens": tokens, "answers": tokens})
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)
    with pytest.raises(InputError, match="name the checkpoint's directory, or use --dry_run"):
        find_source(name)
