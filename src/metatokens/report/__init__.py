"""Results for people: tables, figures, and the page of an analysis."""

from importlib.util import find_spec

from metatokens.errors import UsageError

_PACKAGES = ("jinja2", "matplotlib")


def require_packages(what: str) -> None:
    """Raise UsageError where a package of the extra `report` is not installed, before the work and not after it."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            what,
            expected=f"the package {missing[0]}",
            found="not installed",
            remedy="pip install 'metatokens[report]'",
        )
