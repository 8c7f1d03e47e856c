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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metatokens.analysis.measures import Coordinates, Row
from metatokens.analysis.results import Verdict
from metatokens.config.analysis import MINIMUM_DOCUMENTS, Endpoint
from metatokens.evaluation.significance import bca_interval, holm, least_units, sign_flip_test
from metatokens.evaluation.statistics import Interval

Array = npt.NDArray[np.float64]
LEVEL = 0.05
"""Of the corrected p-values."""


@dataclass(frozen=True)
class Claim:
    """What the paper says, and the number that decides."""

    text: str
    paper: str
    endpoint: str
    unit: str
    threshold: float = 0.0
    """What the interval must lie above."""
    paper_value: float | None = None
    """The paper's own number for the same quantity, in the same unit."""
    opposite: str | None = None
    """What an interval below the threshold means, where that needs words."""


CLAIMS: dict[Endpoint, Claim] = {
    "entropy_drop": Claim(
        "The meta-tokens' embedding lowers the entropy of attention",
        "+1.40 nats",
        "entropy without minus with the meta-tokens' embedding, mean over layers, heads and queries",
        "nats",
        paper_value=1.40,
    ),
    "max_score_boost": Claim(
        "The meta-tokens' embedding raises the largest logit",
        "+1.26",
        "largest attention score with minus without the embedding; not free of a common shift",
        "logits",
        paper_value=1.26,
    ),
    "log_odds_boost": Claim(
        "The meta-tokens' embedding draws attention to them",
        "implied by the boost",
        "log-odds of the mass on meta keys, with minus without the embedding; free of a common shift",
        "nats",
    ),
    "theorem": Claim(
        "A boost of a meta key lowers the entropy of its row, for every row (Theorem 4.1)",
        "for every row",
        "share of boosted edges whose boost alone lowers the entropy, mean over documents, above 0.99",
        "1",
        threshold=0.99,
        opposite="not for every row",
    ),
    "excess_cosine": Claim(
        "The state of a meta-token resembles the text right before it",
        "spikes on near context",
        "centred cosine at distance 1 minus that of ordinary tokens at the same places, mean over layers",
        "1",
    ),
    "fading_cosine": Claim(
        "That resemblance fades with distance",
        "fades with distance",
        "centred cosine of meta-tokens at distance 1 minus that at the largest distance, mean over layers",
        "1",
    ),
    "area": Claim(
        "A meta-token's state holds the answer at a lower distortion for equal rate than the last token's",
        "lower distortion at equal rate",
        "area between the rate-distortion hulls, last token minus last meta-token: the paper's comparison",
        "nats^2",
    ),
    "prefix_area": Claim(
        "It does so against the token right before it, which has read the same prefix",
        "not compared",
        "area between the rate-distortion hulls, token right before it minus last meta-token",
        "nats^2",
    ),
    "interaction": Claim(
        "Meta-tokens hold a second copy of what stands before them",
        "implicit caching",
        "by how much more cutting the meta path costs once the direct path is cut (path blocking, from layer 0); 0 "
        "where one path does it all",
        "logits",
        opposite="both paths are needed together, or one cut alone leaves nothing",
    ),
    "meta_path": Claim(
        "The answer passes through meta-tokens where it cannot be read directly",
        "implicit caching",
        "logit difference with the direct path cut minus that with the meta path cut as well",
        "logits",
    ),
    "eviction": Claim(
        "Meta-tokens are worth keeping in the key-value cache, more than evenly spaced tokens",
        "compression",
        "cost of keeping evenly spaced columns minus that of keeping meta-tokens, smallest budget",
        "nats/token",
        opposite="evenly spaced columns are better",
    ),
    "zero_position": Claim(
        "Zeroing the position at meta-tokens helps recall",
        "0.0-44.4 -> 22.2-66.7% with RoPE",
        "accuracy with the position zeroed minus in full",
        "1",
    ),
    "zero_embedding": Claim(
        "Zeroing the embedding of meta-tokens hurts recall",
        "falls on almost every task",
        "accuracy in full minus with the embedding zeroed",
        "1",
    ),
}


def judge(
    endpoints: Mapping[str, Array],
    chosen: Sequence[Endpoint],
    *,
    seed: int,
    intervals: Mapping[str, tuple[Interval, int]] = MappingProxyType({}),
) -> list[Verdict]:
    """Return a verdict on every claim; p-values are corrected together (Holm).

    Args:
        endpoints: one number a document, by endpoint; what is not finite is left out.
        chosen: the endpoints that were named before the run.
        seed: of the resamples.
        intervals: endpoints that are no mean over documents, with the number of documents; without a p-value.
    """
    measured = []
    for name, claim in CLAIMS.items():
        if name in chosen and name in intervals:
            measured.append(_measured(claim, *intervals[name]))
        else:
            measured.append(_measure_documents(claim, endpoints.get(name) if name in chosen else None, seed))
    tested = [index for index, one in enumerate(measured) if one.p_value is not None]
    adjusted = holm([measured[index].p_value or 0.0 for index in tested])
    for index, p_value in zip(tested, adjusted.tolist(), strict=True):
        measured[index] = measured[index].model_copy(update={"p_value": p_value})
    return decide(measured)


