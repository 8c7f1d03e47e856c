"""A finding says what the numbers bear, and that they cannot tell where they do not."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from metatokens.analysis.claims import CLAIMS
from metatokens.analysis.results import Record, Results
from metatokens.report.analysis_figures import FIGURES, HAND_OVER
from metatokens.report.comparison import arms_of, render_comparison
from metatokens.report.findings import cut_path, findings_of, hand_over, zeroed_embedding
from metatokens.report.glossary import explain
from metatokens.report.opening import opening_of, opening_view
from metatokens.report.standalone import interchange_svg
from synthetic_results import HOSTILE, build_results


def record(measure: str, value: float, low: float | None, high: float | None, **at: Any) -> Record:
    return Record(measure=measure, unit="1", at=at, value=value, low=low, high=high, num_documents=64)


def results_of(*records: Record, name: str = "arm/seed-0", **checkpoint: Any) -> Results:
    given, _ = build_results()
    named = {"name": name, "sha256": name, "layers": 2} | checkpoint
    return given.model_copy(update={"records": records, "token_views": (), "checkpoint": named})


def zeroed(low: float | None, high: float | None) -> Results:
    return results_of(
        record("accuracy", 0.9, 0.8, 0.95, intervention="none"),
        record("accuracy", 0.3, 0.2, 0.4, intervention="zero_embedding"),
        record("accuracy_gain", 0.6, low, high, intervention="zero_embedding"),
    )


def carried(value: float, low: float, high: float) -> Results:
    at = {"direction": "denoise", "window": 1, "where": "meta-tokens"}
    return results_of(
        record("interchange_effect", 0.0, 0.0, 0.0, layer=0, **at),
        record("interchange_effect", value, low, high, layer=1, **at),
    )


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.5, 0.7, "takes accuracy from 90% to 30% (95% interval of the fall: 50 to 70 points)"),
        (-0.7, -0.5, "(95% interval of the rise: 50 to 70 points)"),
        (1.0, 1.0, "(95% interval of the fall: 100 points at both ends)"),
        (-0.1, 0.7, "Cannot tell"),
        (None, None, "Cannot tell"),
    ],
)
def test_a_change_is_stated_only_where_its_interval_leaves_out_zero(
    low: float | None, high: float | None, says: str
) -> None:
    finding = zeroed_embedding(zeroed(low, high))
    assert finding is not None
    assert says in finding.text


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        ((0.03, 0.02, 0.04), "lowers the loss of text (saved: 0.030, 95% interval 0.020 to 0.040)"),
        ((-0.03, -0.04, -0.02), "raises the loss"),
        ((0.03, -0.01, 0.07), "Cannot tell"),
    ],
)
def test_a_graft_s_finding_is_what_its_anchors_save(gain: tuple[float, float, float], says: str) -> None:
    (finding,) = findings_of(results_of(record("anchor_gain", *gain, intervention="path cut")))
    assert says in finding.text
    assert finding.anchor == "graft"


def test_a_figure_speaks_of_the_line_of_chance_only_where_it_is_drawn() -> None:
    figure = next(one for one in FIGURES if one.id == "accuracy")
    accuracy, chance = record("accuracy", 0.9, 0.8, 0.95, intervention="none"), record("chance", 0.5, None, None)
    assert "Dashed" not in figure.text_for(results_of(accuracy))
    assert "Dashed: chance." in figure.text_for(results_of(accuracy, chance))


@pytest.mark.parametrize(
    ("effect", "says"),
    [
        ((0.99, 0.95, 1.0), "before layer 1, the meta-tokens' states alone carry 99% (95% to 100%)"),
        ((0.01, 0.0, 0.02), "In no layer do the meta-tokens' states carry more than 2.0%"),
        ((1e-5, 0.0, 2e-4), "In no layer do the meta-tokens' states carry even 0.1% of the answer"),
        ((0.3, 0.2, 0.4), "carry part of the answer"),
        ((0.3, -0.1, 0.7), "Cannot tell"),
    ],
)
def test_states_carry_the_answer_as_far_as_their_interval_says(effect: tuple[float, float, float], says: str) -> None:
    finding = hand_over(carried(*effect))
    assert finding is not None
    assert says in finding.text


@pytest.mark.parametrize(("high", "says"), [(3.0, "costs the answer"), (4.5, "no cost that these pairs could show")])
def test_a_cut_path_costs_only_where_the_intervals_are_apart(high: float, says: str) -> None:
    cut = record("logit_difference", 2.0, 1.0, high, condition="meta cut")
    finding = cut_path(results_of(record("logit_difference", 5.0, 4.0, 6.0, condition="full"), cut))
    assert finding is not None
    assert says in finding.text


def test_results_without_numbers_have_no_finding() -> None:
    assert findings_of(results_of().model_copy(update={"verdicts": ()})) == []


def test_seeds_are_one_arm_and_other_architectures_are_not() -> None:
    seeds = [results_of(name=f"arm/seed-{seed}") for seed in range(2)]
    wider = results_of(name="arm/seed-0", layers=4)
    arms = arms_of([*seeds, wider])
    assert [len(members) for members in arms.values()] == [2, 1]


def test_every_analysis_of_a_comparison_is_a_dot_of_its_claim() -> None:
    given, _ = build_results()
    claim = given.verdicts[0].model_copy(update={"claim": CLAIMS["entropy_drop"].text})
    seeds = [results_of(name=f"arm/seed-{seed}").model_copy(update={"verdicts": (claim,)}) for seed in range(3)]
    page = render_comparison(seeds)
    assert page.count("<figure ") == 1
    assert page.count("data-tip=") == len(seeds)


def test_a_term_explains_itself_once_and_text_stays_text() -> None:
    markup = str(explain(f"meta-tokens and a meta-token {HOSTILE}"))
    assert markup.count("<dfn") == 1
    assert HOSTILE not in markup


def test_the_token_view_opens_where_the_query_reads_most_from_meta_tokens() -> None:
    results, arrays = build_results()
    assert opening_view(results.token_views) == 0
    view = results.token_views[0]
    opened = opening_of(view, arrays)
    weights = arrays[view.arrays["attention"]][:, :, -1, list(view.is_meta)].astype(float) ** 2
    mass = weights.sum(-1)
    assert opened["query"] == len(view.tokens) - 1
    assert mass[opened["layer"], int(opened["head"])] == mass.max()


def test_the_figure_of_the_readme_names_its_model_and_both_schemes() -> None:
    svg = interchange_svg(build_results()[0])
    assert "Model: synthetic" in svg
    assert "prefers-color-scheme: dark" in svg


def test_the_figure_of_the_readme_says_what_the_page_says() -> None:
    drawn = ET.parse(Path(__file__).parents[3] / "docs/interchange.svg")
    assert HAND_OVER.text in " ".join(str(one.text) for one in drawn.iter("{http://www.w3.org/2000/svg}text"))
