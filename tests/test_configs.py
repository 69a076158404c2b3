"""Every preset is a config that the package accepts."""

import pytest

from configs import hfedmoe
from hfedmoe_jax.checks import check_config
from hfedmoe_jax.errors import InputError


@pytest.mark.parametrize("preset", hfedmoe.PRESETS)
def test_presets_are_valid_and_share_their_fields(preset):
    config = hfedmoe.get_config(preset)
    check_config(config)
    assert fields(config) == fields(hfedmoe.get_config())


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'smoke'"):
        hfedmoe.get_config("smok")


def fields(config) -> set[str]:
    flat = set()
    for name, value in config.items():
        flat |= {f"{name}.{field}" for field in value} if hasattr(value, "items") else {name}
    return flat
