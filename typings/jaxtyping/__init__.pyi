"""What pyright is told of jaxtyping: an array is JAX's or NumPy's, and the text behind it is its shape.

The functions here take either kind, and tests check shapes as they run, so that to pyright an array is `Any`.
Without this file an array would be JAX's alone.
"""

from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Float32
from typing import Annotated as Float64
from typing import Annotated as Inexact
from typing import Annotated as Int
from typing import Annotated as Int32
from typing import Annotated as Int64
from typing import Annotated as Integer
from typing import Annotated as Key
from typing import Annotated as Num
from typing import Annotated as Shaped
from typing import Annotated as UInt
from typing import Any

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Float32",
    "Float64",
    "Inexact",
    "Int",
    "Int32",
    "Int64",
    "Integer",
    "Key",
    "Num",
    "Shaped",
    "UInt",
]

Array = Any
ArrayLike = Any

def __getattr__(name: str) -> Any: ...
