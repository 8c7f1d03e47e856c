"""The paper's claims about the inside of a model (sections 5 and 6), and what decides each: one number, named before.

An endpoint is one number a document. Its mean is judged by its interval and by a sign-flip test against the claim's
threshold, corrected for all claims that are tested (Holm):

    supported             the interval lies above the threshold, and the corrected p-value is at most the level
    the opposite holds    it lies below, with such a p-value
    too few documents     neither, and with so few documents no p-value could have passed the correction for all
    inconclusive          neither, with enough documents: nothing is shown in either direction
    not tested            the number was not measured, or not chosen

Of an area between hulls there is an interval alone, and no p-value to correct.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from metatokens.analysis.measures import Coordinates, Row, finite_interval
from metatokens.analysis.results import Verdict
from metatokens.config.analysis import MINIMUM_DOCUMENTS, Endpoint
from metatokens.evaluation.significance import bca_interval, holm, least_units, sign_flip_test
from metatokens.evaluation.statistics import Interval

LEVEL = 0.05
"""Of the corrected p-values."""
NEGLIGIBLE = 0.05
"""Share of a whole below which an effect is said to be none."""

Found = Mapping[str, Sequence[Row]]
"""The rows of each measure, by its name."""


def _logit_differences(found: Found) -> dict[str, float]:
    """Return the mean logit difference under each condition of path blocking."""
    return {
        str(row.at["condition"]): float(np.asarray(row.values, dtype=np.float64).mean())
        for row in found.get("logit_difference", ())
        if not isinstance(row.values, Interval)
    }


def _both_cuts_cost(found: Found) -> bool:
    """Whether the direct path and the meta path, each cut alone, cost more than next to nothing of the answer."""
    left = _logit_differences(found)
    whole = left.get("full", np.nan)
    return all(left.get(cut, np.nan) < (1 - NEGLIGIBLE) * whole for cut in ("direct cut", "meta cut"))


def _share_of_answer(found: Found, value: float) -> float | None:
    """Return a difference of logits as a share of the answer's whole logit difference, if that was measured."""
    whole = _logit_differences(found).get("full", 0.0)
    return value / whole if whole > 0 else None


class Claim(NamedTuple):
    """What the paper says, and the number that decides: that of one measure at some coordinates."""

    text: str
    paper: str
    endpoint: str
    """The number in words."""
    unit: str
    measure: str
    at: Coordinates = MappingProxyType({})
    sign: int = 1
    """What the number is multiplied by, so that above the threshold means that the claim holds."""
    threshold: float = 0.0
    """What the interval must lie above."""
    paper_value: float | None = None
    """The paper's own number for the same quantity, in the same unit."""
    opposite: str | None = None
    """What an interval below the threshold means, where that needs words."""
    opposite_if: Callable[[Found], bool] = lambda _: True
    """Whether these words are true of what was found."""
    share: Callable[[Found, float], float | None] = lambda _found, _value: None
    """The number as a share of the whole that it is a part of, where there is one."""


CLAIMS: dict[Endpoint, Claim] = {
    "entropy_drop": Claim(
        "The meta-tokens' embedding lowers the entropy of attention",
        "+1.40 nats",
        "entropy without minus with the meta-tokens' embedding, mean over layers, heads and queries",
        "nats",
        "sharpening",
        paper_value=1.40,
    ),
    "max_score_boost": Claim(
        "The meta-tokens' embedding raises the largest logit",
        "+1.26",
        "largest attention score with minus without the embedding; not free of a common shift",
        "logits",
        "max_score_boost",
        paper_value=1.26,
    ),
    "log_odds_boost": Claim(
        "The meta-tokens' embedding draws attention to them",
        "implied by the boost",
        "log-odds of the mass on meta keys, with minus without the embedding; free of a common shift",
        "nats",
        "log_odds_boost",
    ),
    "theorem": Claim(
        "A boost of a meta key lowers the entropy of its row, for every row (Theorem 4.1)",
        "for every row",
        "share of boosted edges whose boost alone lowers the entropy, mean over documents, above 0.99",
        "1",
        "share_beyond",
        threshold=0.99,
        opposite="not for every row",
    ),
    "excess_cosine": Claim(
        "The state of a meta-token resembles the text right before it",
        "spikes on near context",
        "centred cosine at distance 1 minus that of ordinary tokens at the same places, mean over layers",
        "1",
        "near_excess_cosine",
    ),
    "fading_cosine": Claim(
        "The resemblance of a meta-token's state to earlier text fades with distance",
        "fades with distance",
        "centred cosine of meta-tokens at distance 1 minus that at the largest distance, mean over layers",
        "1",
        "fading_cosine",
    ),
    "area": Claim(
        "A meta-token's state holds the answer at a lower distortion for equal rate than the last token's",
        "lower distortion at equal rate",
        "area between the rate-distortion hulls, last token minus last meta-token: the paper's comparison",
        "nats²",
        "area",
        at={"against": "last token"},
    ),
    "prefix_area": Claim(
        "A meta-token's state holds the answer at a lower distortion for equal rate than that of the "
        "token right before it",
        "not compared",
        "area between the rate-distortion hulls, token right before it minus last meta-token",
        "nats²",
        "area",
        at={"against": "token before it"},
    ),
    "interaction": Claim(
        "Meta-tokens hold a second copy of what stands before them",
        "implicit caching",
        "by how much more cutting the meta path costs once the direct path is cut (path blocking, from layer 0); 0 "
        "where one path does it all",
        "logits",
        "interaction",
        opposite="both paths are needed together, or one cut alone leaves nothing",
        opposite_if=_both_cuts_cost,
        share=_share_of_answer,
    ),
    "meta_path": Claim(
        "The answer passes through meta-tokens where it cannot be read directly",
        "implicit caching",
        "logit difference with the direct path cut minus that with the meta path cut as well",
        "logits",
        "meta_path",
        share=_share_of_answer,
    ),
    "eviction": Claim(
        "Meta-tokens are worth keeping in the key-value cache, more than evenly spaced tokens",
        "compression",
        "cost of keeping evenly spaced columns minus that of keeping meta-tokens, smallest budget",
        "nats/token",
        "worth_of_meta_columns",
        opposite="evenly spaced columns are better",
    ),
    "zero_position": Claim(
        "Zeroing the position at meta-tokens helps recall",
        "0.0-44.4 -> 22.2-66.7% with RoPE",
        "accuracy with the position zeroed minus in full",
        "1",
        "accuracy_gain",
        at={"intervention": "zero_position"},
        sign=-1,
    ),
    "zero_embedding": Claim(
        "Zeroing the embedding of meta-tokens hurts recall",
        "falls on almost every task",
        "accuracy in full minus with the embedding zeroed",
        "1",
        "accuracy_gain",
        at={"intervention": "zero_embedding"},
    ),
}


