"""The figures of an analysis: what each measure declares as its plot, and two that are of several measures at once.

`Measure.plot` says how a measure is drawn, its unit and its docstring label it; a new measure has its figure without
an edit here. Measures of one part that are drawn alike, and have one unit, share a figure. A coordinate that a plot
does not name gets panels of its own, so that nothing is averaged over or left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

import metatokens.analysis.run  # noqa: F401  # registers the measures
from metatokens.analysis.compression.rate_distortion import lower_hull
from metatokens.analysis.measures import MEASURES, Dots, HeadMaps, Lines, Measure
from metatokens.analysis.results import Record, Results
from metatokens.config.analysis import Part
from metatokens.report.charts import (
    FIGURE_KINDS,
    NUM_ORDERED,
    Cell,
    Chart,
    DotPanel,
    LinePanel,
    MapPanel,
    Mark,
    Panel,
    Rule,
    Series,
    Style,
    dodged,
    to_files,
)
from metatokens.report.glossary import name_axis, name_place, words
from metatokens.report.hand_over import STYLES, draw_hand_over
from metatokens.report.numbers import format_number, format_p, format_span

Arrays = Mapping[str, npt.NDArray[Any]]
SIGNIFICANT = 0.05
CAPTION_KIND = "txt"
_MOST_PANELS = 4
"""Of a coordinate that counts something, such as layers; evenly spaced ones are drawn, and the table has all."""
_MOST_EDGES = 1_500
_WIDE, _TALL = 3.0, 2.4
_LOGARITHMIC = {"distance"}
_MAPS = "maps"


@dataclass(frozen=True)
class AnalysisFigure:
    """One figure, and whose numbers stand below it."""

    id: str
    part: Part
    title: str
    measures: tuple[str, ...]
    draw: Callable[[Results, Arrays], Chart | None]
    """None where the results have nothing to draw."""
    text: str = ""
    """What a reader has to know beside the measures' definitions."""
    level: str | None = None
    """The measure of chance, drawn as a dashed line where the results have it."""

    def text_for(self, results: Results) -> str:
        """Return the text, which speaks of the line of chance only where it is drawn."""
        is_drawn = self.level is not None and any(one.value is not None for one in results.find(self.level))
        chance = f"Dashed: chance. {MEASURES[self.level].definition}" if self.level and is_drawn else ""
        return " ".join(part for part in (self.text, chance) if part)


def figure_files(results: Results, arrays: Arrays) -> dict[str, bytes]:
    """Return every figure that the results have numbers for, by file name: PNG, PDF and a caption."""
    files: dict[str, bytes] = {}
    for figure in FIGURES:
        chart = figure.draw(results, arrays)
        if chart is not None:
            files |= {f"{figure.id}.{kind}": data for kind, data in to_files(chart).items()}
            files[f"{figure.id}.{CAPTION_KIND}"] = _caption(figure, results).encode()
    return files


def _caption(figure: AnalysisFigure, results: Results) -> str:
    """Return what stands below a figure in a paper: its title, what is measured, n and the model."""
    definitions = [f"{words(name)}: {MEASURES[name].definition}" for name in figure.measures if results.find(name)]
    measured = figure.measures or ("interchange_effect",) * (figure is HAND_OVER)
    count = count_documents([record for name in measured for record in results.find(name)])
    model = describe_model(results)
    return (
        " ".join(
            part
            for part in (f"{figure.title}.", figure.text_for(results), *definitions, count, f"Model: {model}.")
            if part
        )
        + "\n"
    )


def count_documents(records: Iterable[Record]) -> str:
    """Say how many documents numbers are of; nothing where there are none."""
    counts = sorted({record.num_documents for record in records if record.value is not None})
    if not counts:
        return ""
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"n = {span} documents; 95% intervals."


def describe_model(results: Results) -> str:
    """Return the model and what it was analysed on, in a phrase."""
    checkpoint, data = results.checkpoint, results.data
    parts = [str(checkpoint.get("name", "a model"))]
    if isinstance(checkpoint.get("parameters"), int):
        parts.append(f"{checkpoint['parameters'] / 1e6:.1f}M parameters")
    if "layers" in checkpoint:
        parts.append(f"{checkpoint['layers']} layers of {checkpoint.get('heads', '?')} heads")
    if "subject" in data:
        parts.append(str(data["subject"]))
    return ", ".join(parts)


def file_names() -> set[str]:
    """Return the names of all files that `figure_files` can return."""
    return {f"{figure.id}.{kind}" for figure in FIGURES for kind in (*FIGURE_KINDS, CAPTION_KIND)}


# From what a measure declares ----------------------------------------------------------------------------------


