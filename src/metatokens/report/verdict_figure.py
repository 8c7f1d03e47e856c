"""One figure of all contrasts: which explanation holds in which task, as `metatokens.replication` judged."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from metatokens.report.palette import colour_of_verdict

_TINT = 0.25  # opacity of a cell, so that its text can be read
_INCHES_OF_COLUMN, _INCHES_OF_ROW, _INCHES_OF_HEAD = 1.0, 0.46, 0.5
_INCHES_OF_NOTE, _LETTERS_OF_AN_INCH = 0.18, 16.0
_COLUMNS_OF_NAMES = 3.0  # room for an explanation and two arms, in columns
_LETTERS_OF_EXPLANATION, _LETTERS_OF_COLUMN = 18, 14
_POINTS_OF_NAMES, _POINTS_OF_CELLS = 9, 8


class Verdict(NamedTuple):
    """What one task says of one contrast."""

    effect: str
    """The estimate or its bound, and in brackets what each side has, or how many seeds solved the task."""
    verdict: str


class Column(NamedTuple):
    """What one task says of all its contrasts."""

    note: str
    """What its effects are, how many seeds there are, and how it was tested."""
    verdicts: Mapping[tuple[str, str, str], Verdict]
    """By explanation, first and second arm."""


def rows_of(columns: Mapping[str, Column]) -> list[tuple[str, str, str]]:
    """Return all contrasts; those of an explanation stand together, in the order in which they were named."""
    named = list(dict.fromkeys(contrast for column in columns.values() for contrast in column.verdicts))
    explanations = list(dict.fromkeys(explanation for explanation, _, _ in named))
    return sorted(named, key=lambda contrast: explanations.index(contrast[0]))


def draw_verdicts(panels: Sequence[Mapping[str, Column]]) -> Figure:
    """Draw every contrast as a row and every task as a column; an empty cell is a contrast that a task has not.

    A star stands for "within the margin".

    Args:
        panels: columns by the names of the tasks; panels stand below one another, each with the rows that it needs.
    """
    across = max(map(len, panels))
    width = _INCHES_OF_COLUMN * (_COLUMNS_OF_NAMES + across)
    notes = [*(note for columns in panels for note in _notes(columns)), "*: within the margin"]
    lines = [line for note in notes for line in wrap(note, int(width * _LETTERS_OF_AN_INCH))]
    num_rows = [len(rows_of(columns)) for columns in panels]
    height = _INCHES_OF_HEAD * len(panels) + _INCHES_OF_ROW * sum(num_rows) + _INCHES_OF_NOTE * len(lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=num_rows)
    for place, columns in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[place]), columns, across)
    figure.supxlabel("\n".join(lines), fontsize=_POINTS_OF_CELLS, x=0.01, ha="left")
    return figure


def verdict_tables(panels: Sequence[Mapping[str, Column]]) -> list[str]:
    """Write the same as tables, line by line, with the notes of each below it."""
    lines = []
    for columns in panels:
        lines += [f"| explanation | arms | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
        for contrast in rows_of(columns):
            explanation, first, second = contrast
            found = [column.verdicts.get(contrast) for column in columns.values()]
            cells = ["" if one is None else f"{one.effect}, {one.verdict}" for one in found]
            lines.append(f"| {explanation} | {first} : {second} | {' | '.join(cells)} |")
        lines += ["", *(f"- {note}." for note in _notes(columns)), ""]
    return lines


def _draw_panel(axes: Axes, columns: Mapping[str, Column], across: int) -> None:
    rows = rows_of(columns)
    for x, column in enumerate(columns.values()):
        for y, contrast in enumerate(rows):
            if contrast in column.verdicts:
                effect, verdict = column.verdicts[contrast]
                colour = to_rgba(colour_of_verdict(verdict), _TINT)
                axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="#ffffff", linewidth=1.5))
                text = f"{_narrow(effect)}\n{_short(verdict)}"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=_POINTS_OF_CELLS, linespacing=1.1)
    starts = [y for y in range(len(rows)) if y == 0 or rows[y][0] != rows[y - 1][0]]
    for y, (explanation, first, second) in enumerate(rows):
        axes.text(-0.1, y + 0.5, f"{first} : {second}", ha="right", va="center", fontsize=_POINTS_OF_NAMES)
        if y in starts:
            place = (-_COLUMNS_OF_NAMES, y + 0.5)
            text = "\n".join(wrap(explanation, _LETTERS_OF_EXPLANATION))
            axes.text(*place, text, ha="left", va="center", weight="bold", fontsize=_POINTS_OF_NAMES)
            axes.plot([-_COLUMNS_OF_NAMES, len(columns)], [y, y], color="#000000", linewidth=0.6)
    axes.set_xlim(-_COLUMNS_OF_NAMES, across)
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [name.replace(", ", "\n") for name in columns])
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=_POINTS_OF_CELLS)
    axes.set_frame_on(False)


def _notes(columns: Mapping[str, Column]) -> list[str]:
    return list(dict.fromkeys(column.note for column in columns.values()))


def _narrow(effect: str) -> str:
    """Break an effect before its bracket, or where it is too long for a cell."""
    return "\n".join(
        line for part in effect.replace(" (", "\n(").splitlines() for line in wrap(part, _LETTERS_OF_COLUMN)
    )


def _short(verdict: str) -> str:
    return verdict.replace(", within the margin", "*")