def judge(found: Found, chosen: Sequence[Endpoint], *, seed: int) -> list[Verdict]:
    """Return a verdict on every claim from the rows of all measures; p-values are corrected together (Holm).

    Args:
        found: the rows of each measure, by its name. What is not finite is left out, a ratio decides by its mean over
            documents, each with its own ratio, and an area between hulls by its interval, without a p-value.
        chosen: the endpoints that were named before the run.
        seed: of the resamples.
    """
    measured = [_measure(claim, found if name in chosen else {}, seed) for name, claim in CLAIMS.items()]
    tested = [index for index, one in enumerate(measured) if one.p_value is not None]
    adjusted = holm([measured[index].p_value or 0.0 for index in tested])
    for index, p_value in zip(tested, adjusted.tolist(), strict=True):
        measured[index] = measured[index].model_copy(update={"p_value": p_value})
    return decide(measured, found)


def decide(measured: Sequence[Verdict], found: Found) -> list[Verdict]:
    """Return the verdicts that follow from the numbers of all claims, in the order of `CLAIMS`.

    Args:
        measured: value, interval, number of documents and corrected p-value of each; their verdicts do not matter.
        found: the rows of each measure, which say whether a note fits.
    """
    num_tested = sum(one.num_documents > 0 and (one.low is None or one.p_value is not None) for one in measured)
    least = max(MINIMUM_DOCUMENTS, least_units(num_tested, LEVEL))
    return [_decide(claim, one, least, found) for claim, one in zip(CLAIMS.values(), measured, strict=True)]


def _decide(claim: Claim, measured: Verdict, least_documents: int, found: Found) -> Verdict:
    count, note = measured.num_documents, None
    passes = measured.low is not None and (measured.p_value is None or measured.p_value <= LEVEL)
    if not count:
        verdict, note = "not tested", "not measured"
    elif passes and measured.low is not None and measured.low > claim.threshold:
        verdict = "supported"
    elif passes and measured.high is not None and measured.high < claim.threshold:
        verdict, note = "the opposite holds", claim.opposite if claim.opposite_if(found) else None
    elif count < least_documents and (measured.low is None or measured.p_value is not None):
        verdict, note = "too few documents", f"{count}, at least {least_documents} needed"
    else:
        verdict = "inconclusive"
    part = None if measured.value is None else claim.share(found, measured.value)
    if verdict in ("supported", "the opposite holds") and part is not None and abs(part) < NEGLIGIBLE:
        small = f"but negligible: {abs(part):.2%} of the answer's logit difference"
        note = f"{note}; {small}" if note else small
    share = None if measured.value is None or claim.paper_value is None else measured.value / claim.paper_value
    return measured.model_copy(update={"verdict": verdict, "note": note, "share_of_paper": share})


def _measure(claim: Claim, found: Mapping[str, Sequence[Row]], seed: int) -> Verdict:
    """Return the number that decides, without a verdict."""
    row = next((row for row in found.get(claim.measure, ()) if dict(row.at) == dict(claim.at)), Row({}, ()))
    interval: Interval | None = None
    p_value: float | None = None
    if isinstance(row.values, Interval):
        interval, count = finite_interval(row.values), row.num_documents or 0
    else:
        values = np.asarray(row.values, dtype=np.float64)
        if values.ndim > 1:
            above, below = values.T
            values = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
        values = claim.sign * values[np.isfinite(values)]
        count = len(values)
        if count >= MINIMUM_DOCUMENTS:
            interval = bca_interval(values, seed=seed)
            p_value = sign_flip_test(values - claim.threshold, seed=seed)
        elif count:
            interval = Interval(float(values.mean()), None, None)
    return Verdict(
        claim=claim.text,
        paper=claim.paper,
        endpoint=claim.endpoint,
        unit=claim.unit,
        verdict="not tested",
        value=interval and interval.estimate,
        low=interval and interval.low,
        high=interval and interval.high,
        num_documents=count if interval else 0,
        p_value=p_value,
    )
