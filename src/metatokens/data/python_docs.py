"""A corpus that comes with Python: the topics of `help()` and the docstrings of the standard library."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# packages of the standard library that hold tests, vendored code or applications
_SKIPPED_PACKAGES = frozenset(
    {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"}
    | {"site-packages", "dist-packages"}
)


def python_docs() -> Iterator[tuple[str, str]]:
    """Yield (text, name) of each topic of `help()`, then of each module of the standard library."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield topics[topic], f"pydoc_data.topics, {topic}"
    root = Path(sysconfig.get_path("stdlib"))
    for folder, packages, names in os.walk(root):
        packages[:] = sorted(set(packages) - _SKIPPED_PACKAGES)  # in place: os.walk enters these, in this order
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            relative = path.relative_to(root)
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            text = _documentation(path, module)
            if text:
                yield text, f"python/{relative.as_posix()}"


@functools.cache  # 2 MB in all; parsing takes a second or two, and `metatokens demo` reads everything three times
def _documentation(path: Path, module: str) -> str:
    """Return the docstrings of a file of the standard library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some string literals of the library have deprecated escapes
        tree = ast.parse(path.read_bytes())
    return "\n\n".join(_docstrings(tree, module))


def _docstrings(node: ast.AST, name: str) -> Iterable[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n{docstring}"
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}")
