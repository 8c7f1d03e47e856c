"""The name that was meant by a misspelt one."""

import difflib
from collections.abc import Iterable


def nearest_name(name: str, candidates: Iterable[str]) -> str:
    """Ask whether the candidate that is spelt most alike was meant; empty if none is."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""
