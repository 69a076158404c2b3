"""Low-rank adapters: against plain autodiff through merged matrices, and in runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
import tiny_decoder
from dense_switch import Controls, dense_switch
from flax import traverse_util
from selected_pass import make_pass
from tiny import tiny_batches, tiny_config, tiny_frozen, tiny_model, tiny_params

from configs.hfedmoe import get_config
from hfedmoe_jax import Experiment, initial, make_mesh, mixtures
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import open_budget
from hfedmoe_jax.models import ModelSizes, Params, build_model, load_balancing_loss, merge_params, tree_bytes
from hfedmoe_jax.models.frozen import as_floats, keep_frozen
from hfedmoe_jax.models.lora import FACTORS, Adapted, adapter_pairs, join
from hfedmoe_jax.tasks import tasks
from launch.hfedmoe.dry_run import parameters

LORA = {"model__train": "lora", "model__lora_rank": 2, "model__lora_alpha": 6.0}
SCALE = 3.0


def merge_experts(weights: dict) -> dict:
    """Returns what `join` returned with plain matrices, W + scale * A B."""

    def merged(leaf):
        if not isinstance(leaf, Adapted):
            return leaf
        return as_floats(leaf.base) + leaf.scale * (leaf.a_dr @ leaf.b_rf)

    return jax.tree.map(merged, weights, is_leaf=lambda x: isinstance(x, Adapted))


def merge_dense(variables: dict, scale: float) -> dict:
    """Returns parameters in which every `Dense` is without an adapter, its kernel W + scale * A B."""
    leaves = traverse_util.flatten_dict(variables)
    merged = {path: leaf for path, leaf in leaves.items() if path[-1] not in FACTORS}
    for module, (a, b) in adapter_pairs(variables).items():
        merged[(*module, "kernel")] += scale * (a @ b)
    return traverse_util.unflatten_dict(merged)


def moved(tree, seed=1):
    """Returns arrays with other values, none zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [x + rng.normal(0, 0.3, x.shape).astype(x.dtype) for x in leaves])


def test_new_adapters_change_nothing():
    params, frozen, tokens = (
        tiny_params(**LORA),
        tiny_frozen(**LORA),
        jnp.asarray(tiny_batches(1, 4)["tokens"]),
    )
    model, plain = tiny_model(tiny_config(**LORA)), tiny_model(tiny_config())
    assert set(params.experts) == set(frozen["experts"]) == set(tiny_params().experts)
    budget, whole = open_budget(params.experts, 3), open_budget(frozen["experts"], 3)
    rest = {name: tree for name, tree in frozen.items() if name != "experts"}
    rest |= {name: tree for name, tree in params.shared.items() if name == "head"}
    out = model.apply(params, frozen, {"tokens": tokens}, budget, True)
    expected = plain.apply(Params(None, params.router, rest), {}, {"tokens": tokens}, whole, True)
    np.testing.assert_array_equal(out.output, expected.output)


@pytest.mark.parametrize("active", [True, False])
def test_a_pass_is_that_of_plain_autodiff_through_merged_matrices(active):
    """Of all experts that run some are selected; dropped tokens among them."""
    fields = LORA | {"model__capacity_factor": 0.7, "model__top_k": 2}
    config, task = tiny_config(**fields), tasks["classification"]
    model, frozen, batch = (
        tiny_model(config),
        tiny_frozen(**fields),
        jax.tree.map(jnp.asarray, tiny_batches(3, 4)),
    )
    params = tiny_params(**fields)
    params = params._replace(experts=moved(params.experts))
    selected = jnp.array([[True, False, True], [False, True, False]])
    step = jax.jit(make_pass(model, task, 0.1, active, 4, keep=True))
    found = step(params, frozen, batch, selected)
    rest = {name: tree for name, tree in frozen.items() if name != "experts"}

    def loss(params: Params):
        experts = merge_experts(join(frozen["experts"], params.experts, SCALE))
        ones = jnp.ones(selected.shape)
        controls = Controls(selected if active else ones > 0, selected, ones)
        logits, layers = dense_switch(
            params._replace(experts=experts), rest, batch["tokens"], controls, config.model, 0.7
        )
        mask = batch["tokens"].reshape(-1) != 0
        return task.loss(logits, batch)[0] + 0.1 * jnp.mean(
            load_balancing_loss(layers.gates, layers.own, mask)
        )

    expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6), found.gradient, gradient
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient.experts))