def decide(measured: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts that follow from the numbers of all claims, in the order of `CLAIMS`.

    Args:
        measured: value, interval, number of documents and corrected p-value of each; their verdicts do not matter.
    """
    num_tested = sum(one.num_documents > 0 and (one.low is None or one.p_value is not None) for one in measured)
    least = max(MINIMUM_DOCUMENTS, least_units(num_tested, LEVEL))
    return [_decide(claim, one, least) for claim, one in zip(CLAIMS.values(), measured, strict=True)]


def _decide(claim: Claim, measured: Verdict, least_documents: int) -> Verdict:
    count, note = measured.num_documents, None
    passes = measured.low is not None and (measured.p_value is None or measured.p_value <= LEVEL)
    if not count:
        verdict, note = "not tested", "not measured"
    elif passes and measured.low is not None and measured.low > claim.threshold:
        verdict = "supported"
    elif passes and measured.high is not None and measured.high < claim.threshold:
        verdict, note = "the opposite holds", claim.opposite
    elif count < least_documents and (measured.low is None or measured.p_value is not None):
        verdict, note = "too few documents", f"{count}, at least {least_documents} needed"
    else:
        verdict = "inconclusive"
    share = None if measured.value is None or claim.paper_value is None else measured.value / claim.paper_value
    return measured.model_copy(update={"verdict": verdict, "note": note, "share_of_paper": share})


def _measure_documents(claim: Claim, documents: Array | None, seed: int) -> Verdict:
    values = np.asarray([] if documents is None else documents, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < MINIMUM_DOCUMENTS:
        estimate = float(values.mean()) if len(values) else None
        return _measured(claim, Interval(estimate, None, None) if estimate is not None else None, len(values))
    found = _measured(claim, bca_interval(values, seed=seed), len(values))
    return found.model_copy(update={"p_value": sign_flip_test(values - claim.threshold, seed=seed)})


def _measured(claim: Claim, interval: Interval | None, num_documents: int) -> Verdict:
    return Verdict(
        claim=claim.text,
        paper=claim.paper,
        endpoint=claim.endpoint,
        unit=claim.unit,
        verdict="not tested",
        value=None if interval is None else interval.estimate,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        num_documents=num_documents,
    )


# What decides ----------------------------------------------------------------------------------------------------


class Decider(NamedTuple):
    """Where the number that decides a claim stands among the rows of a measure."""

    measure: str
    at: Coordinates = MappingProxyType({})
    sign: int = 1


DECIDERS: dict[Endpoint, Decider] = {
    "entropy_drop": Decider("entropy_drop"),
    "max_score_boost": Decider("max_score_boost"),
    "log_odds_boost": Decider("log_odds_boost"),
    "theorem": Decider("share_beyond"),
    "excess_cosine": Decider("near_excess_cosine"),
    "fading_cosine": Decider("fading_cosine"),
    "area": Decider("area", {"against": "last token"}),
    "prefix_area": Decider("area", {"against": "token before it"}),
    "interaction": Decider("interaction"),
    "meta_path": Decider("meta_path"),
    "eviction": Decider("worth_of_meta_columns"),
    "zero_position": Decider("accuracy_change", {"intervention": "zero_position"}),
    "zero_embedding": Decider("accuracy_change", {"intervention": "zero_embedding"}, sign=-1),
}


def judge_rows(found: Mapping[str, Sequence[Row]], chosen: Sequence[Endpoint], *, seed: int) -> list[Verdict]:
    """Return a verdict on every claim from the rows of all measures; see `judge`.

    A ratio decides by its mean over documents, each with its own ratio.
    """
    endpoints: dict[str, Array] = {}
    intervals: dict[str, tuple[Interval, int]] = {}
    for name, decider in DECIDERS.items():
        for row in found.get(decider.measure, ()):
            if dict(row.at) != dict(decider.at):
                continue
            if isinstance(row.values, Interval):
                intervals[name] = row.values, row.num_documents or 0
                continue
            values = np.asarray(row.values, dtype=np.float64)
            if values.ndim > 1:
                above, below = values.T
                values = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
            endpoints[name] = decider.sign * values
    return judge(endpoints, chosen, seed=seed, intervals=intervals)
