"""Model profiles: sizes and work layer by layer, computed from the architectures.

model = to_model(profile("resnet50"), bits_per_parameter=8)  # an entry of a scenario's "models"
"""

import inspect
from collections.abc import Callable
from typing import Any

from slide_jax.errors import InputError, unknown_name
from slide_jax.profiles.convolutional import efficientnet_lite0, resnet50, resnet152
from slide_jax.profiles.layers import Layer, Profile, to_model
from slide_jax.profiles.mixture import switch_classifier
from slide_jax.profiles.recurrent import lstm
from slide_jax.profiles.transformers import gpt2, llama3_8b, smollm2_135m, vit_b16, vit_l16

PROFILES: dict[str, Callable[..., Profile]] = {
    builder.__name__: builder
    for builder in (
        resnet50,
        resnet152,
        efficientnet_lite0,
        vit_b16,
        vit_l16,
        gpt2,
        smollm2_135m,
        llama3_8b,
        lstm,
        switch_classifier,
    )
}
"""Builders by name. All but `switch_classifier`, which has no published sizes, can be called without any."""


def profile(name: str, **sizes: Any) -> Profile:
    """Returns the profile of a model.

    Args:
      name: one of `PROFILES`.
      **sizes: arguments of its builder, e.g. `sequence_length` or `accuracy`.

    Raises:
      InputError: an unknown name or size, a size that is missing or invalid.

    >>> profile("gpt2", sequence_length=1024).layers[0]
    Layer(name='embedding', parameters=39383808, macs=0)
    >>> profile("resnet5")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    slide_jax.errors.InputError: model='resnet5': unknown name; did you mean 'resnet50'? Known: ...
    """
    if name not in PROFILES:
        raise unknown_name("model", name, PROFILES)
    accepted = inspect.signature(PROFILES[name]).parameters
    for size in sizes:
        if size not in accepted:
            raise unknown_name(f"size of {name}", size, accepted)
    for size, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and size not in sizes:
            raise InputError(size, None, f"{name} has no default for it", "give it by name")
    return PROFILES[name](**sizes)


__all__ = [
    "PROFILES",
    "Layer",
    "Profile",
    "efficientnet_lite0",
    "gpt2",
    "llama3_8b",
    "lstm",
    "profile",
    "resnet50",
    "resnet152",
    "smollm2_135m",
    "switch_classifier",
    "to_model",
    "vit_b16",
    "vit_l16",
]
