"""One self-contained HTML page of an analysis: charts, tables, verdicts and the token view, with nothing to fetch.

The page renders what `metatokens.analysis.results` holds and computes nothing. Its charts are drawn in the browser by
Observable Plot and d3, which are vendored with their licences; without JavaScript the same figures are there as images
and every number as a table. Equal results give an equal page, byte for byte.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from metatokens.analysis.results import VERDICTS, Record, Results, Section, TokenView, Verdict, read_results
from metatokens.report.analysis_figures import FIGURE_KINDS, FIGURES, draw_figure, figure_files

PAGE_NAME = "report.html"
META_MARK = "\N{BLACK DIAMOND}"
LARGEST_PAGE_BYTES = 15_000_000
"""A token view with which the page would be larger is left out, and the page says so."""

_OF_DOCUMENTS = "attention."  # what the keys of arrays begin with that lie behind the heat maps
_PACKED = frozenset({"uint8", "int8", "uint16", "int16", "float32"})  # the typed arrays of token_view.js
_SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "charts.js", "token_view.js", "page.js")
_SHOWN_DIGITS = 16  # of a SHA-256; results.json has them all

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _PackedView:
    title: str
    json: Markup


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    text: str
    figures: tuple[str, ...]
    sections: tuple[Section, ...]
    """Of the records; those that no figure takes are in one more table."""


_SECTIONS = (
    _Section(
        "attention",
        "Entropy and boost",
        "The same documents are run twice, with the meta-tokens' embedding and with it zeroed. A dot marks a head "
        "whose difference survives the correction for all heads (false discovery rate 5%).",
        ("attention-maps", "distances"),
        ("attention",),
    ),
    _Section(
        "theory",
        "The sharpening theorem, audited",
        "A boost of a key lowers the entropy of its row from the start only where its margin x is at least 0; below, "
        "the entropy rises first, and falls below its start only beyond a critical boost between |x| (dashed) and "
        "2|x| (dotted). A point is an edge from a query to a meta key.",
        ("theorem", "mechanism"),
        ("theory",),
    ),
    _Section(
        "similarity",
        "What residuals have in common",
        "Cosine between the state of a token and that of an earlier one, after subtracting the mean state of other "
        "documents: raw cosines are near 1 in any such model. The control is ordinary tokens at the same places.",
        ("similarity",),
        ("similarity",),
    ),
    _Section(
        "readouts",
        "What can be read, and what is added",
        "A linear map, and the model's own output head, read the text before a state; controls are the token "
        "right before the meta-token, which has read the same text (not for the head, which would find that token in "
        "itself), and on text ordinary tokens at the same places. Then what each "
        "part of the model adds to the output.",
        ("decodability", "logit-lens", "attribution", "branch-strength"),
        ("readouts",),
    ),
    _Section(
        "compression",
        "Compression: rate, distortion and probes",
        "A variational bottleneck on one state predicts what the task asks for; at equal rate, lower is better. Its "
        "encoder can compute, too: how far that goes the mean embedding of the prefix shows, which no layer made. "
        "Probes ask the same states for more; what they find counts as used only where its erasure costs the "
        "answer.",
        ("rate-distortion", "probes", "erasure"),
        ("rate_distortion", "probes"),
    ),
    _Section(
        "causal",
        "Cause",
        "Pairs of prompts that differ in one item. Edges are cut, states exchanged and meta-attention removed, to see "
        "which path the answer takes.",
        ("zeroing", "two-by-two", "interchange", "knockout", "capacity"),
        ("causal", "language_model"),
    ),
    _Section(
        "eviction",
        "Meta-tokens as a cache",
        "Most of the key-value cache is dropped after a prefix; the cost is what the continuation loses. If "
        "meta-tokens do not beat evenly spaced columns at equal budget, they do not compress.",
        ("eviction",),
        ("eviction",),
    ),
)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Render the results in a folder and return the page; figures for papers go to `figures/` beside it.

    Raises:
        DataError: results that are missing, broken or of another version.
    """
    results, arrays = read_results(folder)
    target = folder if out is None else out
    target.mkdir(parents=True, exist_ok=True)
    figures, files = target / "figures", figure_files(results, arrays)
    for name, data in files.items():
        figures.mkdir(exist_ok=True)
        (figures / name).write_bytes(data)
    for name in {f"{figure}.{kind}" for figure in FIGURES for kind in FIGURE_KINDS} - files.keys():
        (figures / name).unlink(missing_ok=True)  # of an earlier analysis in the same folder
    page = target / PAGE_NAME
    page.write_text(render_page(results, arrays), encoding="utf-8")
    return page


