"""One figure of all contrasts: which explanation holds in which task, as `metatokens.replication` judged."""

from collections.abc import Mapping
from typing import NamedTuple

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from metatokens.report.solve_figures import colour_of_verdict

_TINT = 0.25  # opacity of a cell, so that its text can be read
_INCHES_OF_COLUMN, _INCHES_OF_ROW, _INCHES_OF_HEAD = 1.15, 0.42, 0.7
_COLUMNS_OF_NAMES = 3.6  # room for an explanation and two arms, in columns


class Verdict(NamedTuple):
    """What one task says of one contrast."""

    effect: str
    """The estimate, with its unit if it is no ratio."""
    verdict: str


Column = Mapping[tuple[str, str, str], Verdict]
"""The verdicts of one task by explanation, first and second arm."""


def rows_of(columns: Mapping[str, Column]) -> list[tuple[str, str, str]]:
    """Return all contrasts; those of an explanation stand together, in the order in which they were named."""
    named = list(dict.fromkeys(contrast for column in columns.values() for contrast in column))
    explanations = list(dict.fromkeys(explanation for explanation, _, _ in named))
    return sorted(named, key=lambda contrast: explanations.index(contrast[0]))


def draw_verdicts(columns: Mapping[str, Column]) -> Figure:
    """Draw every contrast as a row and every task as a column; an empty cell is a contrast that a task has not.

    A star stands for "within the margin".

    Args:
        columns: by the names of the tasks.
    """
    rows = rows_of(columns)
    width = _INCHES_OF_COLUMN * (_COLUMNS_OF_NAMES + len(columns))
    figure = Figure(figsize=(width, _INCHES_OF_HEAD + _INCHES_OF_ROW * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for x, column in enumerate(columns.values()):
        for y, contrast in enumerate(rows):
            if contrast in column:
                effect, verdict = column[contrast]
                colour = to_rgba(colour_of_verdict(verdict), _TINT)
                axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="#ffffff", linewidth=1.5))
                text = f"{effect}\n{_short(verdict)}"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, linespacing=1.1)
    starts = [y for y in range(len(rows)) if y == 0 or rows[y][0] != rows[y - 1][0]]
    for y, (explanation, first, second) in enumerate(rows):
        axes.text(-0.1, y + 0.5, f"{first} : {second}", ha="right", va="center")
        if y in starts:
            axes.text(-_COLUMNS_OF_NAMES, y + 0.5, explanation, ha="left", va="center", weight="bold")
            axes.axhline(y, color="#000000", linewidth=0.6)
    axes.set_xlim(-_COLUMNS_OF_NAMES, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [name.replace(", ", "\n") for name in columns])
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    return figure


def verdict_table(columns: Mapping[str, Column]) -> list[str]:
    """Write the same as a table, line by line."""
    lines = [f"| explanation | arms | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for contrast in rows_of(columns):
        explanation, first, second = contrast
        cells = [f"{one.effect}, {one.verdict}" if (one := column.get(contrast)) else "" for column in columns.values()]
        lines.append(f"| {explanation} | {first} : {second} | {' | '.join(cells)} |")
    return lines


def _short(verdict: str) -> str:
    return verdict.replace(", within the margin", "*")
