"""From a config to a setting and a drop: every option arrives, and what is drawn keeps what was asked."""

import numpy as np
import pytest

from configs import slide
from slide_jax.sampling import Setting
from slide_jax.settings import NUMBERS, PAIRS, check_config, lookup, read_models_of, read_setting, sample_drop

CHANGED = {
    "models": ("resnet50",),
    "bits_per_parameter": 4.0,
    "batch_size": 2,
    "users": 5,
    "rate_model": "shannon",
    "patience": 0.5,
    "static_power_w": 0.1,
    "shadowing_db": 6.0,
    "rician_k": 2.0,
    "efficiency_cap_bps_hz": 2.0,
    "minimum_distance_m": 200.0,
    "reference_bandwidth_hz": 5e7,
    "accuracy_min": 0.75,
    "compute_min": 0.5,
    "energy_min": 3.0,
}


def tiny():
    config = slide.get_config()
    config.setting.users = 6
    return config


def content(problem):
    numbers = {**vars(problem.catalogue), **vars(problem.users)}
    columns = {name: np.asarray(value).tobytes() for name, value in numbers.items() if value is not None}
    return columns, float(problem.bandwidth_hz), problem.rate_model


FIELDS = [f"{group}.{name}" for group in ("setting", "cell") for name in tiny()[group]]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_drop(field):
    config = tiny()
    before = content(sample_drop(config))
    group, name = field.split(".")
    old = config[group][name]
    config[group][name] = CHANGED[name] if name in CHANGED else 0.9 * old
    check_config(config)
    assert content(sample_drop(config)) != before


def test_a_drop_keeps_to_the_setting_and_follows_the_seed():
    config = tiny()
    config.setting.users = 200
    problem = sample_drop(config)
    users, setting = problem.users, config.setting
    assert problem.num_users == 200 and problem.labels.models == tuple(setting.models)
    for column, low, high in (
        (users.deadline_s, setting.deadline_min_s, setting.deadline_max_s),
        (users.min_accuracy, setting.accuracy_min, setting.accuracy_max),
    ):
        assert column.dtype == np.float64 and low <= column.min() < column.max() <= high
    # The reference model at the top clock: its work over the user's speed, as a share of the deadline.
    catalogue = problem.catalogue
    fits = catalogue.accuracy >= users.min_accuracy[:, None]
    bits = np.where(fits, catalogue.layer_bits.sum(1), np.inf)
    work = catalogue.layer_flop.sum(1)[bits.argmin(1)]
    share = work / (users.flop_per_cycle * users.f_max_hz) / users.deadline_s
    assert setting.compute_min <= share.min() < share.max() <= setting.compute_max
    assert content(sample_drop(config)) == content(problem)
    config.seed = 1
    assert content(sample_drop(config)) != content(problem)


def test_the_setting_has_every_number_of_the_config():
    config = tiny()
    setting = read_setting(config)
    for name in Setting._fields:
        if name != "cell":
            assert getattr(setting, name) == config.setting[name]
    assert setting.cell._asdict() == config.cell.to_dict()


def test_models_may_be_joined_by_commas():
    config = tiny()
    config.setting.models = ("gpt2, smollm2_135m", "vit_b16")
    catalogue, labels = read_models_of(config)
    assert labels.models == ("gpt2", "smollm2_135m", "vit_b16")
    assert catalogue.accuracy.shape == (3,)


def test_every_number_is_checked_and_its_example_would_do():
    config = slide.get_config()
    numbers = {
        f"{group}.{name}"
        for group in ("setting", "cell", "monte_carlo", "milp")
        for name, value in config[group].items()
        if isinstance(value, int | float)
    }
    assert numbers | {"seed"} == set(NUMBERS)
    for field, allowed in NUMBERS.items():
        assert allowed.holds(allowed.example) and allowed.holds(lookup(config, field)), field
        assert not allowed.holds(float("nan")) and not allowed.holds(float("inf")), field
    for low, high in PAIRS:
        assert NUMBERS[low].example <= NUMBERS[high].example
