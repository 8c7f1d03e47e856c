"""One self-contained HTML page of an analysis: charts, tables, verdicts and the token view, with nothing to fetch.

The page renders what `metatokens.analysis.results` holds and computes nothing. Its sections are the parts of the
analysis, its charts are SVG from `metatokens.report.charts`, which scripts only add to: values under the pointer, the
documents behind a heat map's cell, and the token view. Without JavaScript the charts and every number as a table are
there. Equal results give an equal page, byte for byte.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from metatokens.analysis.claims import CLAIMS
from metatokens.analysis.measures import MEASURES, HeadMaps
from metatokens.analysis.results import VERDICTS, Record, Results, TokenView, Verdict, read_results
from metatokens.config.analysis import Part
from metatokens.report.analysis_figures import (
    FIGURES,
    HAND_OVER,
    AnalysisFigure,
    count_documents,
    describe_model,
    figure_files,
    file_names,
)
from metatokens.report.assets import read_asset
from metatokens.report.charts import Chart, MapPanel, to_svg
from metatokens.report.findings import findings_of, hand_over_records
from metatokens.report.glossary import COLUMNS, explain, explain_column, name_place, words
from metatokens.report.numbers import format_estimate, format_p
from metatokens.report.opening import opening_of, opening_view
from metatokens.storage import no_follow, write_atomically

PAGE_NAME = "report.html"
DECIDED = ("supported", "the opposite holds")
"""Verdicts that have a row of their own; the others share one line."""
META_MARK = "\N{BLACK DIAMOND}"
LARGEST_PAGE_BYTES = 15_000_000
"""A token view with which the page would be larger is left out, and the page says so."""

_PACKED = frozenset({"uint8", "int8", "uint16", "int16", "float32"})  # the typed arrays of token_view.js
_SCRIPTS = ("figures.js", "downloads.js", "documents.js", "token_view.js", "page.js")
_SHOWN_DIGITS = 16  # of a SHA-256; results.json has them all

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _PackedView:
    title: str
    json: Markup


_SECTIONS: dict[Part, tuple[str, str]] = {
    "attention": (
        "Attention and the sharpening theorem",
        "The same documents are run twice, with the meta-tokens' embedding and with it zeroed, and rows of attention "
        "are compared one by one.",
    ),
    "similarity": (
        "What residuals have in common",
        "Cosine between the state of a token and that of an earlier one, after subtracting the mean state of other "
        "documents: raw cosines are near 1 in any such model. The control is ordinary tokens at the same places.",
    ),
    "decodability": (
        "What a linear map reads",
        "A linear map reads the text before a state. The controls are the token right before the meta-token, which has "
        "read the same text, and, where a text and no task was analysed, ordinary tokens at the same places.",
    ),
    "output": (
        "What the output head reads, and what is added",
        "The model's own head reads the text before a state, as it is or through an affine map to the final state that "
        "other documents were fitted by. Then what each part of the model adds to the output.",
    ),
    "rate_distortion": (
        "Compression: rate and distortion",
        "A variational bottleneck on one state predicts what the task asks for; at equal rate, lower distortion is "
        "better. The bottleneck's encoder can compute, too. How far that goes, the mean embedding of the prefix shows: "
        "no layer made it.",
    ),
    "probes": (
        "Probes and erasure",
        "Probes ask the same states for more; what they find counts as used only where its erasure costs the answer "
        "more than the erasure of shuffled labels.",
    ),
    "causal": (
        "Cause",
        "Pairs of prompts that differ in one item. Edges are cut, states exchanged and meta-attention removed, to see "
        "which path the answer takes. Clean into corrupt (denoise) asks whether states suffice, corrupt into clean "
        "(noise) whether they are needed.",
    ),
    "eviction": (
        "Meta-tokens as a cache",
        "Most of the key-value cache is dropped after a prefix; the cost is what the continuation loses. If "
        "meta-tokens do not beat evenly spaced columns at equal budget, they do not compress.",
    ),
    "graft": (
        "What the anchors do",
        "A grafted model reads plain text and puts its anchors between the tokens by itself. All numbers are of "
        "late tokens, for which some text has left the window. Untrained, the model keeps every n-th token; with the "
        "path cut it has its window and the first tokens alone; switched off it is the plain model, which sees all of "
        "the text.",
    ),
    "knockout": ("Text without meta-attention", "Meta-attention is removed, in one layer or in all together."),
}
"""Title and introduction of a part's section, in the order of the page."""


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
        with open(figures / name, "wb", opener=no_follow) as file:
            file.write(data)
    for name in file_names() - files.keys():
        (figures / name).unlink(missing_ok=True)  # of an earlier analysis in the same folder
    page = target / PAGE_NAME
    write_atomically(page, render_page(results, arrays))
    return page


