"""The tensors of Switch Transformers of the hub, by the parameters of `switch_t5.SwitchT5`."""

from hfedmoe_jax.models.names import Name
from hfedmoe_jax.models.switch_t5_sizes import StackSizes, SwitchSizes

UNUSED = r"^((encoder|decoder)\.embed_tokens|lm_head)\.weight$"
"""Copies of the embedding table."""


def switch_t5_names(sizes: SwitchSizes) -> list[Name]:
    """Returns the names of all parameters; experts of the encoder's layers come before the decoder's."""
    names = [Name("embed", "shared.weight")]
    layers: list[str] = []
    for stack, shape in (("encoder", sizes.encoder), ("decoder", sizes.decoder)):
        names += _stack(stack, shape)
        network = 2 if shape.causal else 1
        layers += [f"{stack}.block.{layer}.layer.{network}" for layer in shape.mixture_layers]
    for path, tensor in {"experts/w_in_df": "wi", "experts/w_out_fd": "wo"}.items():
        stored = f"{{layer}}.mlp.experts.expert_{{expert}}.{tensor}.weight"
        names.append(Name(path, stored, True, layers=tuple(layers)))
    router = "{layer}.mlp.router.classifier."
    names.append(Name("router/kernel", router + "weight", True, layers=tuple(layers)))
    if sizes.router_bias:
        names.append(Name("router/bias", router + "bias", layers=tuple(layers)))
    return names


def _stack(stack: str, shape: StackSizes) -> list[Name]:
    first = f"{stack}.block.0.layer.0.SelfAttention"
    names = [
        Name(f"{stack}/norm/scale", f"{stack}.final_layer_norm.weight"),
        Name(f"{stack}/position", f"{first}.relative_attention_bias.weight"),
    ]
    network = 2 if shape.causal else 1
    parts = {"norm_self": 0, "norm_cross": 1, "norm_network": 2} if shape.causal else {
        "norm_self": 0, "norm_network": 1
    }  # fmt: skip
    attentions = {"self": "0.SelfAttention"} | ({"cross": "1.EncDecAttention"} if shape.causal else {})
    for place in range(shape.step):
        mixture = place == shape.place
        layers = tuple(str(layer) for layer in range(place, shape.layers, shape.step))
        root = f"{stack}/layers/" + ("mixture" if mixture else f"dense_{place}")
        block = f"{stack}.block.{{layer}}.layer."

        def add(path: str, tensor: str, transposed: bool = False, root=root, block=block, layers=layers):
            names.append(Name(f"{root}/{path}", block + tensor, transposed, layers=layers))

        for path, part in parts.items():
            add(f"attend/{path}/scale", f"{part}.layer_norm.weight")
        for path, tensor in attentions.items():
            for which in ("query", "key", "value", "out"):
                add(f"attend/{path}/{which}/kernel", f"{tensor}.{which[0]}.weight", True)
        if not mixture:
            for path, tensor in {"in": "wi", "out": "wo"}.items():
                add(f"network_{path}/kernel", f"{network}.mlp.{tensor}.weight", True)
    return names
