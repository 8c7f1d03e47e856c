"""What an analysis found, in sentences: one small function per finding, which reads the results and measures nothing.

A finding states a difference only where its 95% interval leaves out 0, and says "cannot tell" where it does not. To
add one, write a function from `Results` to `Finding | None` and name it in `FINDINGS`; None where its numbers are
absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from metatokens.analysis.claims import CLAIMS, NEGLIGIBLE
from metatokens.analysis.results import Record, Results, Verdict
from metatokens.config.analysis import Endpoint
from metatokens.report.numbers import format_number, format_span

NUM_SHOWN = 3
CARRIES = 0.5
"""Share of that way above which states are said to carry most of it."""


class Finding(NamedTuple):
    """One sentence, and the id of the figure or section that bears it."""

    text: str
    anchor: str


def findings_of(results: Results) -> list[Finding]:
    """Return the first `NUM_SHOWN` findings that the results have numbers for, in the order of `FINDINGS`."""
    found = (finding(results) for finding in FINDINGS)
    return [one for one in found if one is not None][:NUM_SHOWN]


def zeroed_embedding(results: Results) -> Finding | None:
    """What accuracy loses without the meta-tokens' embedding."""
    full, gain = _one(results, "accuracy", intervention="none"), _one(results, "accuracy_gain", **_ZEROED)
    after = _one(results, "accuracy", **_ZEROED)
    if full is None or after is None or gain is None:
        return None
    anchor = "figure-accuracy"
    if not _differs(gain):
        return Finding(
            f"Cannot tell whether zeroing the meta-tokens' embedding changes accuracy: {_percent(full.value)} with "
            f"it as it is, {_percent(after.value)} with it zeroed{_points(gain)}.",
            anchor,
        )
    return Finding(
        f"Zeroing the meta-tokens' embedding takes accuracy from {_percent(full.value)} to {_percent(after.value)}"
        f"{_points(gain)}.",
        anchor,
    )


def cut_path(results: Results) -> Finding | None:
    """What the answer loses where the question cannot read the meta-tokens."""
    full, cut = (_one(results, "logit_difference", condition=name) for name in ("full", "meta cut"))
    if full is None or cut is None:
        return None
    numbers = f"the logit difference is {format_span(full)} before the cut and {format_span(cut)} after it"
    if full.low is None or full.high is None or cut.low is None or cut.high is None:
        text = f"Cannot tell what cutting the path through meta-tokens costs: {numbers}, without intervals."
    elif cut.high < full.low:
        accuracy = [_one(results, "pair_accuracy", condition=name) for name in ("full", "meta cut")]
        shares = [_percent(one.value) for one in accuracy if one is not None]
        also = f", and accuracy goes from {shares[0]} to {shares[1]}" if len(shares) == len(accuracy) else ""
        text = f"Cutting the path through meta-tokens costs the answer: {numbers}{also}."
    else:
        text = f"Cutting the path through meta-tokens has no cost that these pairs could show: {numbers}."
    return Finding(text, "figure-logit-difference")


def hand_over(results: Results) -> Finding | None:
    """Whether the states of meta-tokens carry the answer from the item to the last token."""
    rows = [record for record in hand_over_records(results, "denoise") if record.at["where"] == "meta-tokens"]
    known = [record for record in rows if record.value is not None and record.high is not None]
    if not known:
        return None
    best = max(known, key=lambda record: record.value or 0.0)
    highest = max(record.high or 0.0 for record in known)
    if best.low is not None and best.low > CARRIES:
        text = (
            f"The answer moves item \N{RIGHTWARDS ARROW} meta-tokens \N{RIGHTWARDS ARROW} last token: before layer "
            f"{best.at['layer']}, the meta-tokens' states alone carry {_share(best)} of it."
        )
    elif highest < NEGLIGIBLE:
        place_marks = _verdict(results, "zero_embedding")
        needed = place_marks is not None and place_marks.verdict == "supported"
        role = ": here meta-tokens are place marks, not a cache" if needed else ""
        most = f"more than {_percent(highest, 1)}" if highest >= 0.001 else "even 0.1%"
        text = f"In no layer do the meta-tokens' states carry {most} of the answer{role}."
    elif best.low is not None and best.low > 0:
        text = f"The meta-tokens' states carry part of the answer: at most {_share(best)}, in layer {best.at['layer']}."
    else:
        text = f"Cannot tell whether the meta-tokens' states carry the answer: at most {_share(best)} in any layer."
    return Finding(text, "hand-over")


def loss_behind(results: Results) -> Finding | None:
    """What the text behind meta-tokens gains from their embedding."""
    saved = _one(results, "loss_saved", place="text behind")
    if saved is None or _is_task(results):
        return None
    if not _differs(saved):
        text = "Cannot tell whether the meta-tokens' embedding lowers the loss of the text behind"
        text += f" (saved: {_span(saved)})."
    else:
        direction = "lowers" if (saved.value or 0) > 0 else "raises"
        text = f"The meta-tokens' embedding {direction} the loss of the text behind them (saved: {_span(saved)})."
    return Finding(text, "output")


