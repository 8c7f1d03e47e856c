"""Figures of times to solve a task, drawn from what `metatokens.replication.solve_times` found."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from metatokens.evaluation.survival import Times, restricted_mean, survival_curve
from metatokens.report.palette import COLOURS, add_legend_of_verdicts, colour_of_verdict

_STYLES = ("-", (0, (5, 1.5)))  # a dashed curve on a solid one leaves both visible


def draw_curves(reports: Sequence[dict[str, Any]]) -> Figure:
    """Draw the share of trainings that have not solved their task yet, one panel for each task."""
    figure = Figure(figsize=(4.2 * len(reports) + 1.6, 3.2), layout="constrained")
    for number, report in enumerate(reports, start=1):
        axes = figure.add_subplot(1, len(reports), number)
        for place, arm in enumerate(report["arms"]):
            colour, style = COLOURS[place % len(COLOURS)], _STYLES[place % len(_STYLES)]
            sample = Times.of(arm["steps"], arm["is_solved"], report["horizon"])
            at, shares = survival_curve(sample)
            axes.step([0, *at, report["horizon"]], [1, *shares, shares[-1] if len(shares) else 1], where="post",
                      color=colour, linestyle=style, zorder=2 + place % len(_STYLES), label=arm["arm"])  # fmt: skip
            axes.axvline(restricted_mean(sample), color=colour, linewidth=0.6, linestyle=":")
        axes.set_title(f"{report['task'].replace('_', ' ')} ({len(report['seeds'])} seeds)")
        axes.set_xlabel("steps (dotted: restricted means)")
        all_solved = all(all(arm["is_solved"]) for arm in report["arms"])
        axes.set_xlim(0, 1.05 * max(max(arm["steps"]) for arm in report["arms"]) if all_solved else report["horizon"])
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("not solved yet" if number == 1 else "")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def draw_ratios(reports: Sequence[dict[str, Any]], margin: float) -> Figure:
    """Draw the ratio of steps of every contrast with its interval, one panel for each task; an open end is an arrow.

    Args:
        reports: of tasks that have the same contrasts.
        margin: ratios between its inverse and it count as equivalent; shaded.
    """
    contrasts = [contrast for report in reports for contrast in report["at_equal_steps"]]
    ends = ("estimate", "low", "high")
    known = [contrast["ratio"][end] for contrast in contrasts for end in ends if contrast["ratio"][end] is not None]
    first, last = (math.log2(pick([*known, 1 / margin, margin])) for pick in (min, max))
    octaves = range(math.floor(first), math.ceil(last) + 1)
    rows = len(reports[0]["at_equal_steps"])
    figure = Figure(figsize=(3.4 * len(reports) + 2.6, 0.3 * rows + 1.4), layout="constrained")
    for number, report in enumerate(reports, start=1):
        axes = figure.add_subplot(1, len(reports), number)
        axes.set_xscale("log")
        axes.set_xlim(2.0 ** octaves[0], 2.0 ** octaves[-1])
        axes.xaxis.set_major_locator(FixedLocator([2.0**octave for octave in octaves]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axes.axvspan(1 / margin, margin, color="#000000", alpha=0.07, linewidth=0)
        axes.axvline(1, color="#000000", linewidth=0.8)
        _draw_intervals(axes, report["at_equal_steps"])
        axes.tick_params(labelleft=number == 1)
        axes.set_title(f"{report['task'].replace('_', ' ')} ({len(report['seeds'])} seeds)")
        axes.set_xlabel("ratio of steps to solve the task")
    add_legend_of_verdicts(figure, (contrast["verdict"] for contrast in contrasts))
    return figure


def _draw_intervals(axes: Axes, contrasts: Sequence[dict[str, Any]]) -> None:
    left, right = axes.get_xlim()
    for place, contrast in enumerate(contrasts):
        estimate, low, high = (contrast["ratio"][key] for key in ("estimate", "low", "high"))
        colour = colour_of_verdict(contrast["verdict"])
        if low is None and high is None and estimate is None:
            words = "no bound" if any(contrast["solved"]) else "neither arm solved it"
            axes.text(1, place, words, ha="center", va="center", fontsize=8, backgroundcolor="#ffffff")
            continue
        axes.plot([left if low is None else low, right if high is None else high], [place, place], color=colour)
        for end, edge, marker in ((low, left, "<"), (high, right, ">")):
            if end is None:
                axes.plot(edge, place, marker=marker, color=colour, clip_on=False)
        if estimate is not None:
            axes.plot(estimate, place, marker="o", color=colour)
    names = [f"{contrast['explains']}:  {contrast['first']} / {contrast['second']}" for contrast in contrasts]
    axes.set_yticks(range(len(contrasts)), names)
    axes.set_ylim(len(contrasts) - 0.5, -0.5)