def section(family: str, folder):
    """Returns the section `model` of a tiny checkpoint, and the sizes of its task."""
    if family == "bert":
        model = get_config("agnews_minilm").model
        model.update(source=str(tiny_bert.write_bert(folder)), num_layers=1, num_experts=4)
        return model, ModelSizes(3, tiny_bert.CONFIG["vocab_size"], 6)
    model = get_config("decoder").model
    model.update(source=str(tiny_decoder.write_decoder(folder, family)))
    return model, ModelSizes(24, 24, 6, 1)


@pytest.mark.parametrize("family", ["bert", "mixtral", "deepseek_v2_lite"])
def test_outputs_are_those_of_merged_matrices(family, tmp_path):
    """Of experts and of attention's projections; experts' biases stay the checkpoint's."""
    model, sizes = section(family, tmp_path)
    tokens = jnp.array([[2, 7, 5, 9, 4, 3], [2, 6, 3, 0, 0, 0]])
    example = {"tokens": tokens}
    model.update(train="all", lora_rank=2, lora_alpha=6.0)
    plain = build_model(model, sizes, example)
    model.train = "lora"
    adapted = build_model(model, sizes, example)
    params, frozen = adapted.init(jax.random.key(0))
    params = moved(params)
    attention = [
        path for path, _ in jax.tree_util.tree_leaves_with_path(params.shared) if "lora" in str(path)
    ]
    assert len(attention) == 2 * {"bert": 8, "mixtral": 4, "deepseek_v2_lite": 8}[family]
    out = adapted.apply(params, frozen, example, open_budget(params.experts, adapted.num_experts), False)
    experts = merge_experts(join(frozen["experts"], params.experts, SCALE))
    kept = {name: tree for name, tree in frozen.items() if name != "experts"}
    shared = merge_dense(merge_params(params.shared, kept), SCALE)
    merged = Params(experts, params.router, shared)
    expected = plain.apply(merged, {}, example, open_budget(experts, plain.num_experts), False)
    real = np.asarray(tokens) != 0 if adapted.module.output == "token" else slice(None)
    np.testing.assert_allclose(out.output[real], expected.output[real], rtol=1e-4, atol=1e-4)


def test_clients_train_and_send_factors_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mixtures, "TEXTS", 80)
    monkeypatch.setattr(mixtures, "HELD_OUT", 40)
    config = get_config("smoke")
    model, _ = section("bert", tmp_path / "source")
    config.model.update(model)
    config.model.update(train="lora", lora_rank=2, cache_trunk=False, upcycling="copy")
    config.data.update(tokenizer="checkpoint", seq_len=12)
    config.budget.fraction = 0.5
    experiment = Experiment(config, make_mesh(jax.devices()[:1]))
    state = experiment.init()
    before = jax.tree.map(np.asarray, (state.server.params, experiment.frozen))
    np.testing.assert_array_equal(before[1]["experts"]["in_df"], experiment.start.params["experts"]["in_df"])
    for _ in range(2):
        state, row, failures = experiment.step(state)
        assert failures == [] and 0 < row["trained_share"] <= 0.5
    experiment.close()
    jax.tree.map(np.testing.assert_array_equal, before[1], experiment.frozen)
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), before[0], state.server.params)
    assert all(jax.tree.leaves(changed))
    one = sum(
        2 * (leaf.shape[2] + leaf.shape[3])
        for leaf in experiment.frozen["experts"].values()
        if leaf.ndim == 4
    )
    assert experiment.cost.expert_parameter_bytes == 4 * one
    assert experiment.cost.frozen_bytes == tree_bytes(experiment.frozen)
    sent = tree_bytes((state.server.params.router, state.server.params.shared)) + 4 * one * 2
    assert experiment.algorithm.traffic.up(np.array([2]), np.array([0])).tolist() == [sent]
    assert {
        path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.server.params.experts)
    } == set(FACTORS)


