"""The figure of answers right by length, drawn from what `metatokens.replication.accuracies` found."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from metatokens.report.palette import add_legend_of_verdicts, colour_of_verdict

_INCHES_OF_ROW, _INCHES_OF_LETTER, _INCHES_OF_PANEL = 0.26, 0.08, 3.4


def draw_accuracies(reports: Sequence[dict[str, Any]], margin: float) -> Figure:
    """Draw the difference of every contrast at every length with its interval, one panel for each task; seeds as dots.

    Args:
        reports: of tasks that have the same contrasts.
        margin: differences up to it count as equivalent; shaded.
    """
    rows = reports[0]["contrasts"]
    names = [f"{row['explains']}: {row['first']} - {row['second']}, {row['length']}" for row in rows]
    width = _INCHES_OF_PANEL * len(reports) + _INCHES_OF_LETTER * max(map(len, names))
    figure = Figure(figsize=(width, _INCHES_OF_ROW * len(rows) + 1.2), layout="constrained")
    for number, report in enumerate(reports, start=1):
        axes = figure.add_subplot(1, len(reports), number)
        axes.axvspan(-100 * margin, 100 * margin, color="#000000", alpha=0.07, linewidth=0)
        axes.axvline(0, color="#000000", linewidth=0.8)
        for y, row in enumerate(report["contrasts"]):
            colour = colour_of_verdict(row["verdict"])
            if row["difference"]["low"] is not None:
                axes.plot([100 * row["difference"][end] for end in ("low", "high")], [y, y], color=colour)
            axes.plot(100 * row["difference"]["estimate"], y, "o", color=colour)
            seeds = [100 * one for one in row["by_seed"]]
            axes.plot(seeds, [y] * len(seeds), ".", markersize=3, color=colour, alpha=0.5)
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(labelleft=number == 1)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(f"{report['task']} ({len(report['seeds'])} seeds)")
        axes.set_xlabel("difference in points\nsmall dots: seeds; line: 95% interval over them,\nnot corrected")
    add_legend_of_verdicts(figure, (row["verdict"] for report in reports for row in report["contrasts"]))
    return figure
