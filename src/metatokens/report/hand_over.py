"""The figure that a report opens with: how the answer passes from the item over meta-tokens to the last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from metatokens.analysis.results import Record, Results
from metatokens.report.charts import Chart, LinePanel, Mark, Rule, Series, Style, dodged
from metatokens.report.findings import hand_over_records
from metatokens.report.numbers import format_span

STYLES = {"the item": Style(0), "meta-tokens": Style(1), "last token": Style(2), "ordinary tokens": Style(5)}
"""In the order in which the answer may pass them, and the control last."""
_WIDTH, _HEIGHT = 3.0, 2.5


def draw_hand_over(results: Results, arrays: Mapping[str, npt.NDArray[Any]]) -> Chart | None:
    """Draw how much of the answer states carry before each layer, by where they are (denoise, a layer at a time)."""
    del arrays
    records = hand_over_records(results, "denoise")
    series = [
        Series(where, style, [_mark(record) for record in records if record.at["where"] == where])
        for where, style in STYLES.items()
        if any(record.at["where"] == where for record in records)
    ]
    if not series:
        return None
    panel = LinePanel(
        *("", dodged(series), "state before layer (last: after all)", "share of the answer carried"),
        joined=False,
        is_count=True,
        rules=[Rule(None, [1, 1], ":")],
        size=5,
        width=_WIDTH,
        height=_HEIGHT,
    )
    return Chart([panel], 1, {one.name: one.style for one in series})


def _mark(record: Record) -> Mark:
    assert record.value is not None
    tip = f"{record.at['where']}, before layer {record.at['layer']}\n{format_span(record)}\nn = {record.num_documents}"
    return Mark(float(record.at["layer"]), record.value, tip, record.low, record.high)
