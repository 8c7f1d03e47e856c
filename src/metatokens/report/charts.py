"""Charts, drawn once: by matplotlib, as SVG for the page and as PNG and PDF for papers.

A chart is panels under one legend. On the page every panel is an SVG of its own, so that they wrap in a narrow window;
its text is text, its colours are the page's variables, light or dark, and each mark carries what it stands for as
`data-tip`, which the page's script shows. In a paper the panels stand side by side in one figure.

Equal charts give equal bytes for equal versions of matplotlib.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from metatokens.report.palette import COLOURS, MARKERS

FIGURE_KINDS = ("png", "pdf")
GLYPHS = "●■◆▲▼✚✖★"
"""The markers of the legend, in the order of `MARKERS`."""
NUM_ORDERED = 8
_ORDERED = tuple(mpl.colors.to_hex(mpl.colormaps["viridis"](share)) for share in np.linspace(0, 0.9, NUM_ORDERED))
_PAPER_COLUMNS = 3
_MOST_POWERS = 7  # of two, whose numbers fit below a panel
_NAME_WIDTH = 17  # characters of a line
_SPARE = 0.04  # inches around labels
_NO_TITLE = 0.08  # inches above axes
_DOTS_PER_INCH = 200
_INK = "#000000"
# a fill of pure black is left out of an SVG, and would stay black in the dark
_COLOURS = tuple("#020202" if colour == _INK else colour.lower() for colour in COLOURS)
_DOT, _RIM = "#010101", "#fefefe"  # on a heat map, whose cells are the same in light and in dark
_VARIABLES = (
    {colour: f"var(--c{number})" for number, colour in enumerate(_COLOURS)}
    | {colour: f"var(--o{number})" for number, colour in enumerate(_ORDERED)}
    | {"#8b949e": "var(--soft)", _INK: "currentColor"}
)
"""What the page says for a colour."""
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_PIXELS_PER_INCH = 105  # of a panel on the page
_PAGE_TEXT = 12.1 * 72 / _PIXELS_PER_INCH  # points: text of 12 pixels
_PAGE_RC = _RC | dict.fromkeys(
    ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), _PAGE_TEXT
)


@dataclass(frozen=True)
class Style:
    """How a series looks: one of the named colours, or a shade of an order."""

    number: int
    of_order: bool = False

    @property
    def colour(self) -> str:
        """The colour on paper."""
        return (_ORDERED if self.of_order else _COLOURS)[self.number % NUM_ORDERED]

    @property
    def css(self) -> str:
        """The colour on the page."""
        return f"var(--{'o' if self.of_order else 'c'}{self.number % NUM_ORDERED})"

    @property
    def marker(self) -> str:
        """The shape of its marks."""
        return MARKERS[self.number % len(MARKERS)]

    @property
    def glyph(self) -> str:
        """Its mark in a line of text."""
        return GLYPHS[self.number % len(GLYPHS)]


@dataclass(frozen=True)
class Mark:
    """One number and what the page says of it."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Marks of one colour."""

    name: str
    style: Style
    marks: Sequence[Mark]
    path: Sequence[tuple[float, float]] | None = None
    """A line in place of the one through the marks."""


@dataclass(frozen=True)
class Rule:
    """A line for comparison."""

    x: Sequence[float] | None
    """None for all of the axis."""
    y: Sequence[float]
    dashes: str
    style: Style | None = None


def dodged(series: Sequence[Series]) -> list[Series]:
    """Return series of dots side by side where they share their places."""
    shifts = [0.4 * ((number + 0.5) / len(series) - 0.5) for number in range(len(series))]
    return [
        Series(one.name, one.style, [Mark(m.x + shift, m.y, m.tip, m.low, m.high) for m in one.marks])
        for one, shift in zip(series, shifts, strict=True)
    ]


Tips = dict[str, list[dict[str, str]]]
"""Attributes of the marks of an artist, by its id."""


