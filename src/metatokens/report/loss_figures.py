"""Figures of losses on texts: of every arm of a sweep, and of contrasts by context length."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metatokens.report.palette import COLOURS, MARKERS
from metatokens.report.sweep_results import SweepResults, arm_name, panels

_DODGE = 0.12  # of the distance between two buckets, between neighbouring contrasts
_INCHES_OF_ROW = 0.24


def draw_losses(results: SweepResults, evaluation: str) -> Figure:
    """Draw the nats per word of every arm on the text of one evaluation: seeds as dots, the mean with its interval.

    Where the sweep has a reference, the difference from it is drawn, paired by seed and document.
    """
    by_panel = panels(results)
    scored = [
        (arm_name(results, cell) if len(by_panel) == 1 else f"{panel} / {arm_name(results, cell)}", row)
        for panel, cells in by_panel.items()
        for cell in cells
        for row in cell.perplexities
        if row.name == evaluation
    ]
    compared = [(name, row.difference, row.difference_by_seed) for name, row in scored if row.difference is not None]
    rows = compared or [(name, row.nats_per_word, row.by_seed) for name, row in scored]
    figure = Figure(figsize=(6.5, 1.2 + _INCHES_OF_ROW * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for y, (_, interval, seeds) in enumerate(rows):
        if interval.low is not None and interval.high is not None:
            axes.plot([interval.low, interval.high], [y, y], color=COLOURS[0])
        axes.plot(interval.estimate, y, "|", markersize=9, color=COLOURS[0])
        axes.plot(seeds, [y] * len(seeds), "o", markersize=3, color=COLOURS[1])
    if compared:
        axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    of = f" minus those of {results.sweep['reference']}" if compared else ""
    axes.set_xlabel(f"nats per word{of}\ndots: seeds; line: 95% interval over documents")
    return figure


def draw_by_context(reports: Sequence[dict[str, Any]], margin: float) -> Figure:
    """Draw each contrast by context length, a panel for each report: means with intervals over seeds, seeds as dots.

    Args:
        reports: of sweeps with the same contrasts.
        margin: differences up to it count as equivalent; shaded.
    """
    figure = Figure(figsize=(8.5, 3.6 * len(reports)), layout="constrained")
    for number, report in enumerate(reports, start=1):
        axes = figure.add_subplot(len(reports), 1, number)
        axes.axhspan(-margin, margin, color="#000000", alpha=0.07, linewidth=0)
        axes.axhline(0, color="#000000", linewidth=0.8)
        for place in range(len(report["contrasts"])):
            _draw_contrast(axes, report, place)
        ranges = [(bucket["lowest"], bucket["highest"]) for bucket in report["by_context"]]
        names = [f"{low}" if low == high else f"{low}-{high}" for low, high in ranges]
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.set_xlabel("text tokens before the scored one, in its window")
        axes.set_ylabel("difference in nats per word\n(95% intervals over seeds, not corrected)")
        axes.set_title(f"{report['task']}: {report['documents']} documents, {len(report['seeds'])} seeds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw_contrast(axes: Axes, report: dict[str, Any], place: int) -> None:
    rows = [bucket["contrasts"][place] for bucket in report["by_context"]]
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    dodge = (place - (len(report["contrasts"]) - 1) / 2) * _DODGE
    places = [bucket + dodge for bucket in range(len(rows))]
    label = f"{rows[0]['explains']}: {rows[0]['first']} - {rows[0]['second']}"
    estimates = [row["difference"]["estimate"] for row in rows]
    axes.plot(places, estimates, marker=marker, markersize=4, color=colour, label=label)
    for x, row in zip(places, rows, strict=True):
        low, high = row["difference"]["low"], row["difference"]["high"]
        if low is not None:
            axes.plot([x, x], [low, high], color=colour)
        axes.plot([x] * len(row["by_seed"]), row["by_seed"], ".", markersize=3, color=colour, alpha=0.5)
