"""The user's own code that a config is made of: the config file and the modules that it imports."""

import ast
import hashlib
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

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


def is_own(source: pathlib.Path) -> bool:
    """Whether a Python file is neither of a library nor of this framework."""
    return source.suffix == ".py" and not any(source.is_relative_to(root) for root in LIBRARIES)