@pytest.mark.parametrize(("base", "error"), [("bfloat16", 0.004), ("int8", 0.01), ("nf4", 0.12)])
def test_a_base_of_few_bits_is_the_checkpoint_nearly(base, error, tmp_path, monkeypatch):
    """Placed layer by layer it has the bits of the whole, and outputs are those of what it stands for."""
    model, sizes = section("mixtral", tmp_path)
    model.update(train="lora", lora_rank=2, base=base)
    tokens = {"tokens": jnp.array([[2, 7, 5, 9, 4, 3], [2, 6, 3, 0, 0, 0]])}
    kept = build_model(model, sizes, tokens)
    start = mixtures.Start(kept.module.read(tmp_path), "", {})
    monkeypatch.setattr(initial, "PART_BYTES", 1)
    where = jax.random.key(0), start, make_mesh(jax.devices()[:1])
    params, frozen = initial.initial_params(kept, *where), initial.initial_frozen(kept, *where, base)
    model.base = "float32"
    whole = build_model(model, sizes, tokens)
    exact = initial.initial_frozen(whole, *where, "float32")
    at_once = keep_frozen(exact, base)
    jax.tree.map(np.testing.assert_array_equal, frozen, at_once)
    for name, leaf in exact["experts"].items():
        difference = np.asarray(as_floats(frozen["experts"][name]), np.float64) - leaf
        assert np.linalg.norm(difference) / np.linalg.norm(leaf) < error
    stands_for = {"experts": {name: as_floats(leaf) for name, leaf in frozen["experts"].items()}}
    budget = open_budget(params.experts, kept.num_experts)
    out = kept.apply(params, frozen, tokens, budget, False).output
    expected = whole.apply(params, frozen | stands_for, tokens, budget, False).output
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert tree_bytes(frozen) < 0.6 * tree_bytes(exact)


def test_memory_by_part_is_that_of_the_compiled_program(tmp_path):
    """Of the program that trains: its arguments are the printed parts, a round's data and the sums."""
    config = get_config("smoke")
    config.model.update(family="decoder", source=str(tiny_decoder.write_decoder(tmp_path, "mixtral")))
    config.model.update(train="lora", lora_rank=2, base="nf4")
    config.data.update(tokenizer="checkpoint", seq_len=12)
    config.task.name = "language_modeling"
    experiment = Experiment(config, make_mesh(jax.devices()[:1]))
    _, data = next(experiment.blocks(experiment.plan(1)))
    arguments = experiment.algorithm.arguments(data)
    printed = 1e6 * sum(float(megabytes) for _, _, megabytes, _ in parameters(experiment)[2])
    for name, lower in experiment.lower():
        if name.startswith("tier"):
            broadcast = arguments[name][1]
            parts = printed, tree_bytes((arguments[name][0], data))
            found = lower().compile().memory_analysis().argument_size_in_bytes
            assert found == pytest.approx(sum(parts), rel=0.1)
            assert tree_bytes(broadcast.frozen) > 0.5 * tree_bytes(broadcast.params)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (dict(base="nf3"), "model.base"),
        (dict(base="nf4"), "model.base"),
        (dict(train="lora"), "model.train"),
        (dict(lora_rank=0), "model.lora_rank"),
    ],
)
def test_what_cannot_be_adapted_is_refused(fields, field):
    config = get_config("smoke")
    config.model.update(fields)
    with pytest.raises(InputError) as error:
        Experiment(config, make_mesh(jax.devices()[:1]))
    assert error.value.field == field
