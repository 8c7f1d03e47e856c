"""Figures of a sweep in the manner of the paper's: one panel for each task, one line for each arm, intervals as bands.

Seeds that are too few for an interval are dots. Drawn from results.json alone and equal to the byte for equal results
and equal versions of matplotlib. Each arm has its own colour and marker.
"""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from metatokens.evaluation.statistics import MINIMUM_SEEDS, Interval
from metatokens.report.loss_figures import draw_losses
from metatokens.report.palette import COLOURS, MARKERS
from metatokens.report.sweep_results import AccuracyRow, CellResult, SweepResults, arm_name, panels
from metatokens.report.tables import GUESSING, evaluation_names, find_evaluation
from metatokens.storage import no_follow

_PANEL_INCHES = (3.6, 2.7)
_DOTS_PER_INCH = 150
_MOST_COLUMNS = 4
_LEGEND_INCHES = 1.7  # room for the name of an arm
_CHARACTERS_PER_INCH = 16  # of the caption
_DODGE = 0.04  # octaves between neighbouring arms


class _Style(NamedTuple):
    colour: str
    marker: str


class _Point(NamedTuple):
    x: float
    accuracy: Interval | None
    """None leaves the point out; without `low` and `high` there is no band."""
    by_seed: Sequence[float] = ()
    """Dots instead of a band."""
    chance: float | None = None
    """Accuracy of guessing there, if it is known."""