@dataclass(frozen=True)
class LinePanel:
    """Series over numbers: lines with bands, or dots with bars."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    joined: bool = True
    is_count: bool = False
    """Ticks of x are whole numbers."""
    scale: str = "linear"
    """Of x: linear, log (base 2, with 0) or root."""
    limits: tuple[float, float] | None = None
    """Of y, where panels share them."""
    rules: Sequence[Rule] = ()
    size: float = 3
    """Of a mark, in points."""
    width: float = 2.45  # four of them fit into the page
    height: float = 2.0
    margins: tuple[float, float, float, float] = (0.62, 0.44, 0.12, 0.24)

    def draw(self, axes: Axes, tips: Tips) -> None:
        """Draw, and leave behind what the marks stand for."""
        if self.scale == "log":
            axes.set_xscale("symlog", base=2, linthresh=1)  # 0 has a place, too
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_major_locator(FixedLocator(self._powers()))
        elif self.scale == "root":
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
        axes.axhline(0, color=_INK, linewidth=0.5)
        for series in self.series:
            self._draw_series(axes, series, tips)
        if self.is_count:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif self.scale == "root":
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylim(self.limits or axes.get_ylim())
        for rule in self.rules:
            colour = rule.style.colour if rule.style else _INK
            x = axes.get_xlim() if rule.x is None else rule.x
            axes.plot(x, rule.y, rule.dashes, color=colour, linewidth=0.8, scalex=False, scaley=False)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)

    def _powers(self) -> list[int]:
        """Return 0 and the powers of two up to the last mark, every other one where all do not fit."""
        last = max((mark.x for series in self.series for mark in series.marks), default=1)
        powers = [2**power for power in range(int(math.log2(max(last, 1))) + 1)]
        return [0, *powers[:: 1 if len(powers) <= _MOST_POWERS else 2]]

    def _draw_series(self, axes: Axes, series: Series, tips: Tips) -> None:
        colour, marks = series.style.colour, series.marks
        x = [mark.x for mark in marks]
        known = [(mark.x, mark.low, mark.high) for mark in marks if mark.low is not None and mark.high is not None]
        if known:
            places, low, high = zip(*known, strict=True)
            if self.joined:
                axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
            else:
                axes.vlines(places, low, high, color=colour, linewidth=1.2)
        if self.joined:
            path = series.path or [(mark.x, mark.y) for mark in marks]
            axes.plot(*zip(*path, strict=True), color=colour, linewidth=1.2)
        (line,) = axes.plot(
            x, [mark.y for mark in marks], series.style.marker, color=colour, markersize=self.size, markeredgewidth=0
        )
        _tell(line, [{"data-tip": mark.tip} for mark in marks], tips)

    def describe(self) -> str:
        """Return what is seen, in a sentence."""
        values = [mark.y for series in self.series for mark in series.marks]
        names = "; ".join(series.name for series in self.series if series.name)
        of = f" of {names}" if names else ""
        return f"{self.y_label or 'Values'}{of} by {self.x_label}, from {min(values):.3g} to {max(values):.3g}."


@dataclass(frozen=True)
class DotPanel:
    """A dot with its interval for every name, from the top down; x of a mark is the number of its name."""

    title: str
    series: Sequence[Series]
    names: Sequence[str]
    label: str
    width: float = 3.0
    level: float | None = None
    """Where a dashed line stands, such as chance."""

    @property
    def height(self) -> float:
        """Inches on the page."""
        lines = max(len(_wrapped(name).splitlines()) for name in self.names)
        return 0.7 + max(0.15 * lines + 0.05, 0.15 + 0.05 * len(self.series)) * len(self.names)

    @property
    def margins(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top, in inches."""
        longest = max(len(line) for name in self.names for line in _wrapped(name).splitlines())
        return 0.2 + 0.07 * longest, 0.44, 0.14, 0.24

    def draw(self, axes: Axes, tips: Tips) -> None:
        """Draw, and leave behind what the marks stand for."""
        axes.axvline(0, color=_INK, linewidth=0.5)
        if self.level is not None:
            axes.axvline(self.level, color=_INK, linewidth=0.8, linestyle="--")
        for number, series in enumerate(self.series):
            shift = 0.5 * ((number + 0.5) / len(self.series) - 0.5)  # side by side
            colour = series.style.colour
            for mark in series.marks:
                if mark.low is not None and mark.high is not None:
                    axes.plot([mark.low, mark.high], 2 * [mark.x + shift], color=colour, linewidth=1.2)
            (line,) = axes.plot(
                [mark.y for mark in series.marks],
                [mark.x + shift for mark in series.marks],
                series.style.marker,
                color=colour,
                markersize=3.5,
                markeredgewidth=0,
            )
            _tell(line, [{"data-tip": mark.tip} for mark in series.marks], tips)
        axes.set_yticks(range(len(self.names)), [_wrapped(name) for name in self.names])
        axes.set_ylim(len(self.names) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(self.label)

    def describe(self) -> str:
        """Return what is seen, in a sentence."""
        values = [mark.y for series in self.series for mark in series.marks]
        return f"{self.label} of {'; '.join(self.names)}, from {min(values):.3g} to {max(values):.3g}."


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, _NAME_WIDTH)) or name


