"""What every topic uses: committed JSON, and how numbers and tables are written."""

import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@cache
def load(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def span(number: Any, form: str, scale: float = 1, unit: str = "") -> str:
    """Write an interval or a record: the estimate, and from where to where."""
    estimate = number["estimate"] if "estimate" in number else number["value"]
    low, high = number["low"], number["high"]
    return f"{scale * estimate:{form}}{unit} ({scale * low:{form}} to {scale * high:{form}})"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
