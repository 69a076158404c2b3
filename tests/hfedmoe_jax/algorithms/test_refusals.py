"""An algorithm that does not fit its config says so in one line, before any data are read."""

import pytest

from configs import hfedmoe
from hfedmoe_jax.algorithms import COMPOSITIONS
from hfedmoe_jax.checks import check_config
from hfedmoe_jax.errors import InputError

STACKED = ("scaffold", "dp_fedavg", "topk", "int8")


def config_of(algorithm, **fields):
    config = hfedmoe.get_config("smoke")
    config.fl.algorithm = algorithm
    if algorithm == "scaffold":
        config.client.optimizer = "sgd"
    for name, value in fields.items():
        section, field = name.split("__")
        config[section][field] = value
    return config


def refusal(algorithm, **fields) -> str:
    with pytest.raises(InputError) as caught:
        check_config(config_of(algorithm, **fields))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("algorithm", STACKED)
@pytest.mark.parametrize("base", COMPOSITIONS)
def test_every_composition_is_a_base(algorithm, base):
    check_config(config_of(algorithm, fl__base=base))


@pytest.mark.parametrize("algorithm", STACKED)
@pytest.mark.parametrize("base", ["local", "scaffold"])
def test_what_keeps_or_changes_models_is_no_base(algorithm, base):
    assert refusal(algorithm, fl__base=base).startswith(f"fl.base={base!r}: is no composition")


@pytest.mark.parametrize("algorithm", STACKED)
def test_literal_gating_sums_no_changed_updates(algorithm):
    text = refusal(algorithm, fl__base="hfedmoe", aggregation__literal_gating=True)
    assert text.startswith("aggregation.literal_gating=True: ")
    assert algorithm in text


@pytest.mark.parametrize("algorithm", STACKED)
def test_updates_are_whole_on_a_device(algorithm):
    text = refusal(algorithm, mesh__experts=2)
    assert text.startswith(f"mesh.experts=2: {algorithm} ")


@pytest.mark.parametrize("optimizer", ["sgdm", "adam", "yogi"])
def test_scaffold_needs_plain_descent(optimizer):
    assert refusal("scaffold", client__optimizer=optimizer).startswith(f"client.optimizer={optimizer!r}: ")


@pytest.mark.parametrize(
    ("algorithm", "field", "value"),
    [
        ("dp_fedavg", "dp.clip_norm", 0.0),
        ("dp_fedavg", "dp.clip_norm", -1.0),
        ("dp_fedavg", "dp.clip_norm", float("inf")),
        ("dp_fedavg", "dp.clip_norm", float("nan")),
        ("dp_fedavg", "dp.noise_multiplier", -0.1),
        ("dp_fedavg", "dp.noise_multiplier", float("nan")),
        ("dp_fedavg", "dp.delta", 0.0),
        ("dp_fedavg", "dp.delta", 1.0),
        ("dp_fedavg", "fl.expert_rule", "dominant"),
        ("dp_fedavg", "fl.gating_rule", "importance"),
        ("topk", "compression.fraction", 0.0),
        ("topk", "compression.fraction", 1.1),
        ("topk", "compression.fraction", float("nan")),
    ],
)
def test_numbers_out_of_range(algorithm, field, value):
    assert refusal(algorithm, **{field.replace(".", "__"): value}).startswith(f"{field}={value!r}: ")