@dataclass(frozen=True)
class Cell:
    """A head of a layer."""

    layer: int
    head: int
    value: float
    is_significant: bool
    tip: str


@dataclass(frozen=True)
class MapPanel:
    """A heat map of layers by heads; a dot marks what survives the correction for all of them."""

    title: str
    measure: str
    cells: Sequence[Cell]
    width: float = 2.45
    margins: tuple[float, float, float, float] = (0.4, 0.44, 0.42, 0.24)

    @property
    def height(self) -> float:
        """Inches on the page."""
        return 0.66 + 0.24 * (1 + max(cell.layer for cell in self.cells))

    def draw(self, axes: Axes, tips: Tips) -> None:
        """Draw, and leave behind what the marks stand for."""
        values = [cell.value for cell in self.cells]
        most, is_signed = max(map(abs, values)) or 1.0, min(values) < 0
        norm = mpl.colors.Normalize(-most if is_signed else 0, most)
        colours = mpl.colormaps["PuOr_r" if is_signed else "cividis"]  # orange is positive
        for cell in self.cells:
            corner = cell.head - 0.48, cell.layer - 0.48
            square = axes.add_patch(Rectangle(corner, 0.96, 0.96, color=colours(norm(cell.value)), linewidth=0))
            attributes = {"data-layer": str(cell.layer), "data-head": str(cell.head), "data-measure": self.measure}
            _tell(square, [{"data-tip": cell.tip, **attributes}], tips)
        dots = [(cell.head, cell.layer) for cell in self.cells if cell.is_significant]
        if dots:
            axes.plot(
                *zip(*dots, strict=True), "o", color=_DOT, markersize=3, markeredgecolor=_RIM, markeredgewidth=0.5
            )
        axes.set(xlim=(-0.5, 0.5 + max(cell.head for cell in self.cells)), xlabel="head")
        axes.set(ylim=(-0.5, 0.5 + max(cell.layer for cell in self.cells)), ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        bar = axes.figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=axes, fraction=0.08, pad=0.03, aspect=25)
        assert bar.solids is not None
        bar.solids.set_rasterized(True)  # one image in place of 256 paths
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(4)
        bar.update_ticks()

    def describe(self) -> str:
        """Return what is seen, in a sentence."""
        values = [cell.value for cell in self.cells]
        return f"{self.title} of each head of each layer, from {min(values):.3g} to {max(values):.3g}."


Panel: TypeAlias = LinePanel | DotPanel | MapPanel
"""What stands on one pair of axes. Width, height and margins (left, bottom, right, top) are inches on the page; panels
of one chart have axes of one size."""


@dataclass(frozen=True)
class Chart:
    """Panels under one legend."""

    panels: Sequence[Panel]
    columns: int
    legend: Mapping[str, Style] = field(default_factory=dict)


def _tell(artist: mpl.artist.Artist, attributes: list[dict[str, str]], tips: Tips) -> None:
    name = f"mark{len(tips)}"
    artist.set_gid(name)
    tips[name] = attributes


# Rendering -------------------------------------------------------------------------------------------------------


def to_svg(panel: Panel, label: str) -> str:
    """Return a panel as an SVG element for the page.

    Args:
        panel: the panel.
        label: what a screen reader calls it.
    """
    with mpl.rc_context(_PAGE_RC | {"svg.hashsalt": label}):  # ids of another panel are others
        figure = Figure(figsize=(panel.width, panel.height))
        FigureCanvasAgg(figure)
        left, bottom, right, top = panel.margins
        top = top if panel.title else _NO_TITLE
        axes = figure.add_axes(
            (
                *(left / panel.width, bottom / panel.height),
                *(1 - (left + right) / panel.width, 1 - (bottom + top) / panel.height),
            )
        )
        tips: Tips = {}
        axes.set_title(panel.title)
        panel.draw(axes, tips)
        _make_room(figure)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    root = ET.fromstring(buffer.getvalue())  # of matplotlib itself
    _dress(root, panel, label)
    _attach(root, tips)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")


