"""The paper's claims about the inside of a model (sections 5 and 6), and what decides each: one number, named before.

An endpoint is one number a document, whose mean must lie above the claim's threshold with its whole interval for the
claim to be supported, also after Holm's correction for all of them (of the area between hulls there is an interval
alone, and no p-value to correct). An interval that holds the threshold, or lies below it, does not support the claim;
a claim whose number was not measured is not tested.
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
from metatokens.evaluation.significance import bca_interval, holm, sign_flip_test
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
    opposite: str | None = "the opposite holds"
    """What an interval below 0 means."""


CLAIMS: dict[Endpoint, Claim] = {
    "entropy_drop": Claim(
        "The meta-tokens' embedding lowers the entropy of attention",
        "+1.40 nats",
        "entropy without minus with the meta-tokens' embedding, mean over layers, heads and queries",
        "nats",
    ),
    "max_score_boost": Claim(
        "The meta-tokens' embedding raises the largest logit",
        "+1.26",
        "largest attention score with minus without the embedding; not free of a common shift",
        "logits",
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
        0.99,
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
        "A meta-token's state holds the answer at a lower distortion for equal rate",
        "lower distortion at equal rate",
        "area between the rate-distortion hulls, token right before it (same prefix) minus last meta-token",
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
        endpoints: one number a document, by endpoint.
        chosen: the endpoints that were named before the run.
        seed: of the resamples.
        intervals: endpoints that are no mean over documents, with the number of documents; without a p-value.
    """
    verdicts = []
    for name, claim in CLAIMS.items():
        if name in chosen and name in intervals:
            verdicts.append(_verdict(claim, *intervals[name]))
        else:
            verdicts.append(_judge_documents(claim, endpoints.get(name) if name in chosen else None, seed))
    tested = [index for index, verdict in enumerate(verdicts) if verdict.p_value is not None]
    adjusted = holm([verdicts[index].p_value or 0.0 for index in tested])
    for index, p_value in zip(tested, adjusted.tolist(), strict=True):
        changes: dict[str, object] = {"p_value": p_value}
        if verdicts[index].verdict == "supported" and p_value > LEVEL:
            changes |= {"verdict": "not supported", "note": "not after Holm's correction"}
        verdicts[index] = verdicts[index].model_copy(update=changes)
    return verdicts


def _judge_documents(claim: Claim, documents: Array | None, seed: int) -> Verdict:
    values = np.asarray([] if documents is None else documents, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < MINIMUM_DOCUMENTS:
        return Verdict(
            claim=claim.text,
            paper=claim.paper,
            endpoint=claim.endpoint,
            unit=claim.unit,
            verdict="not tested",
            note="not measured" if documents is None else f"{len(values)} documents are too few for an interval",
        )
    verdict = _verdict(claim, bca_interval(values, seed=seed), len(values))
    return verdict.model_copy(update={"p_value": sign_flip_test(values - claim.threshold, seed=seed)})


def _verdict(claim: Claim, interval: Interval, num_documents: int) -> Verdict:
    assert interval.low is not None
    assert interval.high is not None
    return Verdict(
        claim=claim.text,
        paper=claim.paper,
        endpoint=claim.endpoint,
        unit=claim.unit,
        verdict="supported" if interval.low > claim.threshold else "not supported",
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        num_documents=num_documents,
        note=claim.opposite if interval.high < 0 and not claim.threshold else None,
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
    "area": Decider("area", {"against": "token before it"}),
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
