"""How numbers of an analysis are written for people."""

import math
from typing import Any

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


def format_share(share: float | None) -> str:
    """Return a share in percent; a small one keeps two digits."""
    return "n/a" if share is None else f"{100 * share:.1f}%" if share >= 0.001 else f"{100 * share:.2g}%"


def format_p(value: float) -> str:
    """Return a p-value as a relation, such as "= 0.031"."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


_LONGEST_WRITTEN_OUT = 10**9  # a larger number is read more easily with a prefix


def format_seconds(seconds: float) -> str:
    """Return a time for people, such as "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def format_large(number: float, unit: str = "") -> str:
    """Return a number with a prefix of a thousand, such as "1.2M" or "25 MB"."""
    number = float(f"{number:.3g}")
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g}{f' {prefix}{unit}' if unit else prefix.replace('G', 'B')}"
    return f"{number:.3g}{f' {unit}' if unit else ''}"


_LABELS = {
    "num_parameters": "parameters",
    "bit_exact": "same bits as an uninterrupted run",
    "waited_for_batches": "time spent waiting for batches",
    "token_accuracy": "tokens right",
    "sequence_accuracy": "answers right",
    "chance": "guesses right",
}
"""Where a name alone would not tell a person what the value is."""
_SHARES = {"waited_for_batches", "token_accuracy", "sequence_accuracy", "chance"}


def format_name(name: str) -> str:
    """Return the name of a value as people read it."""
    return _LABELS.get(name, name.replace("_", " "))


def format_value(name: str, value: Any) -> str:
    """Return a named value for people; the words bytes, seconds, flops and loss in its name give the unit."""
    if isinstance(value, list):
        return "\n".join(str(item) for item in value)
    if isinstance(value, dict):
        return "\n".join(f"{format_name(key)} {format_value(key, item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _format_quantity(name, value) if isinstance(value, int | float) else str(value)


def _format_quantity(name: str, value: float) -> str:
    if name in _SHARES:
        return format_share(value)
    words = name.split("_")
    if words[-1] == "seconds":
        return format_seconds(value)
    unit = "B" if "bytes" in words else "FLOP" if "flops" in words else ""
    if unit or abs(value) >= _LONGEST_WRITTEN_OUT:
        return format_large(value, unit)
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.{'0f' if abs(value) >= 1000 else '4g'}}"
    return f"{number} nats" if words[-1] == "loss" else number