def _declared(measures: Iterable[Measure]) -> list[AnalysisFigure]:
    """Return the figures that measures declare, those that are drawn alike together."""
    groups: dict[Hashable, list[Measure]] = {}
    for measure in measures:
        match measure.plot:
            case HeadMaps():
                groups.setdefault((measure.part, _MAPS), []).append(measure)
            case Lines(by=None, panels=None) | Dots(by=None):
                groups.setdefault((measure.part, measure.plot, measure.unit), []).append(measure)
            case Lines() | Dots():
                groups[measure.name] = [measure]
    return [_figure_of(group) for group in groups.values()]


def _figure_of(group: Sequence[Measure]) -> AnalysisFigure:
    first = group[0]
    names = tuple(measure.name for measure in group)
    if isinstance(first.plot, HeadMaps):
        title = "By layer and head"
        text = (
            f"A dot marks a head that survives the correction for all heads (false discovery rate {SIGNIFICANT:.0%})."
        )
        return AnalysisFigure(f"{first.part}-{_MAPS}", first.part, title, names, _Maps(names), text)
    title = words(" and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}")
    draw = _Plotted(names, first.plot) if isinstance(first.plot, Lines | Dots) else _Maps(names)
    level = first.plot.level if isinstance(first.plot, Lines | Dots) else None
    return AnalysisFigure(
        first.name.replace("_", "-"), first.part, title[0].upper() + title[1:], names, draw, level=level
    )


@dataclass(frozen=True)
class _Maps:
    """Heat maps of measures, side by side."""

    measures: tuple[str, ...]

    def __call__(self, results: Results, arrays: Arrays) -> Chart | None:
        del arrays
        panels = [panel for name in self.measures if (panel := self._panel(results, name)) is not None]
        return Chart(panels, columns=len(panels)) if panels else None

    def _panel(self, results: Results, name: str) -> MapPanel | None:
        records = [
            record for record in results.find(name) if record.value is not None and _has(record, "layer", "head")
        ]
        if not records:
            return None
        cells = [
            Cell(
                layer=int(record.at["layer"]),
                head=int(record.at["head"]),
                value=_value(record),
                is_significant=record.adjusted_p is not None and record.adjusted_p <= SIGNIFICANT,
                tip=_tip(record),
            )
            for record in records
        ]
        return MapPanel(_with_unit(words(name), records[0].unit), name, cells)


@dataclass(frozen=True)
class _Plotted:
    """Lines or dots of one measure, or of several without further coordinates."""

    measures: tuple[str, ...]
    plot: Lines | Dots

    def __call__(self, results: Results, arrays: Arrays) -> Chart | None:
        del arrays
        plot = self.plot
        named = [key for key in (plot.x, plot.by, getattr(plot, "panels", None)) if key]
        records = [
            record
            for name in self.measures
            for record in results.find(name)
            if record.value is not None and _has(record, *named)
        ]
        if not records:
            return None
        columns = _some(_values(records, named[2])) if len(named) > 2 else [None]
        others = [
            key
            for key in dict.fromkeys(key for record in records for key in record.at)
            if key not in named and len(_values(records, key)) > 1
        ]
        rows = list(product(*(_some(_values(records, key)) for key in others)))
        styles = self._styles(records)
        panels: list[Panel] = []
        levels = [record for record in results.find(plot.level or "") if record.value is not None]
        limits = _limits([*records, *levels])
        for row, column in product(rows, columns):
            at = dict(zip(others, row, strict=True)) | ({named[2]: column} if column is not None else {})
            chosen = [record for record in records if at.items() <= record.at.items()]
            if chosen:
                own = [level for level in levels if _agree(level.at, at)]
                panels.append(self._panel(chosen, at, styles, limits, own))
        return Chart(panels, len(columns), styles if len(styles) > 1 else {})

    def _styles(self, records: Sequence[Record]) -> dict[str, Style]:
        """Return the colours of the series; those that count something are shades."""
        if self.plot.by is None:
            return {words(name): Style(number) for number, name in enumerate(_measures(records))}
        values = _values(records, self.plot.by)
        if STYLES.keys() >= set(values):
            return {place: style for place, style in STYLES.items() if place in values}
        if isinstance(values[0], str) or len(values) < 3:
            return {_name(self.plot.by, value): Style(number) for number, value in enumerate(values)}
        steps = np.linspace(0, NUM_ORDERED - 1, len(values)).round().astype(int).tolist()
        return {_name(self.plot.by, value): Style(step, True) for value, step in zip(values, steps, strict=True)}

    def _panel(
        self,
        records: Sequence[Record],
        at: Mapping[str, Any],
        styles: Mapping[str, Style],
        limits: tuple[float, float],
        levels: Sequence[Record],
    ) -> Panel:
        plot = self.plot
        title = ", ".join(_name(key, value) for key, value in reversed(list(at.items())))
        places = _values(records, plot.x)
        is_number = not isinstance(places[0], str)
        series = []
        for name, style in styles.items():
            chosen = [record for record in records if self._series_of(record) == name]
            x = [float(r.at[plot.x]) if is_number else float(places.index(r.at[plot.x])) for r in chosen]
            marks = [
                Mark(place, _value(record), _tip(record), record.low, record.high)
                for place, record in sorted(zip(x, chosen, strict=True), key=lambda pair: pair[0])
            ]
            if marks:
                series.append(Series(name, style, marks))
        measured = words(records[0].measure) if len(self.measures) == 1 else ""
        label = _with_unit(measured, records[0].unit)
        if not is_number:
            level = next((_value(one) for one in levels if not one.at), None)
            return DotPanel(title, series, [name_place(plot.x, place) for place in places], label, level=level)
        is_line = isinstance(plot, Lines) and plot.x != "layer"  # nothing lies between two layers
        return LinePanel(
            *(title, series if is_line else dodged(series), name_axis(plot.x), label),
            joined=is_line,
            is_count=all(isinstance(place, int) for place in places) and plot.x not in _LOGARITHMIC,
            scale="log" if plot.x in _LOGARITHMIC else "linear",
            limits=limits,
            rules=_rules_of(levels, plot.x, places),
        )

    def _series_of(self, record: Record) -> str:
        return words(record.measure) if self.plot.by is None else _name(self.plot.by, record.at[self.plot.by])


