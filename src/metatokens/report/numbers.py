"""How numbers of an analysis are written for people."""

import math

from metatokens.analysis.results import Record, Verdict


def format_estimate(number: Record | Verdict) -> str:
    """Return a number with its interval and unit."""
    if number.value is None:
        return "n/a"
    return f"{format_span(number)}{'' if number.unit in ('', '1') else f' {number.unit}'}"


def format_span(number: Record | Verdict) -> str:
    """Return a number with its interval."""
    interval = "" if number.low is None else f" ({format_number(number.low)} to {format_number(number.high)})"
    return f"{format_number(number.value)}{interval}"


def format_number(value: float | None) -> str:
    """Return a number with the digits that its size asks for."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.2g}" if abs(value) < 1 else f"{value:,.0f}"


def format_p(value: float) -> str:
    """Return a p-value as a relation, such as "= 0.031"."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