def render_page(results: Results, arrays: Arrays) -> str:
    """Return the page as one string."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    environment.filters |= {"estimate": format_estimate, "p_value": format_p, "anchor": _anchor_of}
    environment.filters |= {"explain": explain, "explain_column": explain_column}
    template = environment.from_string(read_asset("page.html"))
    whole = {
        "lead": _lead(results),
        "model": describe_model(results),
        "findings": findings_of(results),
        "opening_figure": _opening_figure(results, arrays),
        "decided": [one for one in results.verdicts if one.verdict in DECIDED],
        "undecided": [one for one in results.verdicts if one.verdict not in DECIDED],
        "opening_view": opening_view(results.token_views),
        "facts": _facts(results),
        "sections": _render_sections(results, arrays),
        "meta_mark": META_MARK,
        "css": Markup(read_asset("colours.css") + read_asset("page.css")),
        "scripts": [Markup(read_asset(name)) for name in _SCRIPTS],
        "documents_json": _embed(_documents_behind_cells(results, arrays)),
    }

    def render(views: Sequence[_PackedView], left_out: Sequence[_PackedView]) -> str:
        lines = [f"token view of {view.title}: the page would be too large, see arrays.npz" for view in left_out]
        said = results.model_copy(update={"not_run": (*results.not_run, *lines)})
        return template.render(
            **whole, results=said, results_json=_embed(_compress(_to_json(said.model_dump(mode="json")))), views=views
        )

    packed = [_PackedView(view.title, _pack_view(view, arrays)) for view in results.token_views]
    # with the frame of each view and the line of each that is left out, of which a page has one: no page has more
    frame = render([_PackedView(view.title, Markup("")) for view in packed], packed)
    views, left_out = _choose_views(packed, LARGEST_PAGE_BYTES - len(frame.encode()))
    return render(views, left_out)


def _opening_figure(results: Results, arrays: Arrays) -> dict[str, Any] | None:
    """Return the figure of the first screen, if there are numbers for it."""
    chart = HAND_OVER.draw(results, arrays)
    return None if chart is None else _render_figure(HAND_OVER, results, chart, hand_over_records(results, "denoise"))


def _lead(results: Results) -> str:
    counts = {verdict: sum(v.verdict == verdict for v in results.verdicts) for verdict in VERDICTS}
    if not results.verdicts:
        return "What one trained model does with its meta-tokens."
    parts = [
        f"on {count} {verdict}" if verdict == "the opposite holds" else f"{count} {verdict}"
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


def _render_sections(results: Results, arrays: Arrays) -> list[dict[str, Any]]:
    """Return what the template needs of each part, and of records whose measure is not known here.

    A model is grafted or not: the part of a graft is shown alone, and only where it has numbers.
    """
    measured = {MEASURES[record.measure].part for record in results.records if record.measure in MEASURES}
    others = () if "graft" in measured else _SECTIONS.keys() - {"graft"}
    sections = [_render_section(part, results, arrays) for part in _SECTIONS if part in measured or part in others]
    unknown = [record for record in results.records if record.measure not in MEASURES]
    if unknown:
        text = "These measures are not those of this version of the package."
        sections.append(
            {
                "id": "other",
                "short": "Other",
                "title": "Other measures",
                "text": text,
                "figures": [],
                "others": _table(unknown),
            }
        )
    return sections


def _render_section(part: Part, results: Results, arrays: Arrays) -> dict[str, Any]:
    title, text = _SECTIONS[part]
    records = [r for r in results.records if r.measure in MEASURES and MEASURES[r.measure].part == part]
    figures, shown = [], set()
    for figure in FIGURES:
        own = [record for record in records if record.measure in figure.measures]
        is_here = figure.part == part and figure is not HAND_OVER
        chart = figure.draw(results, arrays) if is_here else None
        if chart is not None:
            shown |= set(figure.measures)
            figures.append(_render_figure(figure, results, chart, own))
    others = _table([record for record in records if record.measure not in shown])
    return {
        "id": part.replace("_", "-"),
        "short": words(part).capitalize(),
        "title": title,
        "text": text,
        "figures": figures,
        "others": others,
    }


def _render_figure(figure: AnalysisFigure, results: Results, chart: Chart, records: Sequence[Record]) -> dict[str, Any]:
    labels = [f"{figure.title}{': ' if panel.title else ''}{panel.title}" for panel in chart.panels]
    return {
        "id": figure.id,
        "title": figure.title,
        "text": figure.text_for(results),
        "definitions": [
            (words(name), MEASURES[name].definition)
            for name in figure.measures
            if any(record.measure == name for record in records)
        ],
        "count": count_documents(records),
        "legend": [(style.css, style.glyph, name) for name, style in chart.legend.items()],
        "is_map": all(isinstance(panel, MapPanel) for panel in chart.panels),
        "panels": [Markup(to_svg(panel, label)) for panel, label in zip(chart.panels, labels, strict=True)],
        "table": _table(records),
    }


def _anchor_of(verdict: Verdict) -> str:
    """Return the id of the figure that shows a claim's number, else of the section; empty for an unknown claim."""
    measure = next((claim.measure for claim in CLAIMS.values() if claim.text == verdict.claim), None)
    if measure is None:
        return ""
    figure = next((figure.id for figure in FIGURES if measure in figure.measures), None)
    return f"figure-{figure}" if figure else MEASURES[measure].part.replace("_", "-")