def worth_in_cache(results: Results) -> Finding | None:
    """Whether the cache should keep meta-tokens."""
    verdict = _verdict(results, "eviction")
    if verdict is None or not verdict.num_documents:
        return None
    texts = {
        "supported": "In a small key-value cache, keeping meta-tokens beats keeping evenly spaced tokens",
        "the opposite holds": "In a small key-value cache, keeping evenly spaced tokens beats keeping meta-tokens",
    }
    text = texts.get(verdict.verdict, "Cannot tell whether a small cache should keep meta-tokens or evenly spaced ones")
    return Finding(f"{text} (loss saved: {_span(verdict)}).", "figure-eviction-cost")


def resemblance(results: Results) -> Finding | None:
    """Whether the state of a meta-token resembles the text before it."""
    verdict = _verdict(results, "excess_cosine")
    if verdict is None or not verdict.num_documents:
        return None
    texts = {
        "supported": "A meta-token's state resembles the text right before it more than an ordinary token's does",
        "the opposite holds": "A meta-token's state resembles the text right before it less than an ordinary token's",
    }
    text = texts.get(verdict.verdict, "Cannot tell whether a meta-token's state resembles the text right before it")
    return Finding(f"{text} (cosine minus the control's: {_span(verdict)}).", "similarity")


def sharpening(results: Results) -> Finding | None:
    """Whether attention is sharper with the meta-tokens' embedding."""
    verdict = _verdict(results, "entropy_drop")
    if verdict is None or not verdict.num_documents:
        return None
    texts = {
        "supported": "The meta-tokens' embedding makes attention sharper",
        "the opposite holds": "The meta-tokens' embedding makes attention less sharp",
    }
    text = texts.get(verdict.verdict, "Cannot tell whether the meta-tokens' embedding makes attention sharper")
    beside = f", {verdict.beside_paper}" if verdict.beside_paper else ""
    return Finding(f"{text} (entropy taken: {_span(verdict)}{beside}).", "attention")


def anchor_path(results: Results) -> Finding | None:
    """What text that has left the window is worth to a grafted model by way of its anchors."""
    gain = _one(results, "anchor_gain", intervention="path cut")
    if gain is None:
        return None
    if not _differs(gain):
        text = f"Cannot tell whether text gains from the anchors of what has left the window (saved: {_span(gain)})."
    else:
        direction = "lowers" if (gain.value or 0) > 0 else "raises"
        text = f"Seeing the anchors of what has left the window {direction} the loss of text (saved: {_span(gain)})."
    return Finding(text, "graft")


FINDINGS: tuple[Callable[[Results], Finding | None], ...] = (
    zeroed_embedding,
    hand_over,
    cut_path,
    loss_behind,
    worth_in_cache,
    resemblance,
    sharpening,
    anchor_path,
)
"""Every finding, the most telling first."""


def hand_over_records(results: Results, direction: str) -> list[Record]:
    """Return the interchange effects of single layers in one direction that have a value."""
    return [
        record
        for record in results.find("interchange_effect", direction=direction)
        if record.value is not None and {"where", "layer"} <= record.at.keys() and record.at.get("window", 1) == 1
    ]


_ZEROED = {"intervention": "zero_embedding"}


def _one(results: Results, measure: str, **at: str) -> Record | None:
    """Return the one record with a value, if there is one."""
    return next((record for record in results.find(measure, **at) if record.value is not None), None)


def _verdict(results: Results, endpoint: Endpoint) -> Verdict | None:
    return next((one for one in results.verdicts if one.claim == CLAIMS[endpoint].text), None)


def _is_task(results: Results) -> bool:
    return bool(results.find("accuracy"))


def _differs(record: Record) -> bool:
    """Whether the interval leaves out 0."""
    return record.low is not None and record.high is not None and not record.low <= 0 <= record.high


def _percent(value: float | None, digits: int = 0) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}%"


def _points(gain: Record) -> str:
    if gain.low is None or gain.high is None:
        return f", of {gain.num_documents} instances: too few for an interval"
    low, high = 100 * gain.low, 100 * gain.high
    if high < 0:
        return f" (95% interval of the rise: {_between(f'{-high:.0f}', f'{-low:.0f}', ' points')})"
    return f" (95% interval of the fall: {_between(f'{low:.0f}', f'{high:.0f}', ' points')})"


def _share(record: Record) -> str:
    if record.low is None or record.high is None:
        return _percent(record.value)
    return f"{_percent(record.value)} ({_between(_percent(record.low), _percent(record.high))})"


def _span(number: Record | Verdict) -> str:
    """Return a number with its interval, its unit right behind the number."""
    unit = "" if number.unit in ("", "1") else f" {number.unit}"
    value = f"{format_number(number.value)}{unit}"
    if number.low is None or number.high is None:
        return value
    return f"{value}, 95% interval {_between(format_number(number.low), format_number(number.high))}"


def _between(low: str, high: str, unit: str = "") -> str:
    """Return the ends of an interval, or the one number that both are written as."""
    return f"{low}{unit} at both ends" if low == high else f"{low} to {high}{unit}"
