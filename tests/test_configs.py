"""Every preset is a config that its package accepts."""

import pytest
import tiny_bert
import tiny_decoder

import hfedmoe_jax.checks
import slide_jax.settings
from configs import hfedmoe, slide

CONFIGS = {hfedmoe: hfedmoe_jax.checks.check_config, slide: slide_jax.settings.check_config}


def fields(config) -> set[str]:
    flat = set()
    for name, value in config.items():
        flat |= {f"{name}.{field}" for field in value} if hasattr(value, "items") else {name}
    return flat


@pytest.mark.parametrize(
    ("module", "preset"), [(module, preset) for module in CONFIGS for preset in module.PRESETS]
)
def test_presets_are_valid_and_share_their_fields(module, preset, monkeypatch, tmp_path):
    tiny_bert.install_as_minilm(monkeypatch, tmp_path)
    tiny_decoder.install_as_smollm2(monkeypatch, tmp_path)
    config = module.get_config(preset)
    if preset == "decoder":
        config.model.source = str(tiny_decoder.write_decoder(tmp_path / "decoder"))
    CONFIGS[module](config)
    assert fields(config) == fields(module.get_config())
    assert f"configs/{config.experiment}.py" in module.__doc__
    assert preset in ("bbc", "default") or config.to_dict() != module.get_config().to_dict()


@pytest.mark.parametrize("module", CONFIGS)
def test_an_unknown_preset_names_the_nearest(module):
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        module.get_config("smok")


@pytest.mark.parametrize(("module", "other"), [(hfedmoe, slide), (slide, hfedmoe)])
def test_a_config_of_the_other_experiment_is_refused(module, other):
    with pytest.raises(ValueError, match="the config has no such field, which the experiment") as raised:
        CONFIGS[module](other.get_config())
    assert f"configs/{module.get_config().experiment}.py" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", sorted(fields(slide.get_config()) - {"experiment"}))
def test_a_config_without_one_of_the_fields_is_refused(field):
    config = slide.get_config()
    *group, name = field.split(".")
    del (config[group[0]] if group else config)[name]
    with pytest.raises(ValueError, match=f"{field}=None: the config has no such field"):
        slide_jax.settings.check_config(config)