def draw_sweep(results: SweepResults, folder: Path) -> list[Path]:
    """Draw every figure that the results have numbers for and return the files, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure | None] = {}
    for name in evaluation_names(results):
        figures[f"accuracy-by-length-{name}"] = draw_by_length(results, name)
        figures[f"accuracy-by-training-length-{name}"] = draw_by_training_length(results, name)
    figures["accuracy-by-training-flops"] = draw_by_flops(results)
    for name in dict.fromkeys(row.name for cell in results.cells for row in cell.perplexities):
        figures[f"losses-{name}"] = draw_losses(results, name)
    paths = []
    for stem, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{stem}.png")
            with open(paths[-1], "wb", opener=no_follow) as file:
                file.write(to_png(figure))
    return paths


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    # without the version of matplotlib, and PNG has no date
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def draw_by_length(results: SweepResults, evaluation: str) -> Figure | None:
    """Draw accuracy against the length of the test prompts; a dotted line where training ended."""

    def points(cell: CellResult) -> list[_Point]:
        rows = _rows(cell, evaluation)
        return [_point(row.prompt_tokens[1], row) for row in rows]

    return _draw(
        results,
        points,
        x_label="Test prompt, up to … text tokens",
        caption=f"{_caption(results, evaluation)} Dotted: longest prompt in training.",
        is_length=True,
        at=lambda cell: cell.trained_to,
    )


def draw_by_training_length(results: SweepResults, evaluation: str) -> Figure | None:
    """Draw accuracy at the trained length against that length; None unless an axis varies it."""
    varying = [
        axis
        for axis in results.sweep["axes"]
        if axis != results.arm_axis and _varies(results, axis, lambda cell: cell.trained_to)
    ]
    if not varying:
        return None
    merged: dict[tuple[str, str], list[CellResult]] = {}
    for cell in results.cells:
        left = [label for axis, label in cell.labels.items() if axis not in (results.arm_axis, *varying)]
        merged.setdefault((", ".join(left) or cell.task, arm_name(results, cell)), []).append(cell)
    lines = {
        key: [
            _point(cell.trained_to, row)
            for cell in sorted(cells, key=lambda cell: cell.trained_to)
            if (row := _row_at(cell, evaluation, cell.trained_to))
        ]
        for key, cells in merged.items()
    }
    return _draw_lines(
        lines,
        x_label="Longest prompt in training, text tokens",
        caption=f"{_caption(results, evaluation)} Each model at the longest test prompts that it was trained to.",
        is_length=True,
    )


def draw_by_flops(results: SweepResults) -> Figure | None:
    """Draw accuracy during training against the operations spent; None where no training was watched."""
    lines: dict[tuple[str, str], list[_Point]] = {}
    for panel, cells in panels(results).items():
        for cell in cells:
            lines[panel, arm_name(results, cell)] = [
                _Point(
                    point.training_flops,
                    Interval(point.sequence_accuracy, point.lowest, point.highest),
                    chance=point.chance,
                )
                for point in cell.curve
            ]
    counts = sorted({len(cell.seeds) for cell in results.cells})
    caption = "During training, at the difficulty of the last stage"
    if counts and counts[-1] > 1:
        span = f"{counts[-1]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        caption += f"; mean of {span} seeds, band: lowest to highest seed"
    return _draw_lines(
        lines,
        x_label="Training FLOPs",
        caption=f"{caption}.",
        is_length=False,
    )


# What is drawn -----------------------------------------------------------------------------------------------


def _rows(cell: CellResult, evaluation: str) -> Sequence[AccuracyRow]:
    found = find_evaluation(cell, evaluation)
    return () if found is None else sorted(found.rows, key=lambda row: row.prompt_tokens)


def _row_at(cell: CellResult, evaluation: str, tokens: int) -> AccuracyRow | None:
    """Return the row of the longest prompts up to a length."""
    rows = [row for row in _rows(cell, evaluation) if row.prompt_tokens[1] <= tokens]
    return rows[-1] if rows else None


def _point(x: float, row: AccuracyRow) -> _Point:
    """Return the point of a row: seeds that are too few for an interval show one by one, as far as they are known."""
    accuracy = row.sequence_accuracy
    if accuracy is None or not 1 < len(row.seeds) < MINIMUM_SEEDS:
        return _Point(x, accuracy, chance=row.chance)
    return _Point(x, Interval(accuracy.estimate, None, None), row.sequence_by_seed, row.chance)


def _varies(results: SweepResults, axis: str, value: Callable[[CellResult], Any]) -> bool:
    """Tell whether a number changes along an axis, the other labels being equal."""
    groups: dict[tuple[str, ...], set[Any]] = {}
    for cell in results.cells:
        others = tuple(label for name, label in cell.labels.items() if name != axis)
        groups.setdefault(others, set()).add(value(cell))
    return any(len(values) > 1 for values in groups.values())


def _caption(results: SweepResults, evaluation: str) -> str:
    """Say what n is, what the bands are, and what the arms share."""
    rows = [row for cell in results.cells for row in _rows(cell, evaluation)]
    seeds = sorted({len(row.seeds) for row in rows})
    instances = sorted({row.instances for row in rows})
    n = f"n = {_range(seeds)} seed{'s' if seeds != [1] else ''} x {_range(instances)} prompts a point"
    changed = next((e.interventions for cell in results.cells if (e := find_evaluation(cell, evaluation))), ())
    if any(1 < number < MINIMUM_SEEDS for number in seeds):
        known = any(row.sequence_by_seed for row in rows)
        text = f"{n}; mean of the seeds, {'dot: a seed' if known else 'which are not stored one by one'}."
    else:
        text = f"{n}; band: 95% interval over {'prompts' if seeds == [1] else 'seeds and prompts'}."
    if changed:
        text += f" Changed at the meta-tokens: {', '.join(changed)}."
    if results.sweep["reference"] is not None:
        text += f" Every arm has {results.cells[0].matching}."
    return text


def _range(values: Sequence[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"


# How it is drawn ---------------------------------------------------------------------------------------------


def _draw(
    results: SweepResults,
    points: Callable[[CellResult], list[_Point]],
    *,
    x_label: str,
    caption: str,
    is_length: bool,
    at: Callable[[CellResult], float],
) -> Figure | None:
    lines: dict[tuple[str, str], list[_Point]] = {}
    marks: dict[str, set[float]] = {}
    for panel, cells in panels(results).items():
        for cell in cells:
            lines[panel, arm_name(results, cell)] = points(cell)
            marks.setdefault(panel, set()).add(at(cell))
    return _draw_lines(lines, x_label=x_label, caption=caption, is_length=is_length, marks=marks)


def _draw_lines(
    lines: dict[tuple[str, str], list[_Point]],
    *,
    x_label: str,
    caption: str,
    is_length: bool,
    marks: dict[str, set[float]] | None = None,
) -> Figure | None:
    """Draw lines by (panel, arm); None where there is no point at all."""
    drawn = {panel for (panel, _), points in lines.items() if points}
    names = [panel for panel in dict.fromkeys(panel for panel, _ in lines) if panel in drawn]
    arms = list(dict.fromkeys(arm for _, arm in lines))
    if not names:
        return None
    styles = {arm: _Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, arm in enumerate(arms)}
    figure, panels_ = _grid(len(names))
    scale = 1.0 if is_length else _scale([point.x for points in lines.values() for point in points])
    for name, axes in zip(names, panels_, strict=True):
        own = {arm: lines[name, arm] for arm in arms if lines.get((name, arm))}
        for mark in sorted((marks or {}).get(name, ())):
            axes.axvline(mark, color="0.5", linewidth=1, linestyle=":", zorder=1)
        for index, (arm, points) in enumerate(own.items()):
            # side by side where they share their lengths
            shift = 2 ** (_DODGE * (index - (len(own) - 1) / 2)) if is_length else 1 / scale
            _line(axes, [point._replace(x=point.x * shift) for point in points], styles[arm], arm)
        _draw_chance(axes, [point for points in own.values() for point in points], 1 / scale)
        _dress(axes, name, [point.x for points in own.values() for point in points], is_length=is_length)
    handles = {text: h for axes in panels_ for h, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in panels_:
        place = axes.get_subplotspec()
        if place is None or place.is_first_col():
            axes.set_ylabel("Whole answers right, %", fontsize=9)
        if place is None or place.is_last_row():
            axes.set_xlabel(x_label if scale == 1 else f"{x_label}, $10^{{{math.log10(scale):.0f}}}$", fontsize=9)
    if any(point.accuracy is None for points in lines.values() for point in points):
        caption += " No point: longer than the model can represent."
    _legend_and_caption(figure, handles, caption)
    return figure


def _grid(number: int) -> tuple[Figure, list[Axes]]:
    columns = min(number, _MOST_COLUMNS if number != 4 else 2)
    rows = math.ceil(number / columns)
    width = max(columns, 1.6) * _PANEL_INCHES[0]
    figure = Figure(figsize=(width, rows * _PANEL_INCHES[1] + 1.3))
    FigureCanvasAgg(figure)
    panels_: list[Axes] = []
    for index in range(number):
        shared = panels_[0] if panels_ else None
        panels_.append(figure.add_subplot(rows, columns, index + 1, sharey=shared))
    return figure, panels_


def _line(axes: Axes, points: Sequence[_Point], style: _Style, label: str) -> None:
    known = [(point.x, point.accuracy) for point in points if point.accuracy is not None]
    x = [x for x, _ in known]
    axes.plot(
        *(x, [100 * accuracy.estimate for _, accuracy in known]),
        color=style.colour,
        marker=style.marker,
        markersize=5,
        linewidth=1.6,
        label=label,
        zorder=3,
        clip_on=False,
    )
    dots = [(point.x, 100 * accuracy) for point in points for accuracy in point.by_seed]
    if dots:
        axes.plot(*zip(*dots, strict=True), ".", color=style.colour, markersize=4, alpha=0.6, zorder=4, clip_on=False)
    if all(accuracy.low is None for _, accuracy in known):
        return
    low, high = zip(*(_ends(accuracy) for _, accuracy in known), strict=True)
    if len(known) == 1:
        axes.vlines(x, low, high, color=style.colour, linewidth=1.2, zorder=2)
    else:
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0, zorder=2)


def _draw_chance(axes: Axes, points: Sequence[_Point], factor: float) -> None:
    """Draw a line of what guesses get right, from one place to the next, where it is known."""
    known = sorted({(factor * point.x, 100 * point.chance) for point in points if point.chance is not None})
    if not known:
        return
    x, chance = zip(*known, strict=True)
    axes.plot(x, chance, color="0.35", linewidth=1, linestyle="--", marker="_", label=GUESSING, zorder=2)


def _scale(values: Sequence[float]) -> float:
    """Return the power of ten in whose units the numbers are short."""
    largest = max(values, default=1.0)
    return 10.0 ** math.floor(math.log10(largest)) if largest > 0 else 1.0


def _ends(interval: Interval) -> tuple[float, float]:
    low = interval.estimate if interval.low is None else interval.low
    high = interval.estimate if interval.high is None else interval.high
    return 100 * low, 100 * high


def _dress(axes: Axes, title: str, x: Sequence[float], *, is_length: bool) -> None:
    axes.set_title(title.replace("_", " "), fontsize=10)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", color="0.9", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    if is_length:
        lengths = sorted(set(x))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        margin = 2**0.15
        axes.set_xlim(lengths[0] / margin, lengths[-1] * margin)
    else:
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0)


def _legend_and_caption(figure: Figure, handles: dict[str, Any], caption: str) -> None:
    width = figure.get_figwidth()
    rows = math.ceil(len(handles) * _LEGEND_INCHES / width)
    figure.legend(
        *(list(handles.values()), list(handles)),
        loc="outside upper center",
        ncols=math.ceil(len(handles) / rows),
        frameon=False,
        fontsize=9,
    )
    lines = textwrap.wrap(caption, int(width * _CHARACTERS_PER_INCH))
    # room below for the caption
    height = (0.08 + 0.16 * len(lines)) / figure.get_figheight()
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, height, 1, 1 - height)))
    figure.text(0.01, 0.005, "\n".join(lines), fontsize=8, color="0.3", va="bottom", ha="left")
