"""A verdict follows from one number a document, its threshold, and nothing else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from metatokens.analysis.claims import CLAIMS, judge
from metatokens.analysis.measures import Row
from metatokens.analysis.results import Verdict
from metatokens.analysis.run import MEASURES
from metatokens.evaluation.statistics import Interval

RISING = np.linspace(0.1, 0.3, 12)
OTHERS = (
    "max_score_boost",
    "log_odds_boost",
    "excess_cosine",
    "fading_cosine",
    "interaction",
    "meta_path",
    "eviction",
)


def judged(endpoints: dict[str, Any], chosen: Sequence[Any] = tuple(CLAIMS)) -> list[Verdict]:
    """Return the verdicts on numbers of documents, or intervals, which decide the claims of these names."""
    rows: dict[str, list[Row]] = {}
    for name, values in endpoints.items():
        claim = CLAIMS[name]  # type: ignore[index]
        elsewhere = Row({**claim.at, "layer": 0}, np.full(12, 99.0))
        rows.setdefault(claim.measure, []).extend([elsewhere, Row(claim.at, values, num_documents=8)])
    return judge(rows, chosen, seed=0)


def verdict_of(claim: str, endpoints: dict[str, np.ndarray]) -> tuple[str, str | None]:
    verdicts = judged(endpoints)
    assert [v.claim for v in verdicts] == [c.text for c in CLAIMS.values()]
    found = next(v for v in verdicts if v.claim == CLAIMS[claim].text)  # type: ignore[index]
    return found.verdict, found.note


def test_an_interval_above_the_threshold_supports_a_claim() -> None:
    assert verdict_of("entropy_drop", {"entropy_drop": RISING}) == ("supported", None)
    assert verdict_of("theorem", {"theorem": np.full(12, 1.0)}) == ("supported", None)


def test_an_interval_below_it_says_that_the_opposite_holds() -> None:
    assert verdict_of("area", {"area": -RISING}) == ("the opposite holds", None)
    assert verdict_of("theorem", {"theorem": RISING}) == ("the opposite holds", "not for every row")


def test_an_interval_around_it_shows_nothing() -> None:
    assert verdict_of("area", {"area": RISING - 0.2}) == ("inconclusive", None)


def test_a_p_value_that_fails_the_correction_shows_nothing() -> None:
    eleven_of_twelve = {"entropy_drop": np.array([-0.29, *RISING[1:]])}
    alone = verdict_of("entropy_drop", eleven_of_twelve)
    among_others = verdict_of("entropy_drop", eleven_of_twelve | dict.fromkeys(OTHERS, RISING - 0.2))
    assert alone == ("supported", None)
    assert among_others == ("inconclusive", None)


def test_eight_documents_are_too_few_for_eight_claims() -> None:
    eight = dict.fromkeys(["entropy_drop", *OTHERS], np.linspace(0.1, 0.3, 8))
    assert verdict_of("entropy_drop", eight) == ("too few documents", "8, at least 9 needed")
    nine = dict.fromkeys(["entropy_drop", *OTHERS], np.linspace(0.1, 0.3, 9))
    assert verdict_of("entropy_drop", nine) == ("supported", None)


def test_documents_that_give_no_interval_are_too_few() -> None:
    few = verdict_of("area", {"area": np.append(RISING[:5], np.nan)})
    assert few == ("too few documents", "5, at least 8 needed")


@pytest.mark.parametrize("area", [Interval(np.nan, 0.1, 0.3), Interval(np.nan, np.nan, np.nan)])
def test_an_area_that_is_not_finite_decides_nothing(area: Interval) -> None:
    assert verdict_of("area", {"area": area}) == ("not tested", "not measured")  # type: ignore[dict-item]
    unbounded = Interval(0.2, 0.1, np.inf)
    assert verdict_of("area", {"area": unbounded})[0] != "supported"  # type: ignore[dict-item]


def test_an_area_without_p_values_is_judged_by_its_interval_alone() -> None:
    intervals = {"area": Interval(0.2, 0.1, 0.3), "prefix_area": Interval(0.0, -0.1, 0.3)}
    verdicts = judged(intervals)
    assert [v.verdict for v in verdicts if v.unit == "nats²"] == ["supported", "inconclusive"]


def test_an_effect_stands_beside_the_paper_s() -> None:
    verdicts = judged({"entropy_drop": RISING, "zero_position": RISING})
    shares = {v.claim: v.share_of_paper for v in verdicts if v.num_documents}
    assert shares[CLAIMS["entropy_drop"].text] == pytest.approx(0.2 / 1.40)
    assert shares[CLAIMS["zero_position"].text] is None


def test_what_was_not_measured_or_not_chosen_is_not_tested() -> None:
    assert verdict_of("area", {}) == ("not tested", "not measured")
    chosen = judged({"area": RISING}, ("entropy_drop",))
    assert {v.verdict for v in chosen} == {"not tested"}


def test_p_values_are_corrected_together() -> None:
    alone = judged({"area": RISING})
    both = judged({"area": RISING, "interaction": RISING})
    p_alone, p_both = (next(v.p_value for v in verdicts if v.unit == "nats²") for verdicts in (alone, both))
    assert p_alone == pytest.approx(2 / 2**12)
    assert p_both == pytest.approx(2 * 2 / 2**12)


@pytest.mark.parametrize(("direct_cut", "says"), [(0.1, "both paths are needed together"), (4.99, None)])
def test_paths_are_said_to_need_one_another_only_where_each_cut_costs(direct_cut: float, says: str | None) -> None:
    left = {"full": 5.0, "direct cut": direct_cut, "meta cut": 3.0}
    rows = [Row({"condition": name}, np.full(12, value)) for name, value in left.items()]
    found = {"interaction": [Row({}, -3 * RISING)], "logit_difference": rows}
    (verdict,) = [one for one in judge(found, tuple(CLAIMS), seed=0) if one.num_documents]
    assert verdict.verdict == "the opposite holds"
    assert (verdict.note or "").startswith(says) if says else verdict.note is None


def test_every_claim_is_decided_by_a_measure_that_there_is() -> None:
    for claim in CLAIMS.values():
        assert set(claim.at) <= set(MEASURES[claim.measure].axes)
        assert claim.unit == MEASURES[claim.measure].unit


def test_a_claim_that_meta_tokens_cost_accuracy_turns_the_sign_of_what_they_bring() -> None:
    assert verdict_of("zero_embedding", {"zero_embedding": RISING}) == ("supported", None)
    assert verdict_of("zero_position", {"zero_position": RISING}) == ("the opposite holds", None)
    assert verdict_of("zero_position", {"zero_position": -RISING}) == ("supported", None)


def test_a_ratio_decides_by_the_mean_of_the_documents_own_ratios() -> None:
    pairs = np.stack([RISING, np.ones(12)], axis=1)
    pairs[0] = 0, 0  # a document without an edge has no share
    (theorem,) = [v for v in judged({"theorem": pairs}) if v.num_documents]
    assert (theorem.num_documents, theorem.value) == (11, pytest.approx(RISING[1:].mean()))
    assert theorem.verdict == "the opposite holds"


@pytest.mark.parametrize(("claim", "measure"), [("meta_path", "meta_path"), ("interaction", "interaction")])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_effect_that_is_next_to_nothing_of_the_answer_is_called_negligible(
    claim: Any, measure: str, sign: int
) -> None:
    def note(whole: float) -> str | None:
        rows = {
            measure: [Row(CLAIMS[claim].at, sign * RISING)],  # 0.2 in the mean
            "logit_difference": [Row({"condition": "full"}, np.full(12, whole))],
        }
        (found,) = (one for one in judge(rows, tuple(CLAIMS), seed=0) if one.claim == CLAIMS[claim].text)
        assert found.verdict == ("supported" if sign > 0 else "the opposite holds")
        return found.note

    assert note(10.0) == "but negligible: 2.00% of the answer's logit difference"
    assert "negligible" not in (note(3.0) or "")
