"""A verdict follows from one number a document, its threshold, and nothing else."""

import numpy as np
import pytest
from metatokens.analysis.recording import Findings, r_squared_statistic

from metatokens.analysis.claims import CLAIMS, judge
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


def verdict_of(claim: str, endpoints: dict[str, np.ndarray]) -> tuple[str, str | None]:
    verdicts = judge(endpoints, tuple(CLAIMS), seed=0)
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


def test_an_area_without_p_values_is_judged_by_its_interval_alone() -> None:
    intervals = {"area": (Interval(0.2, 0.1, 0.3), 8), "prefix_area": (Interval(0.0, -0.1, 0.3), 8)}
    verdicts = judge({}, tuple(CLAIMS), seed=0, intervals=intervals)
    assert [v.verdict for v in verdicts if v.unit == "nats^2"] == ["supported", "inconclusive"]


def test_an_effect_stands_beside_the_paper_s() -> None:
    verdicts = judge({"entropy_drop": RISING, "zero_position": RISING}, tuple(CLAIMS), seed=0)
    shares = {v.claim: v.share_of_paper for v in verdicts if v.num_documents}
    assert shares[CLAIMS["entropy_drop"].text] == pytest.approx(0.2 / 1.40)
    assert shares[CLAIMS["zero_position"].text] is None


def test_what_was_not_measured_or_not_chosen_is_not_tested() -> None:
    assert verdict_of("area", {}) == ("not tested", "not measured")
    chosen = judge({"area": RISING}, ("entropy_drop",), seed=0)
    assert {v.verdict for v in chosen} == {"not tested"}


def test_p_values_are_corrected_together() -> None:
    alone = judge({"area": RISING}, tuple(CLAIMS), seed=0)
    both = judge({"area": RISING, "interaction": RISING}, tuple(CLAIMS), seed=0)
    p_alone, p_both = (next(v.p_value for v in verdicts if v.unit == "nats^2") for verdicts in (alone, both))
    assert p_alone == pytest.approx(2 / 2**12)
    assert p_both == pytest.approx(2 * 2 / 2**12)


def test_records_leave_out_documents_without_the_number_and_say_so() -> None:
    findings = Findings(seed=0)
    findings.add("attention", "entropy_drop", "nats", "A8", [*RISING, np.nan], at={"layer": 0}, test=True)
    findings.add("attention", "entropy_drop", "nats", "A8", RISING - 0.2, at={"layer": 1}, test=True)
    findings.add("attention", "entropy_drop", "nats", "A8", [np.nan] * 12, at={"layer": 2}, test=True)
    findings.add("attention", "entropy_drop", "nats", "A8", RISING[:3], at={"layer": 3})
    findings.add_ratio("theory", "share_above", "1", "theory", RISING, RISING * 4)
    findings.add_accuracy("accuracy", "C1", np.ones(12))
    first, second, empty, few, ratio, accuracy = findings.finished_records()
    assert first.num_documents == 12
    assert first.value == pytest.approx(RISING.mean())
    assert first.adjusted_p == pytest.approx(2 * first.p_value)  # type: ignore[operator]
    assert second.adjusted_p == second.p_value
    assert (empty.value, empty.low, empty.note) == (None, None, "no document has it")
    assert few.low is None
    assert few.note == "fewer than 8 documents: no interval"
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.25, 0.25, 0.25))
    assert accuracy.high == 1.0
    assert accuracy.low == pytest.approx(12 / (12 + 1.959964**2))  # Wilson


def test_r_squared_is_that_of_all_rows_together() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    y = generator.normal(size=(5, 40)) + 3
    m = y + generator.normal(size=(5, 40)) * 0.3
    columns = np.stack([np.full(5, 40.0), y.sum(1), (y**2).sum(1), ((y - m) ** 2).sum(1)], axis=1)
    expected = 1 - ((y - m) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert r_squared_statistic(columns) == pytest.approx(expected)
