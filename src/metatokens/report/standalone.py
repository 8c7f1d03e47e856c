"""One chart as an SVG file of its own, such as a README shows: titled, and readable on light and on dark pages.

Its colours are the page's variables, which a style element defines for both schemes; text is text.

    python -m metatokens.report.standalone experiments/tiny-analysis/parity/results.json docs/interchange.svg
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

from metatokens.analysis.results import Results, read_results_file
from metatokens.report.analysis_figures import HAND_OVER, count_documents, describe_model
from metatokens.report.assets import read_asset
from metatokens.report.charts import Chart, to_svg
from metatokens.report.findings import hand_over, hand_over_records

_MARGIN, _LINE, _SCALE = 16, 20, 2.0
_LETTER = 7.2  # pixels of one of 13 pixels' height, roughly


def to_standalone_svg(chart: Chart, title: str, caption: str) -> str:
    """Return a chart of one panel as an SVG document, its title above and its caption below."""
    (panel,) = chart.panels
    width = panel.width * 72 * _SCALE + 2 * _MARGIN
    top, parts = _MARGIN + 14, []
    for line in textwrap.wrap(title, int((width - 2 * _MARGIN) / 9)):
        parts.append(f'<text x="{_MARGIN}" y="{top}" font-size="15" font-weight="600">{escape(line)}</text>')
        top += _LINE
    x = _MARGIN
    for name, style in chart.legend.items():
        mark = f'<tspan fill="{style.css}">{style.glyph}</tspan>'
        parts.append(f'<text x="{x}" y="{top + 4}" font-size="13">{mark} {escape(name)}</text>')
        x += int(_LETTER * (len(name) + 3)) + 8
    top += 14
    height = panel.height * 72 * _SCALE
    inner = to_svg(panel, title)
    place = f'x="{_MARGIN}" y="{top}" width="{width - 2 * _MARGIN:.0f}" height="{height:.0f}"'
    parts.append(inner.replace("<svg ", f"<svg {place} ", 1))
    top += int(height) + _LINE
    for line in textwrap.wrap(caption, int((width - 2 * _MARGIN) / 6.4)):
        parts.append(f'<text x="{_MARGIN}" y="{top}" font-size="12" fill="var(--soft)">{escape(line)}</text>')
        top += 17
    sheet = f"{read_asset('colours.css')} svg {{ color: var(--ink); font-family: system-ui, sans-serif; }}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:.0f} {top + 4}" width="{width:.0f}" height="{top + 4}" role="img">'
        f"<title>{escape(title)}</title><style>{sheet}</style>"
        f'<rect width="100%" height="100%" rx="6" fill="var(--panel)"/>'
        f'<g fill="currentColor">{"".join(parts)}</g></svg>\n'
    )


def interchange_svg(results: Results) -> str:
    """Return the hand-over figure of an analysis, with its finding as the title.

    Raises:
        ValueError: results without interchange effects.
    """
    chart, finding = HAND_OVER.draw(results, {}), hand_over(results)
    if chart is None or finding is None:
        raise ValueError("the results have no interchange effects: analyze a model on a task, with the causal part")
    count = count_documents(hand_over_records(results, "denoise"))
    return to_standalone_svg(chart, finding.text, f"{HAND_OVER.text} {count} Model: {describe_model(results)}.")


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(interchange_svg(read_results_file(source)[0]), encoding="utf-8")
