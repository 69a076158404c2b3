"""Names to functions: how a config chooses a part by name."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

from hfedmoe_jax.errors import InputError

_registries: list["Registry"] = []


class Registry:
    """A table of named parts, filled by a decorator and read by a config field.

    Args:
      field: the config field that chooses from this table; errors name it.

    >>> greetings = Registry("greeting.name")
    >>> @greetings.register("hello")
    ... def hello():
    ...     return "Hello!"
    >>> greetings["hello"]()
    'Hello!'
    >>> greetings["helo"]
    Traceback (most recent call last):
    ...
    hfedmoe_jax.errors.InputError: greeting.name='helo': unknown name; did you mean 'hello'? Known: hello
    """

    def __init__(self, field: str):
        self.field = field
        self._parts: dict[str, Any] = {}
        _registries.append(self)

    def register(self, name: str) -> Callable[[Any], Any]:
        """Returns a decorator that files its argument under `name` (ValueError if taken)."""

        def file(part: Any) -> Any:
            taken = self._parts.get(name)
            # A config file may be executed twice in one process; the same definition is no clash.
            if taken is not None and taken != part and _definition(taken) != _definition(part):
                raise ValueError(f"{self.field}: the name {name!r} is already registered")
            self._parts[name] = part
            return part

        return file

    def __getitem__(self, name: str) -> Any:
        if name in self._parts:
            return self._parts[name]
        raise unknown_name(self.field, name, list(self._parts))

    def items(self) -> Iterable[tuple[str, Any]]:
        """Returns the parts by name."""
        return self._parts.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)


def choice_of(code: CodeType) -> tuple[str, str] | None:
    """Returns the config field and the name by which a registered function is chosen; None: it is none.

    Args:
      code: of the function, as it is in a traceback.
    """
    for registry in _registries:
        for name, part in registry.items():
            if getattr(part, "__code__", None) is code:
                return registry.field, name
    return None


def _definition(part: Any) -> tuple[str | None, Any]:
    """Returns where a part was defined; an object without a name is only ever itself."""
    return getattr(part, "__module__", None), getattr(part, "__qualname__", part)


def unknown_name(field: str, name: str | None, known: list[str]) -> InputError:
    """Returns the error for a name that is not among `known`, with the nearest one."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return InputError(field, name, "unknown name", f"{hint}Known: {', '.join(sorted(known))}")
