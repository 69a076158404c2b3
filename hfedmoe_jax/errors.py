"""The one exception that stands for a user's mistake."""

from typing import Any


class InputError(ValueError):
    """A value the user gave that cannot be used; its text is one line.

    The command line prints the text and exits with code 2; a notebook sees an
    ordinary `ValueError`.

    Args:
      field: the config field or argument at fault, e.g. `partition.alpha`.
      value: what was given.
      problem: what is wrong with it.
      remedy: what to do instead.

    >>> print(InputError("partition.alpha", -1.0, "must be above 0", "use e.g. 0.3"))
    partition.alpha=-1.0: must be above 0; use e.g. 0.3
    """

    def __init__(self, field: str, value: Any, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        text = f"{field}={value!r}: {problem}; {remedy}"
        super().__init__(" ".join(text.split()))