def _make_room(figure: Figure) -> None:
    """Shrink what is drawn where labels would be cut off at the sides of the figure."""
    figure.draw_without_rendering()  # which places a common factor of the ticks
    box = Bbox.union([box for axes in figure.axes if (box := axes.get_tightbbox()) is not None])
    box = box.padded(_SPARE * figure.dpi)  # a browser's letters may be larger
    width, height = figure.bbox.size
    left, bottom = max(0.0, -box.x0 / width), max(0.0, -box.y0 / height)
    across, up = 1 - left - max(0.0, box.x1 / width - 1), 1 - bottom - max(0.0, box.y1 / height - 1)
    for axes in figure.axes:
        place = axes.get_position()
        axes.set_position((left + across * place.x0, bottom + up * place.y0, across * place.width, up * place.height))


def to_files(chart: Chart) -> dict[str, bytes]:
    """Return a chart as one figure for papers, by kind of file."""
    columns = min(chart.columns, _PAPER_COLUMNS)
    rows = math.ceil(len(chart.panels) / columns)
    with mpl.rc_context(_RC):
        width, height = (max(getattr(panel, side) for panel in chart.panels) for side in ("width", "height"))
        figure = Figure(figsize=(0.8 * width * columns, 0.85 * height * rows + 0.3), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, chart.panels, strict=False):
            axes.set_title(panel.title)
            panel.draw(axes, {})
        for axes in grid[len(chart.panels) :]:
            axes.set_axis_off()
        if chart.legend:
            handles = [
                mpl.lines.Line2D(
                    [], [], color=style.colour, marker=style.marker, markersize=3, linewidth=1.2, label=name
                )
                for name, style in chart.legend.items()
            ]
            fitting = max(1, int(figure.get_figwidth() / (0.4 + 0.06 * max(map(len, chart.legend)))))
            figure.legend(handles=handles, frameon=False, loc="outside upper center", ncols=fitting)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once laid out, that is how it stays
        return {kind: _save(figure, kind) for kind in FIGURE_KINDS}


def _save(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"CreationDate": None, "Creator": None, "Producer": None}
    figure.savefig(buffer, format=kind, dpi=_DOTS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


def _dress(root: ET.Element, panel: Panel, label: str) -> None:
    """Make an SVG of matplotlib's one of the page: named, in its colours and its font."""
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("style", f"width: {panel.width * _PIXELS_PER_INCH:.0f}px")
    root.set("role", "img")
    root.set("aria-label", label)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata" or (
                child.tag == f"{{{_SVG}}}defs" and child.find(f"{{{_SVG}}}style") is not None
            ):
                parent.remove(child)
    description = ET.Element(f"{{{_SVG}}}desc")
    description.text = panel.describe()
    root.insert(0, description)
    for element in root.iter():
        if element.tag == f"{{{_SVG}}}g" and not element.get("id", "").startswith("mark"):
            element.attrib.pop("id", None)
        for name in {"d", "x", "y"} & element.attrib.keys():
            element.set(name, re.sub(r"(\.\d\d)\d+", r"\1", " ".join(element.attrib[name].split())))
        element.tail = None
        element.text = (element.text or "").strip()
        style = element.get("style")
        if style:
            style = re.sub(r"font-family: [^;]+; ?", "", style)
            style = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;]+", r"font-size: \1", style)
            element.set("style", re.sub(r"#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour[0], colour[0]), style))
        if element.tag == f"{{{_SVG}}}text" and "fill" not in element.get("style", ""):
            element.set("fill", "currentColor")


def _attach(root: ET.Element, tips: Tips) -> None:
    """Give each mark its attributes; what they look like stands at their group."""
    for group in root.iter(f"{{{_SVG}}}g"):
        attributes = tips.get(group.attrib.pop("id", ""))
        if attributes is None:
            continue
        marks = list(group.iter(f"{{{_SVG}}}use")) or list(group.iter(f"{{{_SVG}}}path"))
        for mark, own in zip(marks, attributes, strict=True):
            mark.attrib.update(own)
            if mark.tag == f"{{{_SVG}}}use":
                group.set("style", mark.attrib.pop("style", ""))
