"""Every range and name that `check_config` refuses, and that it takes what it should."""

import pytest
from tiny import tiny_config

from configs import hfedmoe
from hfedmoe_jax.aggregation import expert_rules, gating_rules
from hfedmoe_jax.algorithms import algorithms
from hfedmoe_jax.checks import CHOICES, LIMITS, check_config, lookup
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.tasks import classification, tasks

NAN, INF = float("nan"), float("inf")


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
        *((field, "stepp", "unknown name") for field in CHOICES),
        ("fl.clients_per_round", 5, "above fl.clients=4"),
        *(("mesh.experts", value, "does not divide model.num_experts=3") for value in (2, 6)),
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


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("seed", (-1, 2**32, 2**64)),
        ("data.vocab_size", (0, 10**11)),
        ("data.seq_len", (1, 10**9)),
        ("model.num_layers", (0, 10**20)),
        ("model.num_experts", (-1, 0, 1, 2**31)),
        *((f"model.{name}", (0, -INF, INF, NAN)) for name in ("capacity_factor", "eval_capacity_factor")),
        *((f"fl.{name}", (0, -3, 10**20)) for name in ("clients", "rounds", "local_steps", "batch_size")),
        ("fl.clients_per_round", (0, 2**15)),
        ("fl.chunk", (-1, 65)),
        ("fl.dropout_probability", (-0.1, 1.0, NAN)),
        ("importance.lam", (-0.1, 1.1, NAN)),
        ("importance.beta", (-1.0, INF, NAN)),
        ("aggregation.tau", (-0.1, 1.1, NAN)),
        ("client.learning_rate", (0.0, -1.0, INF, NAN)),
        ("server.learning_rate", (-1.0, INF, NAN)),
        *((f"{side}.momentum", (-0.1, 1.0, NAN)) for side in ("client", "server")),
        *((f"{side}.second_momentum", (-0.1, 1.0, NAN)) for side in ("client", "server")),
        *((f"{side}.epsilon", (-1e-8, INF, NAN)) for side in ("client", "server")),
        ("mesh.experts", (0, -1)),
        *((f"checkpoint.{name}", (0, -1)) for name in ("every", "keep")),
    ],
)
def test_numbers_without_meaning_and_sizes_nobody_can_hold_are_refused(field, values):
    for value in values:
        error = refusal(config_with(field, value))
        assert error.field == field and (error.value == value or value != value)
        assert error.problem == f"must be in {LIMITS[field]}"


@pytest.mark.parametrize("field", list(LIMITS))
def test_every_limit_holds_its_example_and_the_default_and_no_nan(field):
    limits = LIMITS[field]
    for value in (limits.example, lookup(hfedmoe.get_config(), field)):
        assert limits.holds(value)
    for value in (limits.low - 1, limits.high * 2, NAN, INF, -INF):
        assert not limits.holds(value)
    assert (limits.holds(limits.low), limits.holds(limits.high)) == (
        not limits.open_low,
        not limits.open_high,
    )


def test_experts_that_no_machine_holds_are_refused_together():
    """Each size is within its limits: 10^4 layers of 2^16 experts of 2 * 2^20 * 2^20 parameters."""
    config = tiny_config()
    config.model.update(num_layers=10_000, num_experts=2**16, width=2**20, hidden=2**20)
    error = refusal(config)
    assert (error.field, error.value) == ("model.num_experts", 2**16)
    assert "have 1.44e+21 parameters, above 1e+12" in error.problem


@pytest.mark.parametrize(
    ("algorithm", "section", "optimizer"),
    [("hfedmoe", "client", "adam"), ("hfedmoe", "client", "yogi"), ("hfedmoe", "server", "adam"),
     ("fedadam", "server", ""), ("fedyogi", "server", "")],
)  # fmt: skip
def test_optimizers_that_divide_by_epsilon_need_one(algorithm, section, optimizer):
    config = config_with("fl.algorithm", algorithm)
    config[section].update(optimizer=optimizer, epsilon=0.0)
    assert refusal(config).field == f"{section}.epsilon"
    config[section].update(optimizer="sgd")
    check_config(config)


@pytest.mark.parametrize("share", [INF, NAN, -1.0])
def test_shares_of_devices_are_finite(share):
    assert refusal(config_with("devices.phone.share", share)).field == "devices.phone.share"
