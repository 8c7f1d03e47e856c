"""The page's template, styles and scripts."""

from importlib import resources


def read_asset(name: str) -> str:
    """Return a file of this folder as text."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
