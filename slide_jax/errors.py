"""The exception for mistakes in a user's input."""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """A value from the user that cannot be used; its text is one line.

    The command line prints the text and exits with code 2; a notebook sees an
    ordinary `ValueError`.

    Args:
      field: where the value stands: a JSON path such as `users[3].deadline_s`, or an argument.
      value: what was given.
      problem: what is wrong with it.
      remedy: what to do instead.

    >>> print(InputError("users[3].deadline_s", -1.0, "must be above 0", "give seconds, e.g. 2.0"))
    users[3].deadline_s=-1.0: must be above 0; give seconds, e.g. 2.0
    """

    def __init__(self, field: str, value: Any, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        text = " ".join(f"{field}={value!r}: {problem}; {remedy}".split())
        super().__init__(text.encode("utf-8", "backslashreplace").decode())  # what no terminal can print


def unknown_name(field: str, name: Any, known: Iterable[str]) -> InputError:
    """Returns the error for a name that is not among `known`, with the nearest one.

    >>> print(unknown_name("solver", "exat", ["exact", "relaxed"]))
    solver='exat': unknown name; did you mean 'exact'? Known: exact, relaxed
    """
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return InputError(field, name, "unknown name", f"{hint}Known: {', '.join(sorted(known)) or 'none'}")
