"""Several analyses side by side on one page: what each found, and each claim's number, a dot an analysis.

Analyses that differ in nothing but the training seed are one arm and share a row; a row's dots are never averaged, as
seeds can fall into two groups. Models of different architecture, or analysed on another subject, are rows of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from metatokens.analysis.claims import CLAIMS
from metatokens.analysis.results import Results, Verdict, read_results
from metatokens.report.analysis_figures import HAND_OVER, describe_model
from metatokens.report.assets import read_asset
from metatokens.report.charts import Chart, DotPanel, Mark, Series, Style, to_svg
from metatokens.report.findings import findings_of
from metatokens.report.glossary import explain
from metatokens.report.hand_over import draw_hand_over
from metatokens.report.numbers import format_estimate
from metatokens.storage import write_atomically

COMPARISON_NAME = "comparison.html"
_SCRIPTS = ("figures.js", "downloads.js", "comparison.js")
_SEED = re.compile(r"[/_-]?seed[-_=]?\d+$")


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Render the results of several folders as one page in `out`, and return it.

    Raises:
        DataError: results that are missing, broken or of another version.
    """
    out.mkdir(parents=True, exist_ok=True)
    page = out / COMPARISON_NAME
    write_atomically(page, render_comparison([read_results(folder)[0] for folder in folders]))
    return page


def render_comparison(analyses: Sequence[Results]) -> str:
    """Return the page as one string."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"explain": explain, "estimate": format_estimate}
    arms = arms_of(analyses)
    charts = (_draw_claim(text, arms) for text in (claim.text for claim in CLAIMS.values()))
    return environment.from_string(read_asset("comparison.html")).render(
        arms=[(name, [_summary(one) for one in members]) for name, members in arms.items()],
        num_analyses=len(analyses),
        figures=[one for one in charts if one is not None],
        css=Markup(read_asset("colours.css") + read_asset("page.css")),
        scripts=[Markup(read_asset(name)) for name in _SCRIPTS],
    )


def arms_of(analyses: Sequence[Results]) -> dict[str, list[Results]]:
    """Return the analyses by arm, in their order: equal but for the seed in the name and the weights."""
    arms: dict[tuple[str, ...], list[Results]] = {}
    for one in analyses:
        kept = {key: value for key, value in one.checkpoint.items() if key not in ("name", "sha256")}
        key = (_SEED.sub("", _name(one)), str(sorted(kept.items())), str(one.data.get("subject")))
        arms.setdefault(key, []).append(one)
    short = [f"{name}, {subject}" for name, _, subject in arms]
    return {
        name if short.count(name) == 1 else f"{name} ({number + 1})": members
        for number, (name, members) in enumerate(zip(short, arms.values(), strict=True))
    }


def _name(results: Results) -> str:
    return str(results.checkpoint.get("name", results.title))


def _summary(results: Results) -> dict[str, Any]:
    chart = draw_hand_over(results, {})
    return {
        "name": _name(results),
        "model": describe_model(results),
        "sha256": str(results.checkpoint.get("sha256", ""))[:16],
        "findings": findings_of(results),
        "figure": None
        if chart is None
        else _figure(f"hand-over-{id_of(results)}", HAND_OVER.title, chart, _name(results)),
    }


def id_of(results: Results) -> str:
    """Return what tells an analysis from others in the ids of a page."""
    return re.sub(r"\W+", "-", f"{_name(results)}-{results.checkpoint.get('sha256', '')}")[:80]


def _draw_claim(text: str, arms: Mapping[str, Sequence[Results]]) -> dict[str, Any] | None:
    """Return the figure of a claim: a row an arm, a dot an analysis; None where no analysis measured it."""
    found = {
        name: [(one, verdict) for one in members if (verdict := _measured(one, text)) is not None]
        for name, members in arms.items()
    }
    known = {name: members for name, members in found.items() if members}
    if not known:
        return None
    verdicts = [verdict for members in known.values() for _, verdict in members]
    series = [
        Series("", Style(number), [_mark(number, place, len(members), *member) for place, member in enumerate(members)])
        for number, members in enumerate(known.values())
    ]
    unit = verdicts[0].unit
    panel = DotPanel("", series, list(known), unit if unit not in ("", "1") else "the number that decides")
    number = next(index for index, claim in enumerate(CLAIMS.values()) if claim.text == text)
    figure = _figure(f"claim-{number}", text, Chart([panel], 1), text)
    rows = [(name, _name(one), verdict) for name, members in known.items() for one, verdict in members]
    return figure | {"endpoint": verdicts[0].endpoint, "paper": verdicts[0].paper, "rows": rows}


def _mark(row: int, place: int, count: int, results: Results, verdict: Verdict) -> Mark:
    assert verdict.value is not None
    shift = 0.5 * ((place + 0.5) / count - 0.5)  # seeds below each other, within their row
    tip = f"{_name(results)}\n{format_estimate(verdict)}\n{verdict.verdict}\nn = {verdict.num_documents}"
    return Mark(row + shift, verdict.value, tip, verdict.low, verdict.high)


def _measured(results: Results, text: str) -> Verdict | None:
    return next((one for one in results.verdicts if one.claim == text and one.value is not None), None)


def _figure(name: str, title: str, chart: Chart, label: str) -> dict[str, Any]:
    return {
        "id": name,
        "title": title,
        "legend": [(style.css, style.glyph, series) for series, style in chart.legend.items()],
        "panels": [Markup(to_svg(panel, f"{title}: {label}")) for panel in chart.panels],
    }
