"""The code that travels with a graft: copies of this package's files, for a place where it is not installed.

transformers fetches the files that a module reaches by relative imports, from one flat folder. So the copy of
`graft/cache.py` is `graft_cache.py`, and each line that imports from a file of the package names its copy; nothing else
of a file changes.
"""

import re
from pathlib import Path

ENTRY = "graft.opening"
"""The module that opens the model; it and what it imports travel."""
_PACKAGE = Path(__file__).parents[1]
_IMPORT = re.compile(r"^( *from )(metatokens)?\.([\w.]+)(?= import )", re.MULTILINE)


def flat_code() -> dict[str, str]:
    """Return the text of each file that travels, by its name."""
    found: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if flat_name(module) not in found:
            found[flat_name(module)], imported = _flatten(module)
            waiting += imported
    return {f"{name}.py": text for name, text in sorted(found.items())}


def flat_name(module: str) -> str:
    """Return the name of a module's copy; the module is named from the package on, as in `graft.cache`."""
    return module.replace(".", "_")


def _flatten(module: str) -> tuple[str, list[str]]:
    """Return the text of a module's copy, and the modules that it imports."""
    imported = []

    def rename(line: re.Match[str]) -> str:
        start, is_absolute, name = line.groups()
        imported.append(name if is_absolute else f"{module.rpartition('.')[0]}.{name}")
        return f"{start}.{flat_name(imported[-1])}"

    text = (_PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    return _IMPORT.sub(rename, text), imported
