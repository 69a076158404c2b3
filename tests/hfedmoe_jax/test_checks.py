"""Every range and name that `check_config` refuses, and that it takes what it should."""

import re

import jax
import pytest
import tiny_bert
import tiny_decoder
from test_experiment import build
from tiny import tiny_config

from configs import hfedmoe
from hfedmoe_jax.aggregation import expert_rules, gating_rules
from hfedmoe_jax.algorithms import algorithms
from hfedmoe_jax.checks import CHOICES, check_config, lookup
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.ranges import RANGES, Range, check_evaluation, check_memory
from hfedmoe_jax.tasks import classification, tasks

NAN = float("nan")


def outside(allowed: Range) -> list[float]:
    """Returns numbers beyond both ends of a range, and those that are none."""
    ends = [allowed.low] * allowed.above_low + [allowed.high] * allowed.below_high
    return [*ends, allowed.low - 1, 2 * allowed.high + 1, NAN, float("inf")]


def test_every_number_of_the_config_has_a_range():
    """Those of data and partition are checked where the data are read, classes of devices where they are."""
    config = hfedmoe.get_config()

    def numbers(section, prefix=""):
        for name, value in section.items():
            if hasattr(value, "items"):
                yield from numbers(value, f"{prefix}{name}.")
            elif type(value) in (int, float):
                yield prefix + name

    found = {name for name in numbers(config) if not name.startswith(("devices.", "partition."))}
    elsewhere = {f"data.{name}_fraction" for name in ("validation", "test", "holdout")}
    assert found - elsewhere == set(RANGES)
    for field, allowed in RANGES.items():
        assert allowed.holds(allowed.example) and allowed.holds(lookup(config, field))


def test_a_model_larger_than_the_memory_is_refused():
    check_memory(10**9, 2e9)
    check_memory(10**9)  # of this machine
    for memory in (1e9, None):
        with pytest.raises(InputError, match=r"^model='1e\+09 GB': its parameters are more than"):
            check_memory(10**18, memory)


@pytest.mark.parametrize(
    ("field", "registry", "rule", "message"),
    [
        (
            "fl.gating_rule",
            gating_rules,
            lambda upload, _: upload.usage[0],
            r"an array of shape \(3,\).*an expert, \[L, E\], or one in all$",
        ),
        (
            "fl.expert_rule",
            expert_rules,
            lambda upload, _: upload.size,
            r"an array of shape \(\).*an expert, \[L, E\]$",
        ),
        ("fl.expert_rule", expert_rules, lambda upload, _: None, "no array; return one number an expert"),
    ],
)
def test_a_rule_returns_as_many_weights_as_it_should(monkeypatch, field, registry, rule, message):
    monkeypatch.setitem(registry._parts, "mine", rule)
    with pytest.raises(InputError, match=rf"^{field}='mine': returns {message}"):
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
def test_every_preset_is_accepted(preset, monkeypatch, tmp_path):
    tiny_bert.install_as_minilm(monkeypatch, tmp_path)
    config = hfedmoe.get_config(preset)
    if config.model.family == "decoder":
        config.model.source = str(tiny_decoder.write_decoder(tmp_path / "decoder"))
    check_config(config)


@pytest.mark.parametrize("name", list(algorithms))
def test_every_algorithm_is_accepted(name):
    config = config_with("fl.algorithm", name)
    config.client.optimizer = "sgd"  # which SCAFFOLD needs
    if name in ("flexlora", "flora", "hetlora"):
        with pytest.raises(InputError, match=r"model\.train=all"):  # nothing else is wrong
            check_config(config)
        return
    check_config(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 1) for field in ("fl.clients_per_round", "fl.rounds", "fl.local_steps", "eval.every")),
        *(
            (field, 0)
            for field in ("seed", "fl.chunk", "importance.beta", "aggregation.tau", "budget.fraction")
        ),
        ("seed", 2**32 - 1),
        ("aggregation.tau", 1.0),
        ("client.momentum", 0.0),
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
        *((field, value, "must be") for field, allowed in RANGES.items() for value in outside(allowed)),
        ("seed", 2**64, "must be at least 0 and at most 4,294,967,295; use e.g. 0"),
        ("client.momentum", 1.0, "must be at least 0 and at most 0.9999999; use e.g. 0.9"),
        ("client.epsilon", 0.0, "must be at least 1e-37 and at most 1; use e.g. 1e-08"),
        ("aggregation.tau", 1.5, "must be at least 0 and at most 1"),
        ("model.num_experts", 2**31, "must be at least 2 and at most 16,384"),
        *((field, "stepp", "unknown name") for field in CHOICES),
        ("fl.clients_per_round", 5, "above fl.clients=4"),
        ("fl.clients_per_round", 2**15, "the most that exact sums have room for"),
        ("fl.chunk", 65, "above 64"),
        *(("mesh.experts", value, "does not divide the 3 experts of a layer") for value in (2, 6)),
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


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator's own memory counts")
def test_a_batch_that_no_memory_holds_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("hfedmoe_jax.ranges.os.sysconf", lambda name: 3200)  # pages of so many bytes: 10 MB
    with pytest.raises(InputError, match=r"fl\.batch_size=1000000: what a client computes .* is more than"):
        build(fl__batch_size=10**6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator's own memory counts")
@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ("fl.local_steps", "the batches of a block of clients, assembled and on the devices, are more than"),
        (
            "eval.batch_size",
            "(the arrays of such batches, one a client among them, are|what a layer) .*more than",
        ),
    ],
)
def test_rounds_and_evaluations_that_no_memory_holds_are_refused_before_the_run(monkeypatch, field, problem):
    monkeypatch.setattr("hfedmoe_jax.ranges.os.sysconf", lambda name: 10_000)  # 100 MB
    build()
    with pytest.raises(InputError, match=rf"{re.escape(field)}=100000: {problem}"):
        build(**{field.replace(".", "__"): 10**5})


def test_the_bytes_of_an_evaluation_are_compared_with_the_memory_that_holds_them():
    check_evaluation(64, array_bytes=10**9, layer_bytes=10**9, memory_bytes=2e9)
    with pytest.raises(InputError, match=r"eval\.batch_size=64: what a layer makes .* more than .* 2 GB"):
        check_evaluation(64, 10**9, 3 * 10**9, 2e9)
    with pytest.raises(InputError, match=r"eval\.batch_size=64: the arrays of such batches"):
        check_evaluation(64, 10**18, 10**9, 2e9)
