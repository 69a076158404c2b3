"""What a model is to the rest of the package, and the table of model families.

A family is a function of the config's section `model` and the task's sizes that returns a Flax module:

    module(batch, budget=None, training=True) -> ModelOutput

with the attributes `sizes`, `num_layers` (of mixtures of experts), `num_experts`, `top_k`, `width` (of what
enters an expert), `expert`, `table` and `output`, and a method `mask(batch)`. `table` names an embedding
table [sizes.vocab_size, ...] that nothing but a look-up of batch["tokens"] reads, or is None: clients then
hold the rows of their own tokens alone. `output` is of `tasks.Task`'s kinds. The module's
parameters hold `experts`, a tree of [L, E, ...], at the top, and routers in modules named `router`. Without
a budget it runs its own experts; with one, those of the budget. A module that starts from a checkpoint has
the methods that `hfedmoe_jax.mixtures.load_start` asks for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.experts import Budget, Expert, flat
from hfedmoe_jax.models.frozen import check_base, keep_frozen
from hfedmoe_jax.models.lora import adapt, init_factors, join, lora_rule
from hfedmoe_jax.models.params import Params, merge_params, split_params
from hfedmoe_jax.models.precision import PRECISIONS
from hfedmoe_jax.models.routing import Routing
from hfedmoe_jax.registry import Registry, unknown_name


class ModelSizes(NamedTuple):
    """What a task asks of a model.

    Attributes:
      num_outputs: of its head.
      vocab_size: of the tokenizer.
      seq_len: tokens of a text.
      offset: what is added to a checkpoint's token numbers where its token 0 is not padding.
    """

    num_outputs: int
    vocab_size: int
    seq_len: int
    offset: int = 0


class ModelOutput(NamedTuple):
    """What a module returns.

    Attributes:
      output: what the task scores, e.g. logits.
      tape, permit: see `hfedmoe_jax.experts`; permits [L, H].
      routing: of all layers.
    """

    output: Any
    tape: Any
    permit: Float[Array, "layers local_experts"]
    routing: Routing


FEATURES = "features"
"""What a batch may have beside its tokens: what enters the first layer with experts [B, T, D], see
`hfedmoe_jax.trunk`."""
ATTENDED = "attended"
"""Or what the network of this layer reads, behind its attention [B, T, D]."""

families = Registry("model.family")
"""Functions `(config: ConfigDict, sizes: ModelSizes) -> nn.Module` by name."""


class MoeModel(NamedTuple):
    """A model as pure functions, with the sizes that selection and budgets need.

    Attributes:
      init: key -> (Params, frozen parameters).
      apply: (params, frozen, batch, budget, training) -> ModelOutput; of `params` the router and the shared
        part are read, experts are the budget's.
      weights: (experts, frozen) -> trees [L, E, ...] of what `expert` reads.
      expert: computes one expert.
      mask: batch -> bool [B, T], the real tokens; [L, B, T] if layers see unlike ones.
      num_layers: L, mixtures of experts.
      num_experts: E, experts of each.
      top_k: experts of a token.
      module: what its family returned.
      table: the name in `Params.shared` of an array [vocabulary, D] of which a batch reads the rows of
        batch["tokens"] alone, or None: the table is frozen, or there is none.
    """

    init: Callable[[jax.Array], tuple[Params, dict]]
    apply: Callable[[Params, dict, Any, Budget, bool], ModelOutput]
    weights: Callable[[Any, dict], Any]
    expert: Expert
    mask: Callable[[Any], Bool[Array, "*layers batch tokens"]]
    num_layers: int
    num_experts: int
    top_k: int
    module: Any
    table: str | None

    @property
    def all_experts(self) -> int:
        """Experts of all layers."""
        return self.num_layers * self.num_experts


def build_model(config: ConfigDict, sizes: ModelSizes, example: Any) -> MoeModel:
    """Returns the model of `config` (the section `model` of a run's config).

    Args:
      example: shapes of a batch.

    Raises:
      InputError: an unknown family or precision, a size below one, top_k above the experts, or what the
        family refuses.
    """
    check_sizes(config)
    rule = lora_rule(config)
    check_base(config.base, rule is not None)
    module = families[config.family](config, sizes)
    # One text initialises as well as many.
    inputs = {name: x for name, x in example.items() if name not in (FEATURES, ATTENDED)}
    one = {name: jnp.zeros((1, *x.shape[1:]), x.dtype) for name, x in inputs.items()}

    def init(key: jax.Array) -> tuple[Params, dict]:
        params, frozen = split_params(module.init(key, one)["params"], config.train)
        if rule is None:
            return params, frozen
        factors = init_factors(jax.random.fold_in(key, 1), params.experts, rule)
        frozen = keep_frozen(frozen | {"experts": params.experts}, config.base)
        return params._replace(experts=factors), frozen

    def weights(experts: Any, frozen: dict) -> Any:
        return experts if rule is None else join(frozen["experts"], experts, rule.scale)

    def apply(params: Params, frozen: dict, batch: Any, budget: Budget, training: bool) -> ModelOutput:
        if rule is not None:
            budget = adapt(budget, flat(frozen["experts"]), rule.scale)
            frozen = {name: tree for name, tree in frozen.items() if name != "experts"}
        variables = merge_params(params.router, params.shared, frozen)
        held = module
        if table is not None:  # a client may hold fewer rows of it
            held = module.clone(sizes=sizes._replace(vocab_size=params.shared[table].shape[0]))
        return held.apply({"params": variables}, batch, budget, training)

    shapes, _ = jax.eval_shape(init, jax.random.key(0))
    table = module.table if module.table in shapes.shared else None
    return MoeModel(
        init, apply, weights, module.expert, module.mask, module.num_layers, module.num_experts,
        module.top_k, module, table,
    )  # fmt: skip


def check_sizes(config: ConfigDict) -> None:
    """Raises InputError for what no family can be built of."""
    if config.precision not in PRECISIONS:
        raise unknown_name("model.precision", config.precision, list(PRECISIONS))
    if config.top_k > config.num_experts:
        raise InputError("model.top_k", config.top_k, f"above model.num_experts={config.num_experts}",
                         "route a token to at most all experts")  # fmt: skip
