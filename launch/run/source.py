"""The user's own code that a config is made of: the config file and the modules that it imports."""

import ast
import contextlib
import hashlib
import os
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import choice_of
from launch.run.program import is_one_line

WHOLE = "JAX_TRACEBACK_FILTERING"
ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARIES = [
    *(
        pathlib.Path(sysconfig.get_path(name)).resolve()
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ),
    *(ROOT / package for package in ("hfedmoe_jax", "slide_jax", "launch")),
]


def source_digest(file: str) -> str:
    """Returns the SHA-256 of a config file's text and of the modules of the user's that it imports.

    Modules count if the file, or another module that counts, has an import statement for them. Installed
    libraries and this framework do not: their versions are kept with a run.

    Args:
      file: a config file that has been executed.
    """
    digest = hashlib.sha256()
    for path in own_sources(pathlib.Path(file)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def own_sources(file: pathlib.Path) -> list[pathlib.Path]:
    """Returns the config file, then the files of its own modules in the order of its import statements."""
    found, waiting = {}, [(file.resolve(), "")]
    while waiting:
        path, package = waiting.pop(0)
        if path not in found:
            found[path] = None
            for name in imported_names(path.read_text(encoding="utf-8"), package):
                module = sys.modules.get(name)
                source = getattr(module, "__file__", None)  # built-in modules have none
                if module and source and is_own(pathlib.Path(source).resolve()):
                    waiting.append((pathlib.Path(source).resolve(), module.__package__ or ""))
    return list(found)


def imported_names(text: str, package: str = "") -> Iterator[str]:
    """Yields the dotted names that may be modules in a source's import statements.

    >>> list(imported_names("import a.b; from c import d; from .e import f", "p"))
    ['a', 'a.b', 'c', 'c.d', 'p', 'p.e', 'p.e.f']

    Args:
      package: of the source, which relative imports start from.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            yield from parents(name)
            yield from (f"{name}.{alias.name}" for alias in node.names)


def parents(name: str) -> list[str]:
    """Returns the packages of a dotted name, and the name itself."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


@contextlib.contextmanager
def told_errors(config: str) -> Iterator[None]:
    """Raises an `InputError`, with place and message, for an exception from a function of the user's.

    With JAX_TRACEBACK_FILTERING=off, which shows JAX's own calls too, the exception stays as it is.

    Args:
      config: FILE or FILE:PRESET; functions of the file and of its own modules are the user's.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(WHOLE) == "off" or is_one_line(error):
            raise
        own = set(own_sources(pathlib.Path(config.partition(":")[0])))
        codes = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        theirs = [(code, line) for code, line in codes if pathlib.Path(code.co_filename).resolve() in own]
        if not theirs:
            raise
        chosen = (choice for code, _ in theirs if (choice := choice_of(code)))
        field, value = next(chosen, ("config", config))
        code, line = theirs[-1]
        message = str(error).strip().partition("\n")[0]
        problem = f"{code.co_filename}:{line}: {type(error).__name__}: {message}"
        raise InputError(
            field, value, problem, f"correct it; {WHOLE}=off shows the whole traceback"
        ) from error


def is_own(source: pathlib.Path) -> bool:
    """Whether a Python file is neither of a library nor of this framework."""
    return source.suffix == ".py" and not any(source.is_relative_to(root) for root in LIBRARIES)
