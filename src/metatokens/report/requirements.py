"""The packages of the extra `report`, asked for before the work and not after it."""

from importlib.util import find_spec

from metatokens.errors import UsageError

FIGURE_PACKAGES = ("matplotlib",)
PAGE_PACKAGES = ("jinja2", "matplotlib")


def require(what: str, packages: tuple[str, ...]) -> None:
    """Raise UsageError where a package is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            what,
            expected=f"the package {missing[0]}",
            found="not installed",
            remedy="pip install 'metatokens[report]'",
        )
