"""What a terminal shows: an effect beside the paper's, and no interval over too few trainings."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from metatokens.errors import UsageError
from metatokens.evaluation.statistics import Interval
from metatokens.report import require_packages
from metatokens.report.console import show_perplexity, show_recall, show_table, show_verdicts
from metatokens.report.numbers import format_value
from synthetic_results import build_results, record


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def recall(*models: tuple[float, ...], interventions: tuple[str, ...] = ()) -> SimpleNamespace:
    accuracy = Interval(sum(map(sum, models)) / sum(map(len, models)), 0.25, 0.85)
    outcomes = {"token_outcomes": models, "sequence_outcomes": models}
    row = SimpleNamespace(
        task="copying", length="1-32", chance=0.023, token_accuracy=accuracy, sequence_accuracy=accuracy, **outcomes
    )
    row.prompt_tokens = (1, 32)
    row.interventions = interventions
    return SimpleNamespace(rows=[row])


def test_a_verdict_stands_beside_the_number_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    show_verdicts(build_results()[0])
    text = capsys.readouterr().out
    assert "0.200 (0.100 to 0.300) nats, 14% of the paper's" in text
    assert "inconclusive" in text


def test_of_a_graft_it_is_shown_what_its_anchors_are_worth(capsys: pytest.CaptureFixture[str]) -> None:
    gain = record("anchor_gain", 0.25, intervention="path cut")
    by_layer = record("readout_loss", 3.5, layer=1, intervention="none")
    show_verdicts(build_results()[0].model_copy(update={"verdicts": (), "records": (gain, by_layer)}))
    text = capsys.readouterr().out
    assert re.search(r"anchor gain +│ path cut +│ 0\.250 \(0\.175 to 0\.325\) nats/token", text), text
    assert "3.5" not in text
    assert "claim" not in text


def test_two_models_are_listed_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    show_recall(recall((1, 1, 0, 1), (0, 1, 0, 0)))
    text = capsys.readouterr().out
    assert "50.0% (75.0% / 25.0%)" in text
    assert "guessing whole answers" in text
    assert "2.3%" in text
    assert "85" not in text
    assert "copying, accuracy" in text
    show_recall(recall((1, 0), interventions=("zero_embedding", "no_meta_attention")))
    assert "copying with zero_embedding and no_meta_attention, accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 5])
def test_one_model_and_five_have_an_interval(capsys: pytest.CaptureFixture[str], number: int) -> None:
    show_recall(recall(*[(1, 0)] * number))
    assert "50.0% (25.0% to 85.0%)" in capsys.readouterr().out


def test_an_interval_stands_on_one_line_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report = recall((1, 1))
    report.rows[0].length, report.rows[0].prompt_tokens = "extra-hard", (513, 1024)
    report.rows[0].token_accuracy = Interval(1.0, 1.0, 1.0)
    report.rows[0].sequence_accuracy = Interval(1.0, 1.0, 1.0)
    show_recall(report)
    text = capsys.readouterr().out
    assert "copying, accuracy (95% interval)" in text
    (row,) = [line for line in text.splitlines() if "513-1024" in line]  # which says more than the name of a bin
    assert row.count("100.0% (100.0% to 100.0%)") == 2
    assert len(row) <= 80


def test_a_large_perplexity_is_written_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    scores = SimpleNamespace(perplexity=Interval(2311.4, None, None), nats_per_token=Interval(7.745, 7.7, 7.8))
    scores.word_perplexity = Interval(2_384_000.0, 2_100_000.0, 2_600_000.0)
    shown = SimpleNamespace(documents=["one"], text_tokens=9, stride=4, interventions=(), injection={"kind": "none"})
    shown.text_tokens_per_window = shown.positions_per_window = 9
    shown.non_overlapping = shown.sliding = scores
    show_perplexity(shown)
    text = capsys.readouterr().out
    assert "2,311 (one document: no interval)" in text
    assert "2,384,000 (2,100,000 to 2,600,000)" in text
    assert "7.745 (7.7 to 7.8)" in text


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages("report")
    monkeypatch.setattr("metatokens.report._PACKAGES", ("nowhere",))
    with pytest.raises(UsageError, match=r"the package nowhere.*pip install 'metatokens\[report\]'"):
        require_packages("report")


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("weights_bytes", 25_000_000, "25 MB"),
        (
            "validation",
            {"validation_loss": 8.056268547983409, "steps": 1200},
            "validation loss 8.056 nats\nsteps 1,200",
        ),
        ("bytes_on_disk", 4_506, "4.51 kB"),
        ("training_seconds", 200, "3 min 20 s"),
        ("training_flops", 4.5e15, "4.5 PFLOP"),
        ("text_tokens", 98_304_000_000, "98.3B"),
        ("text_tokens", 1_234, "1,234"),
        ("weights_bytes", 999_999, "1 MB"),
        ("left_out", ["a", "b"], "a\nb"),
        ("waited_for_batches", 3.956e-05, "0.004%"),
        ("text_tokens_per_second", 12_345.6, "12,346"),
        ("solved", True, "yes"),
        ("validation", {"sequence_accuracy": 1, "chance": 0.0593}, "answers right 100.0%\nguesses right 5.9%"),
        ("final_loss", 5.25, "5.25 nats"),
    ],
)
def test_a_number_has_the_unit_of_its_name(name: str, value: Any, written: str) -> None:
    assert format_value(name, value) == written


def test_a_training_tells_what_is_exact_and_what_a_share_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("pre-trained", {"num_parameters": 1_484_032, "waited_for_batches": 3.956e-05, "bit_exact": False})
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [(name.strip(), value.strip()) for name, value in rows] == [
        ("parameters", "1,484,032"),
        ("time spent waiting for batches", "0.004%"),
        ("same bits as an uninterrupted run", "no"),
    ]


def test_a_row_without_a_value_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("found", {"left_out": [], "validation": {}, "report": None, "files": 0})
    shown = capsys.readouterr().out
    assert "files" in shown
    assert not any(word in shown for word in ("left out", "validation", "report"))
