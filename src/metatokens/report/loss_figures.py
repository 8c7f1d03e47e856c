"""Figures of differences of losses, drawn from what `metatokens.replication.losses` found."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from metatokens.report.figures import COLOURS

_DODGE = 0.12  # of the distance between two buckets, between neighbouring contrasts


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