def _table(records: Sequence[Record]) -> dict[str, Any]:
    keys = sorted({key for record in records for key in record.at})
    rows = [
        [
            words(record.measure),
            *(name_place(key, record.at.get(key, "all")) for key in keys),
            format_estimate(record),
            str(record.num_documents),
            "" if record.adjusted_p is None else format_p(record.adjusted_p).removeprefix("= "),
            record.note or "",
        ]
        for record in records
    ]
    return {"columns": ["measure", *keys, *COLUMNS], "rows": rows}


def _choose_views(views: Sequence[_PackedView], room: int) -> tuple[list[_PackedView], list[_PackedView]]:
    """Return the token views that fit into `room` bytes, in their order, and those that do not."""
    chosen, left_out = [], []
    for view in views:
        if len(view.json) <= room:
            room -= len(view.json)  # characters are bytes: JSON escapes all others
            chosen.append(view)
        else:
            left_out.append(view)
    return chosen, left_out


def _documents_behind_cells(results: Results, arrays: Arrays) -> dict[str, Any]:
    """Return what lies behind each heat map: its documents, [document][layer][head], null where one has no number."""
    return {
        measure.name: {
            "name": words(measure.name),
            "unit": "" if measure.unit == "1" else measure.unit,
            "documents": _rounded(arrays[measure.name]),
            "cells": [
                [record.at["layer"], record.at["head"], record.value, record.low, record.high, format_estimate(record)]
                for record in results.find(measure.name)
                if record.value is not None and "head" in record.at
            ],
        }
        for measure in MEASURES.values()
        if measure.keep and isinstance(measure.plot, HeadMaps) and measure.name in arrays
    }


def _pack_view(view: TokenView, arrays: Arrays) -> Markup:
    packed = {name: _pack_array(arrays[key]) for name, key in sorted(view.arrays.items())}
    opened = opening_of(view, arrays)
    return _embed(
        {"title": view.title, "tokens": view.tokens, "is_meta": view.is_meta, "opening": opened, "arrays": packed}
    )


def _pack_array(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Return an array as base64 of gzip of its bytes, little-endian, row by row; all fractions as float32."""
    kind = "float32" if array.dtype.kind == "f" else array.dtype.name
    assert kind in _PACKED, f"the page reads no {kind}"
    little = np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<"))
    return {"shape": list(array.shape), "dtype": kind, "gzip": _compress(little.tobytes())}


def _compress(data: bytes) -> str:
    """Return base64 of gzip of bytes."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def _rounded(array: npt.NDArray[Any]) -> Any:
    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(entry) for entry in value]
        return round(value, 5) if math.isfinite(value) else None

    return clean(np.asarray(array, dtype=np.float64).tolist())


def _embed(document: Any) -> Markup:
    """Return JSON that no text in it can end the script element of."""
    text = _to_json(document).decode()
    return Markup(text.replace("<", "\\u003c"))


def _to_json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
