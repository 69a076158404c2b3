"""Fields of a checkpoint's config.json, each with its type and range."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from hfedmoe_jax.errors import InputError

MOST = 2**31 - 1
PUBLISHED_REMEDY = "use the directory as it was published"


class ConfigFields:
    """Reads the fields of a config.json; one that is null counts as missing.

    Args:
      content: of the file.
      source: directory of the checkpoint, for errors.
    """

    def __init__(self, content: Mapping[str, Any], source: str = "config.json"):
        self.content, self.source = content, source

    def refuse(self, problem: str, remedy: str = PUBLISHED_REMEDY) -> NoReturn:
        """Raises an InputError."""
        raise InputError("model.source", self.source, f"config.json has {problem}", remedy)

    def value(self, *names: str) -> tuple[str, Any]:
        """Returns the first of these fields that is there, and its value; or the first name, and None."""
        return next(
            ((name, x) for name in names if (x := self.content.get(name)) is not None), (names[0], None)
        )

    def whole(self, *names: str, default: int | None = None, low: int = 1) -> int:
        """Returns a whole number of at least `low`, of the first of these fields that is there.

        Args:
          default: where none is; None: one must be.
        """
        name, value = self.value(*names)
        if value is None:
            if default is None:
                self.refuse(f"no {name}")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST:
            self.refuse(f"{name}={value!r}, which is no whole number from {low} to {MOST}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        """Returns a finite number of at least `low`; the default may be below it, None: it must be there."""
        value = self.content.get(name)
        if value is None:
            if default is None:
                self.refuse(f"no {name}")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
            self.refuse(f"{name}={value!r}, which is no number of at least {low:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns whether a field is true."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(f"{name}={value!r}, which is neither true nor false")
        return default if value is None else value

    def group(self, *names: str) -> "ConfigFields":
        """Returns the fields of the first of these objects that is there and not empty."""
        name, value = self.value(*[name for name in names if self.content.get(name) != {}] or names)
        if value is not None and not isinstance(value, dict):
            self.refuse(f"{name}={value!r}, which is no object")
        return ConfigFields(value or {}, self.source)

    def only(self, name: str, *known: Any, default: Any = None) -> Any:
        """Returns a field that is one of the values which the modules compute."""
        value = self.content.get(name)
        value = (known[0] if default is None else default) if value is None else value
        if value not in known:
            self.refuse(f"{name}={value!r}", f"only {' and '.join(map(repr, known))} can be computed")
        return value

    def refuse_quantised(self) -> None:
        """Refuses weights of few bits."""
        kind = self.content.get("quantization_config")
        if kind is not None:
            method = kind.get("quant_method") if isinstance(kind, dict) else kind
            remedy = "use the weights in float32, float16 or bfloat16 (model.base keeps them in few bits)"
            self.refuse(f"quantization_config {method!r}", remedy)