def render_page(results: Results, arrays: Arrays) -> str:
    """Return the page as one string."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    environment.filters |= {"estimate": format_estimate, "p_value": _format_p}
    template = environment.from_string(_asset("page.html"))
    whole = {
        "lead": _lead(results),
        "facts": _facts(results),
        "sections": [_render_section(section, results, arrays) for section in _SECTIONS],
        "meta_mark": META_MARK,
        "css": Markup(_asset("page.css")),
        "scripts": [Markup(_asset(name)) for name in _SCRIPTS],
        "points_json": _embed(_rounded(arrays["theory_points"]) if "theory_points" in arrays else []),
        "documents_json": _embed(_documents_behind_cells(arrays)),
    }

    def render(views: Sequence[_PackedView], left_out: Sequence[_PackedView]) -> str:
        lines = [f"token view of {view.title}: the page would be too large, see arrays.npz" for view in left_out]
        said = results.model_copy(update={"not_run": (*results.not_run, *lines)})
        return template.render(**whole, results=said, results_json=_embed(said.model_dump(mode="json")), views=views)

    packed = [_PackedView(view.title, _pack_view(view, arrays)) for view in results.token_views]
    # with the frame of each view and the line of each that is left out, of which a page has one: no page has more
    frame = render([_PackedView(view.title, Markup("")) for view in packed], packed)
    views, left_out = _choose_views(packed, LARGEST_PAGE_BYTES - len(frame.encode()))
    return render(views, left_out)


def format_estimate(number: Record | Verdict) -> str:
    """Return a number with its interval and unit, for people."""
    if number.value is None:
        return "n/a"
    interval = "" if number.low is None else f" ({_format(number.low)} to {_format(number.high)})"
    unit = "" if number.unit in ("", "1") else f" {number.unit}"
    return f"{_format(number.value)}{interval}{unit}"


def _format(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.2g}" if abs(value) < 1 else f"{value:,.0f}"


def _format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _lead(results: Results) -> str:
    counts = {verdict: sum(v.verdict == verdict for v in results.verdicts) for verdict in VERDICTS}
    if not results.verdicts:
        return "What one trained model does with its meta-tokens."
    parts = [
        f"of {count} {verdict}" if verdict == "the opposite holds" else f"{count} {verdict}"
        for verdict, count in counts.items()
        if count
    ]
    return f"Of {len(results.verdicts)} claims about what happens inside: {', '.join(parts)}."


def _facts(results: Results) -> list[tuple[str, str]]:
    checkpoint = {
        f"checkpoint: {key}": str(value)[:_SHOWN_DIGITS] if key == "sha256" else str(value)
        for key, value in sorted(results.checkpoint.items())
    }
    data = {f"data: {key}": str(value) for key, value in sorted(results.data.items())}
    identity = {
        "seed": str(results.seed),
        "config SHA-256": results.config_sha256[:_SHOWN_DIGITS],
        "endpoints SHA-256": results.endpoints_sha256[:_SHOWN_DIGITS],
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(results.versions.items())),
        "command": results.command,
    }
    return [*checkpoint.items(), *data.items(), *identity.items()]


def _render_section(section: _Section, results: Results, arrays: Arrays) -> dict[str, Any]:
    figures = []
    for figure_id in section.figures:
        figure = FIGURES[figure_id]
        records = [record for record in results.records if (record.section, record.metric) in figure.metrics]
        if not any(record.value is not None for record in records):
            continue
        columns, rows = _table(records)
        figures.append(
            {
                "id": figure_id,
                "title": figure.title,
                "caption": figure.caption(records),
                "columns": columns,
                "rows": rows,
                "png": _draw_png(figure_id, results, arrays),
            }
        )
    taken = {metric for figure_id in section.figures for metric in FIGURES[figure_id].metrics}
    columns, rows = _table(
        [r for r in results.records if r.section in section.sections and (r.section, r.metric) not in taken]
    )
    others = {"columns": columns, "rows": rows}
    return {"id": section.id, "title": section.title, "text": section.text, "figures": figures, "others": others}


def _draw_png(figure_id: str, results: Results, arrays: Arrays) -> str | None:
    if not FIGURES[figure_id].is_drawable(results, arrays):
        return None
    return base64.b64encode(draw_figure(figure_id, results, arrays)).decode()


def _table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    keys = sorted({key for record in records for key in record.at})
    rows = [
        [
            record.metric,
            *(_cell(record.at.get(key, "all")) for key in keys),
            format_estimate(record),
            str(record.num_documents),
            "" if record.adjusted_p is None else _format_p(record.adjusted_p).removeprefix("= "),
            record.note or "",
        ]
        for record in records
    ]
    return ["metric", *keys, "value (95% interval)", "n", "adjusted p", "note"], rows


def _cell(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choose_views(views: Sequence[_PackedView], room: int) -> tuple[list[_PackedView], list[_PackedView]]:
    """Return the token views that fit into so many bytes, in their order, and those that do not."""
    chosen, left_out = [], []
    for view in views:
        if len(view.json) <= room:
            room -= len(view.json)  # characters are bytes: JSON escapes all others
            chosen.append(view)
        else:
            left_out.append(view)
    return chosen, left_out


def _documents_behind_cells(arrays: Arrays) -> dict[str, Any]:
    """Return the numbers of documents behind each heat map, [document][layer][head] with null where it has none."""
    return {
        name.removeprefix(_OF_DOCUMENTS): _rounded(array)
        for name, array in sorted(arrays.items())
        if name.startswith(_OF_DOCUMENTS)
    }


def _pack_view(view: TokenView, arrays: Arrays) -> Markup:
    packed = {name: _pack_array(arrays[key]) for name, key in sorted(view.arrays.items())}
    return _embed({"title": view.title, "tokens": view.tokens, "is_meta": view.is_meta, "arrays": packed})


def _pack_array(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Return an array as base64 of gzip of its bytes, little-endian, row by row; all fractions as float32."""
    kind = "float32" if array.dtype.kind == "f" else array.dtype.name
    assert kind in _PACKED, f"the page reads no {kind}"
    little = np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<"))
    data = gzip.compress(little.tobytes(), mtime=0)
    return {"shape": list(array.shape), "dtype": kind, "gzip": base64.b64encode(data).decode()}


def _rounded(array: npt.NDArray[Any]) -> Any:
    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(entry) for entry in value]
        return round(value, 5) if math.isfinite(value) else None

    return clean(np.asarray(array, dtype=np.float64).tolist())


def _embed(document: Any) -> Markup:
    """Return JSON that no text in it can end the script element of."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _asset(name: str) -> str:
    return resources.files("metatokens.report").joinpath("assets", *name.split("/")).read_text(encoding="utf-8")
