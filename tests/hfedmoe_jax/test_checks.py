"""Every range and name that `check_config` refuses, and that it takes what it should."""

import pytest
from tiny import tiny_config

from configs import hfedmoe
from hfedmoe_jax.aggregation import expert_rules, gating_rules
from hfedmoe_jax.algorithms import algorithms
from hfedmoe_jax.checks import AT_LEAST_ONE, CHOICES, NOT_NEGATIVE, check_config
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks import classification, tasks

NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "registry", "rule", "message"),
    [
        (
            "fl.gating_rule",
            gating_rules,
            lambda upload, _: upload.usage[0],
            r"shape \(3,\).*an expert, \[L, E\], or one in all$",
        ),
        (
            "fl.expert_rule",
            expert_rules,
            lambda upload, _: upload.size,
            r"shape \(\).*an expert, \[L, E\]$",
        ),
    ],
)
def test_a_rule_returns_as_many_weights_as_it_should(monkeypatch, field, registry, rule, message):
    monkeypatch.setitem(registry._parts, "mine", rule)
    with pytest.raises(InputError, match=rf"^{field}='mine': returns an array of {message}"):
        check_config(config_with(field, "mine"))


def test_gating_rules_may_weigh_by_expert(monkeypatch):
    monkeypatch.setitem(gating_rules._parts, "mine", lambda upload, _: upload.usage)
    check_config(config_with("fl.gating_rule", "mine"))


def test_a_task_reads_the_kind_of_output_that_the_family_has(monkeypatch):
    monkeypatch.setitem(tasks._parts, "by_token", classification._replace(output="token"))
    error = refusal(config_with("task.name", "by_token"))
    assert str(error).startswith(
        "task.name='by_token': reads an output a token; model.family=switch has one a "
    )
    assert str(error).endswith("use one of classification")


@pytest.mark.parametrize("field", ["fl.expert_rule", "fl.gating_rule", "server.optimizer"])
def test_local_training_aggregates_nothing(field):
    config = config_with(field, {"fl.expert_rule": "all", "fl.gating_rule": "mean"}.get(field, "sgd"))
    config.fl.algorithm = "local"
    assert str(refusal(config)).endswith("local aggregates nothing; leave it empty")


def config_with(field, value):
    """Returns the tiny config with one field, given by its dotted name, replaced."""
    config = tiny_config()
    *path, name = field.split(".")
    section = config
    for part in path:
        section = section[part]
    with config.ignore_type():
        section[name] = value
    return config


def refusal(config):
    """Returns the error, a single line."""
    with pytest.raises(InputError) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("preset", list(hfedmoe.PRESETS))
def test_every_preset_is_accepted(preset):
    check_config(hfedmoe.get_config(preset))


@pytest.mark.parametrize("name", list(algorithms))
def test_every_algorithm_is_accepted(name):
    config = config_with("fl.algorithm", name)
    config.client.optimizer = "sgd"  # which SCAFFOLD needs
    check_config(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 1) for field in AT_LEAST_ONE if field != "fl.clients"),
        *((field, 0) for field in NOT_NEGATIVE),
        *((field, name) for field, names in CHOICES.items() for name in names),
        ("importance.lam", 0.0),
        ("importance.lam", 1.0),
        ("fl.dropout_probability", 0.0),
        ("fl.dropout_probability", 0.999),
        ("fl.clients_per_round", 4),
        ("fl.score", "random"),
        ("server.optimizer", "yogi"),
    ],
)
def test_values_at_the_edge_of_their_range_are_accepted(field, value):
    config = config_with(field, value)
    if field == "fl.forward":
        config.importance.refresh = "previous"  # the one that both know
    check_config(config)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        *((field, value, "at least 1") for field in AT_LEAST_ONE for value in (0, -3)),
        *((field, -1, "negative") for field in NOT_NEGATIVE),
        *((field, NAN, "negative") for field in ("importance.beta", "aggregation.tau", "model.load_balance")),
        *((field, "stepp", "unknown name") for field in CHOICES),
        *(("importance.lam", value, "[0, 1]") for value in (-0.1, 1.1, NAN)),
        *(("fl.dropout_probability", value, "[0, 1)") for value in (-0.1, 1.0, NAN)),
        ("fl.clients_per_round", 5, "above fl.clients=4"),
        ("fl.clients_per_round", 2**15, "the most that exact sums have room for"),
        ("fl.chunk", 65, "above 64"),
        *(("mesh.experts", value, "does not divide model.num_experts=3") for value in (0, 2, 6)),
        ("data.validation_fraction", 0.0, "no validation split"),
        ("fl.algorithm", "fedavgg", "did you mean 'fedavg'?"),
        ("task.name", "classify", "did you mean 'classification'?"),
        ("model.family", "swtch", "did you mean 'switch'?"),
        ("fl.score", "randm", "did you mean 'random'?"),
        ("fl.expert_rule", "dominnt", "did you mean 'dominant'?"),
        ("fl.gating_rule", "men", "did you mean 'mean'?"),
        ("importance.estimate", "gradients", "did you mean 'gradient'?"),
        ("client.optimizer", "adm", "did you mean 'adam'?"),
        ("server.optimizer", "yog", "did you mean 'yogi'?"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value, problem):
    error = refusal(config_with(field, value))
    assert (error.field, error.value) == (field, value) or value != value
    assert problem in str(error)


def test_literal_gating_needs_weights_by_importance():
    config = config_with("aggregation.literal_gating", True)
    check_config(config)
    config.fl.gating_rule = "mean"
    error = refusal(config)
    assert (error.field, error.value) == ("aggregation.literal_gating", True)