def _agree(at: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether coordinates are equal where both have them."""
    return all(other[key] == value for key, value in at.items() if key in other)


def _rules_of(levels: Sequence[Record], x: str, places: Sequence[float]) -> list[Rule]:
    """Return the lines of chance: over the axis where it is known at each place, else one for all of the axis."""
    along = {float(one.at[x]): _value(one) for one in levels if x in one.at}
    if len(along) > 1:
        known = sorted(place for place in along if place in places)
        return [Rule(known, [along[place] for place in known], "--")]
    values = dict.fromkeys(along.values() or [_value(one) for one in levels])
    return [Rule(None, 2 * [value], "--") for value in values]


def _limits(records: Sequence[Record]) -> tuple[float, float]:
    """Return the range of values and intervals, with some room, and with 0 unless that is far away."""
    ends = [end for record in records for end in (record.value, record.low, record.high) if end is not None]
    low, high = min(ends), max(ends)
    if max(low, -high) < (high - low):
        low, high = min(0.0, low), max(0.0, high)
    room = 0.05 * (high - low) or 0.05
    return low - room * (low != 0), high + room * (high != 0 or low == 0)


def _has(record: Record, *keys: str) -> bool:
    return all(key in record.at for key in keys)


def _value(record: Record) -> float:
    assert record.value is not None
    return record.value


def _measures(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.measure for record in records))


def _values(records: Sequence[Record], key: str) -> list[Any]:
    """Return the values of a coordinate: numbers rising, words in the order of the records."""
    found = list(dict.fromkeys(record.at[key] for record in records if key in record.at))
    return found if any(isinstance(value, str) for value in found) else sorted(found)


def _some(values: Sequence[Any]) -> list[Any]:
    """Return no more numbers than there are panels, evenly spaced; of words all."""
    if len(values) <= _MOST_PANELS or any(isinstance(value, str) for value in values):
        return list(values)
    return [values[round(i * (len(values) - 1) / (_MOST_PANELS - 1))] for i in range(_MOST_PANELS)]


def _name(key: str, value: Any) -> str:
    return name_place(key, value) if isinstance(value, str) else f"{name_axis(key)} {value:g}"


def _with_unit(name: str, unit: str) -> str:
    return ", ".join(part for part in (name, "" if unit == "1" else unit) if part)


def _tip(record: Record) -> str:
    """Return all that is known of a record, a line each."""
    number = _with_unit(format_span(record), "").rstrip()
    lines = [
        words(record.measure),
        *(f"{name_axis(key)}: {name_place(key, at)}" for key, at in record.at.items()),
        number if record.unit == "1" else f"{number} {record.unit}",
        *([] if record.adjusted_p is None else [f"adjusted p {format_p(record.adjusted_p)}"]),
        f"n = {record.num_documents}",
    ]
    return "\n".join(lines)


# Of several measures at once -----------------------------------------------------------------------------------


def _draw_theorem(results: Results, arrays: Arrays) -> Chart | None:
    del results
    points = np.asarray(arrays.get("theory_points", np.zeros((0, 4))), dtype=np.float64)
    points = points[np.isfinite(points[:, 1:3]).all(axis=1)]
    if not len(points):
        return None
    points = points[np.linspace(0, len(points) - 1, min(_MOST_EDGES, len(points))).round().astype(int)]
    _, margin, boost, critical = points.T
    kinds = {
        "premise holds: falls": ((boost > 0) & (margin >= 0), Style(2)),
        "beyond the critical boost: falls": ((boost > critical) & (boost > 0) & (margin < 0), Style(0)),
        "below it: rises": ((boost > 0) & (boost <= critical) & (margin < 0), Style(1)),
        "not boosted": (boost <= 0, Style(5)),
    }
    series = [
        Series(
            name,
            style,
            [
                Mark(x, y, f"{name}\nlayer {layer:.0f}\nmargin {format_number(x)}\nboost {format_number(y)}")
                for layer, x, y, _ in points[chosen].tolist()
            ],
        )
        for name, (chosen, style) in kinds.items()
        if chosen.any()
    ]
    lowest = float(margin.min(initial=0))
    rules = [Rule((lowest, 0), (-slope * lowest, 0), dashes) for slope, dashes in ((1, "--"), (2, ":"))]
    panel = LinePanel(
        *("", series, "margin x without the embedding, nats", "boost, nats"),
        joined=False,
        rules=rules if lowest < 0 else (),
        size=2.2,
        width=_WIDE,
        height=_TALL,
    )
    return Chart([panel], 1, {one.name: one.style for one in series})


def _draw_rate_distortion(results: Results, arrays: Arrays) -> Chart | None:
    del arrays
    rates = {
        (r.at["state"], r.at["beta"]): r
        for r in results.find("rate")
        if r.value is not None and _has(r, "state", "beta")
    }
    distortions = [
        record
        for record in results.find("distortion")
        if record.value is not None and (record.at.get("state"), record.at.get("beta")) in rates
    ]
    if not distortions:
        return None
    left = {r.at["state"]: r for r in results.find("remaining_entropy") if r.value is not None and "state" in r.at}
    rules = [Rule(None, 2 * [_value(r)], "--") for r in results.find("answer_entropy") if r.value is not None]
    series = []
    for number, state in enumerate(_values(distortions, "state")):
        marks = sorted(
            (
                Mark(
                    _value(rate),
                    _value(record),
                    f"{_tip(record)}\nat a rate of {format_span(rate)} nats",
                    record.low,
                    record.high,
                )
                for record in distortions
                if record.at["state"] == state
                for rate in [rates[state, record.at["beta"]]]
            ),
            key=lambda mark: mark.x,
        )
        hull = [(float(x), float(y)) for x, y in lower_hull([(mark.x, mark.y) for mark in marks])]
        series.append(Series(str(state), Style(number), marks, hull))
        if state in left:
            rules.append(Rule(None, 2 * [_value(left[state])], ":", Style(number)))
    panel = LinePanel(
        *("", series, "rate, nats (root scale)", "distortion, nats"),
        scale="root",
        rules=rules,
        width=_WIDE,
        height=_TALL,
    )
    return Chart([panel], 1, {one.name: one.style for one in series})


_SPECIAL = (
    AnalysisFigure(
        "theorem",
        "attention",
        "Where the theorem's premise holds",
        (),
        _draw_theorem,
        "A boost of a key lowers the entropy of its row from the start only where its margin x is at least 0; below, "
        "the entropy rises first, and falls below its start only beyond a critical boost between |x| (dashed) and "
        f"2|x| (dotted). A point is an edge from a query to a meta key, of a sample of at most {_MOST_EDGES:,}.",
    ),
    AnalysisFigure(
        "rate-distortion",
        "rate_distortion",
        "Rate and distortion of the answer, by state",
        ("rate", "distortion", "answer_entropy"),
        _draw_rate_distortion,
        "A point is one beta, the mean over seeds of the head; a line is the lower hull of a state's points. Dashed: "
        "the answer's entropy, which no rate at all leaves; dotted, in a state's colour: what a probe of it leaves.",
    ),
)
HAND_OVER = AnalysisFigure(
    "hand-over",
    "causal",
    "Where the answer is, layer by layer",
    (),
    draw_hand_over,
    "Of two prompts that differ in one item, some states of one are put into the run on the other. The share of the "
    "way to the other prompt's answer that this leads is how much of the answer these states carry: 0 none, 1 all. "
    "Layers count from 0.",
)
FIGURES = (*_declared(MEASURES.values()), *_SPECIAL, HAND_OVER)
"""Every figure, those of a part in the order of the registry."""
