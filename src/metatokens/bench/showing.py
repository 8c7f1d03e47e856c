"""A result as a table on the console, as JSON, and as a picture."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metatokens.bench.measuring import BenchResult, Line
from metatokens.bench.turns import Spread
from metatokens.report.console import show_rows, show_table
from metatokens.report.numbers import format_value
from metatokens.storage import to_json, write_atomically

DIGITS = 6
"""Significant ones of a number in the JSON."""


def show(result: BenchResult) -> None:
    """Print the times of each part, the ratios, and what was counted."""
    for part in _parts(result):
        show_rows(f"{result.question}: {part}", [_row(line) for line in result.lines if line.part == part])
    for per in ("per_text_token", "per_position"):
        rows = [*_ratio_rows(result, per)]
        if rows and (per == "per_text_token" or rows != [*_ratio_rows(result, "per_text_token")]):
            show_rows(f"ratios {per.replace('_', ' ')}, +- half the quartiles' distance", rows)
    if result.facts:
        show_rows(f"{result.question}: counted", [_fact_row(name, facts) for name, facts in result.facts.items()])
    if result.not_run:
        show_table("not run", result.not_run)


def plain_tree(result: BenchResult) -> Any:
    """Return a result as plain values with a few digits, for JSON."""
    return _rounded(asdict(result))


def write_json(result: BenchResult, path: Path) -> None:
    """Write all of a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(plain_tree(result), indent=1) + "\n")


def draw(result: BenchResult, path: Path) -> None:
    """Draw microseconds per text token: a panel for each part, a bar for each contender, a line at its limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = _parts(result)
    height = 0.8 + 0.3 * max(len(_lines_of(result, part)) for part in parts)
    figure = Figure(figsize=(4.2 * len(parts), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        lines = _lines_of(result, part)[::-1]
        scale = [line.microseconds_per_text_token / line.seconds.median for line in lines]
        middle = [line.microseconds_per_text_token for line in lines]
        below = [(line.seconds.median - line.seconds.low) * one for line, one in zip(lines, scale, strict=True)]
        above = [(line.seconds.high - line.seconds.median) * one for line, one in zip(lines, scale, strict=True)]
        axes.barh([line.contender for line in lines], middle, xerr=[below, above], color="#56B4E9")
        for index, (line, one) in enumerate(zip(lines, scale, strict=True)):
            if line.limit_seconds is not None:
                limit = line.limit_seconds * one
                axes.plot([limit, limit], [index - 0.4, index + 0.4], color="#D55E00")
        axes.set_title(part, fontsize=9)
        axes.set_xlabel("microseconds per text token; line: the machine's limit", fontsize=7)
        axes.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _parts(result: BenchResult) -> list[str]:
    return list(dict.fromkeys(line.part for line in result.lines))


def _lines_of(result: BenchResult, part: str) -> list[Line]:
    return [line for line in result.lines if line.part == part]


def _row(line: Line) -> dict[str, Any]:
    return {
        "contender": line.contender,
        "ms": _span(line.seconds, 1e3),
        "us per text token": f"{line.microseconds_per_text_token:.4g}",
        "us per position": f"{line.microseconds_per_position:.4g}",
        "of the limit": "" if line.share_of_limit is None else f"{line.share_of_limit:.0%}",
    }


def _ratio_rows(result: BenchResult, per: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair: its ratios by part."""
    parts = dict.fromkeys(one.part for one in result.ratios)
    for pair in dict.fromkeys((one.above, one.below) for one in result.ratios):
        found = {one.part: getattr(one, per) for one in result.ratios if (one.above, one.below) == pair}
        yield {
            "seconds of": " / ".join(pair),
            **{part: _briefly(found[part]) if part in found else "" for part in parts},
        }


def _fact_row(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {"contender": name, **{fact: format_value(fact, value) for fact, value in facts.items()}}


def _span(figure: Spread, scale: float = 1) -> str:
    return f"{scale * figure.median:.4g} ({scale * figure.low:.4g} to {scale * figure.high:.4g})"


def _briefly(figure: Spread) -> str:
    return f"{figure.median:.3f} +-{(figure.high - figure.low) / 2:.3f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
