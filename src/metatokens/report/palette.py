"""Colours and markers of all figures, and the legend of verdicts."""

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe, Ito 2008, "Color Universal Design": told apart with any kind of colour vision; yellow last, faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"

_COLOURS_OF_VERDICTS = dict(
    zip(("equivalent", "opposite", "supported", "differs"), COLOURS[:4], strict=True)  # a control differs
)
_UNDECIDED_COLOUR = COLOURS[6]


def colour_of_verdict(verdict: str) -> str:
    """Return the colour of a verdict, whether it lies within the margin too or not."""
    return _COLOURS_OF_VERDICTS.get(_without_margin(verdict), _UNDECIDED_COLOUR)


def add_legend_of_verdicts(figure: Figure, verdicts: Iterable[str]) -> None:
    """Add a legend of the verdicts that a figure shows, below it."""
    found = dict.fromkeys(map(_without_margin, verdicts))
    handles = [Line2D([], [], color=colour_of_verdict(verdict), marker="o") for verdict in found]
    figure.legend(handles, list(found), loc="outside lower center", ncols=len(found), frameon=False)


def _without_margin(verdict: str) -> str:
    return verdict.partition(",")[0]
