"""One figure of all contrasts: which explanation holds in which task, as `metatokens.replication` judged."""

from collections.abc import Mapping
from textwrap import wrap
from typing import NamedTuple

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from metatokens.report.palette import colour_of_verdict

_TINT = 0.25  # opacity of a cell, so that its text can be read
_INCHES_OF_COLUMN, _INCHES_OF_ROW, _INCHES_OF_HEAD = 1.35, 0.42, 0.7
_INCHES_OF_NOTE, _LETTERS_OF_AN_INCH = 0.18, 14.0
_COLUMNS_OF_NAMES = 3.1  # room for an explanation and two arms, in columns


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


def draw_verdicts(columns: Mapping[str, Column]) -> Figure:
    """Draw every contrast as a row and every task as a column; an empty cell is a contrast that a task has not.

    A star stands for "within the margin".

    Args:
        columns: by the names of the tasks.
    """
    rows = rows_of(columns)
    width = _INCHES_OF_COLUMN * (_COLUMNS_OF_NAMES + len(columns))
    notes = [*_notes(columns), "*: within the margin"]
    lines = [line for note in notes for line in wrap(note, int(width * _LETTERS_OF_AN_INCH))]
    height = _INCHES_OF_HEAD + _INCHES_OF_ROW * len(rows) + _INCHES_OF_NOTE * len(lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for x, column in enumerate(columns.values()):
        for y, contrast in enumerate(rows):
            if contrast in column.verdicts:
                effect, verdict = column.verdicts[contrast]
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
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left")
    return figure


def verdict_table(columns: Mapping[str, Column]) -> list[str]:
    """Write the same as a table, line by line."""
    lines = [f"| explanation | arms | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for contrast in rows_of(columns):
        explanation, first, second = contrast
        found = [column.verdicts.get(contrast) for column in columns.values()]
        cells = ["" if one is None else f"{one.effect}, {one.verdict}" for one in found]
        lines.append(f"| {explanation} | {first} : {second} | {' | '.join(cells)} |")
    return [*lines, "", *(f"- {note}." for note in _notes(columns))]


def _notes(columns: Mapping[str, Column]) -> list[str]:
    return list(dict.fromkeys(column.note for column in columns.values()))


def _short(verdict: str) -> str:
    return verdict.replace(", within the margin", "*")
