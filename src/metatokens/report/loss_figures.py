"""Figures of losses on texts: of every arm of a sweep, and of contrasts by context length."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from metatokens.report.palette import COLOURS
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


def draw_by_context(report: dict[str, Any], margin: float) -> Figure:
    """Draw each contrast of a report by context length: means with intervals, and seeds as dots.

    Args:
        report: of one sweep.
        margin: differences up to it count as equivalent; shaded.
    """
    contrasts = report["contrasts"]
    buckets = contrasts[0]["by_context"]
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axhspan(-margin, margin, color="#000000", alpha=0.07, linewidth=0)
    axes.axhline(0, color="#000000", linewidth=0.8)
    for number, (colour, contrast) in enumerate(zip(COLOURS, contrasts, strict=False)):
        places = [place + (number - (len(contrasts) - 1) / 2) * _DODGE for place in range(len(buckets))]
        differences = [bucket["difference"] for bucket in contrast["by_context"]]
        estimates = [one["estimate"] for one in differences]
        label = f"{contrast['explains']}: {contrast['first']} - {contrast['second']}"
        axes.plot(places, estimates, marker="o", markersize=4, color=colour, label=label)
        for place, bucket, one in zip(places, contrast["by_context"], differences, strict=True):
            if one["low"] is not None:
                axes.plot([place, place], [one["low"], one["high"]], color=colour)
            axes.plot([place] * len(bucket["by_seed"]), bucket["by_seed"], ".", markersize=3, color=colour, alpha=0.5)
    ranges = [(bucket["lowest"], bucket["highest"]) for bucket in buckets]
    axes.set_xticks(
        range(len(buckets)), [f"{low}" if low == high else f"{low}-{high}" for low, high in ranges], rotation=30
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("text tokens before the scored one, in its window")
    axes.set_ylabel("difference in nats per word")
    axes.set_title(f"{report['documents']} documents")
    figure.legend(loc="outside right upper", frameon=False)
    return figure
