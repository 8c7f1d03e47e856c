"""Contrasts of losses on texts: what is stated, what is equivalent, and which numbers are shown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metatokens.errors import DataError
from metatokens.replication.contrasts import write_contrasts
from metatokens.report.loss_figures import draw_by_context

CONTRASTS = """
endpoint: nats
evaluation: books
margin: 0.05
tasks: {e4: 3}
contrasts:
  - {explains: channel, first: better, second: plain, expected: lower}
  - {explains: parameters, first: alike, second: plain, expected: lower}
  - {explains: place to compute, first: plain, second: better, expected: lower}
  - {explains: special token, first: better, second: alike, expected: equivalent}
"""
LOSSES = {"plain": [10.0, 10.3, 9.9], "better": [9.8, 10.09, 9.69], "alike": [10.0, 10.31, 9.9]}
WORDS, TOKENS = [100, 200, 50, 150], [220, 390, 110, 300]  # of four documents
BUCKETS = [(0, 0), (1, 1), (2, 3)]
SHARES = np.array([0.25, 0.25, 0.5])  # of the text in each bucket


def report(nats_per_word: float, seed: int, late_gain: float = 0.0) -> dict[str, Any]:
    """Return what `metatokens perplexity` writes; `late_gain` is less loss per word in the last bucket alone."""
    noise = np.random.default_rng(seed).normal(0, 0.3, len(WORDS))  # of the documents, shared by the arms of a seed
    documents = []
    for number, (words, tokens) in enumerate(zip(WORDS, TOKENS, strict=True)):
        nats = words * (nats_per_word + noise[number])
        in_buckets = nats * SHARES - np.array([0, 0, late_gain]) * words * SHARES
        documents.append(
            {
                **{"name": f"book {number}", "words": words, "text_tokens": tokens},
                **{"sliding_nats": nats, "context_nats": in_buckets.tolist()},
                "context_tokens": (tokens * SHARES).tolist(),
            }
        )
    return {"documents": documents, "buckets": [{"lowest_context": a, "highest_context": b} for a, b in BUCKETS]}


def cell(out: Path, arm: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    for seed, one in enumerate(reports):
        folder = out / "e4" / "runs" / arm / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps({"books": {"report": one}}))
    seeds = list(range(len(reports)))
    by_seed = [sum(one["sliding_nats"] for one in each["documents"]) / sum(WORDS) for each in reports]
    row = {
        **{"name": "books", "text": "test", "interventions": [], "documents": len(WORDS), "seeds": seeds},
        **{"perplexity": 1.0, "nats_per_word": {"estimate": np.mean(by_seed), "low": None, "high": None}},
        **{"by_seed": by_seed, "difference": None, "difference_by_seed": [], "by_context": []},
    }
    trainings = [{"seed": n, "steps": 9, "solved": None, "training_flops": 1e6, "cpu_seconds": 1800} for n in seeds]
    return {
        **{"labels": {"arm": arm}, "task": "pre-training", "matching": "", "seeds": seeds},
        **{"models": [f"runs/{arm}/seed-{seed}/model" for seed in seeds], "parameters": 1, "steps": 1},
        **{"text_tokens": 1.0, "meta_tokens": 0.0, "training_flops": 1e6, "trained_to": 4, "curve": []},
        **{"evaluations": [], "perplexities": [row], "trainings": trainings},
    }


def judge(folder: Path, losses: dict[str, list[float]], *, late: float = 0.0) -> dict[str, Any]:
    """Write a sweep and judge it; `late` is what `better` gains in the last bucket alone."""
    (folder / "contrasts-books.yaml").write_text(CONTRASTS)
    out = folder / "out"
    arms = {
        arm: [report(loss, seed, late if arm == "better" else 0) for seed, loss in enumerate(of_seeds)]
        for arm, of_seeds in losses.items()
    }
    results = {
        **{"format": "sweep/1", "sweep": {}, "arm_axis": "arm", "runs": 9, "done": 9, "failed": [], "versions": {}},
        "cells": [cell(out, arm, reports) for arm, reports in arms.items()],
    }
    (out / "e4" / "results.json").write_text(json.dumps(results))
    write_contrasts(folder, "contrasts-books.yaml", out, name="e4")
    found: dict[str, Any] = json.loads((out / "e4.json").read_text())["tasks"][0]
    return found


def test_a_difference_beyond_the_spread_of_the_seeds_is_stated(tmp_path: Path) -> None:
    rows = judge(tmp_path, LOSSES)["contrasts"]
    assert [row["verdict"] for row in rows] == ["supported", "equivalent", "opposite", "differs"]
    better = rows[0]
    assert better["by_seed"] == pytest.approx([-0.2, -0.21, -0.21])
    # the seeds are shared, so what they add to both arms widens no interval
    assert -0.23 < better["difference"]["low"] < better["difference"]["high"] < -0.18
    # and so are the documents
    assert better["over_documents"]["high"] - better["over_documents"]["low"] < 1e-9


def test_seeds_that_spread_as_far_as_the_difference_decide_nothing(tmp_path: Path) -> None:
    rows = judge(tmp_path, LOSSES | {"better": [9.5, 10.2, 9.7]})["contrasts"]
    assert {row["verdict"] for row in rows} == {"cannot tell"}
    assert max(rows[0]["by_seed"]) < 0  # though every seed has the sign
    assert rows[0]["over_documents"]["high"] < 0  # and the interval over documents too


def shift(folder: Path, arm: str, by: list[float]) -> list[str]:
    """Add to what an arm loses on each document with every seed, in nats per word; return the verdicts of all."""
    for answers in (folder / "out" / "e4" / "runs" / arm).rglob("evaluation.json"):
        stored = json.loads(answers.read_text())
        for document, nats in zip(stored["books"]["report"]["documents"], by, strict=True):
            document["sliding_nats"] += nats * document["words"]
        answers.write_text(json.dumps(stored))
    write_contrasts(folder, "contrasts-books.yaml", folder / "out", name="e4")
    rows = json.loads((folder / "out" / "e4.json").read_text())["tasks"][0]["contrasts"]
    return [row["verdict"] for row in rows]


def test_a_difference_that_one_document_makes_is_not_stated(tmp_path: Path) -> None:
    judge(tmp_path, LOSSES)
    # the mean stays about -0.2, but of other books it could be anything
    assert shift(tmp_path, "better", [-4.0, 1.0, 1.0, 1.0])[0] == "cannot tell"


def test_arms_whose_documents_differ_beyond_the_margin_are_not_equivalent(tmp_path: Path) -> None:
    judge(tmp_path, LOSSES)
    assert shift(tmp_path, "alike", [-0.4, 0.1, 0.1, 0.1])[1] == "cannot tell"


def test_text_of_one_document_alone_decides_nothing(tmp_path: Path) -> None:
    judge(tmp_path, LOSSES, late=0.5)
    for answers in (tmp_path / "out").rglob("evaluation.json"):
        stored = json.loads(answers.read_text())
        for document in stored["books"]["report"]["documents"][1:]:  # which end before the last bucket
            document["context_tokens"][-1] = document["context_nats"][-1] = 0
        answers.write_text(json.dumps(stored))
    write_contrasts(tmp_path, "contrasts-books.yaml", tmp_path / "out", name="e4")
    buckets = json.loads((tmp_path / "out" / "e4.json").read_text())["tasks"][0]["by_context"]
    assert {row["verdict"] for row in buckets[-1]["contrasts"]} == {"too few documents"}
    assert buckets[0]["contrasts"][0]["verdict"] == "supported"


@pytest.mark.parametrize(
    ("written", "found", "message"),
    [
        ("context_nats", "other", "remove it, and the sweep measures it again"),  # as by an older version
        ("book 2", "book 5", "the same text in equal windows"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(tmp_path: Path, written: str, found: str, message: str) -> None:
    judge(tmp_path, LOSSES)
    answers = tmp_path / "out" / "e4" / "runs" / "better" / "seed-1" / "evaluation.json"
    answers.write_text(answers.read_text().replace(written, found))
    with pytest.raises(DataError, match=message):
        write_contrasts(tmp_path, "contrasts-books.yaml", tmp_path / "out", name="e4")


def test_the_power_is_that_of_the_planned_seeds(tmp_path: Path) -> None:
    folders = {number: tmp_path / str(number) for number in (2, 3)}
    for folder in folders.values():
        folder.mkdir()
    some, all_of_them = (
        judge(folder, {arm: of_arm[:number] for arm, of_arm in LOSSES.items()}) for number, folder in folders.items()
    )
    assert some["seeds"] == all_of_them["seeds"][:2]
    in_deviations = [found["smallest_difference"] / found["residual_deviation"] for found in (some, all_of_them)]
    assert in_deviations[0] == pytest.approx(in_deviations[1])


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    found = judge(tmp_path, {arm: of_seeds[:1] for arm, of_seeds in LOSSES.items()})
    assert {row["verdict"] for row in found["contrasts"]} == {"too few seeds"}
    assert found["smallest_difference"] is None


def test_only_seeds_that_all_arms_have_are_compared(tmp_path: Path) -> None:
    found = judge(tmp_path, LOSSES | {"alike": LOSSES["alike"][:2]})
    assert found["seeds"] == [0, 1]
    assert {len(arm["by_seed"]) for arm in found["arms"]} == {2}


def test_a_gain_from_far_text_alone_shows_in_its_bucket(tmp_path: Path) -> None:
    buckets = judge(tmp_path, LOSSES, late=0.5)["by_context"]
    assert [(bucket["lowest"], bucket["highest"]) for bucket in buckets] == BUCKETS
    # words per token differ from document to document, so a bucket is near the whole's unit, not equal to it
    assert [bucket["contrasts"][0]["difference"]["estimate"] for bucket in buckets] == pytest.approx(
        [-0.207, -0.207, -0.707], rel=0.03
    )


def test_the_page_and_the_figure_show_every_contrast(tmp_path: Path) -> None:
    found = judge(tmp_path, LOSSES)
    page = (tmp_path / "out" / "e4.md").read_text()
    assert "## e4, books: 4 documents, 3 of 3 seeds, 4.50 CPU-hours" in page
    assert f"a difference of about {found['smallest_difference']:.3f} in 80% of cases" in page
    assert f"and equal arms equivalent in {found['equal_found_equivalent']:.0%}." in page
    for arm in found["arms"]:
        assert f"| {arm['residual_deviation']:.3f} | {arm['parameters']:,} |" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| channel | better - plain | -0.207 (")]
    assert line.endswith("| supported |")
    assert page.count("| 2 to 3 | **-0.") == 1
    assert (tmp_path / "out" / "e4.png").stat().st_size > 10_000
    labels = draw_by_context([found], 0.05).axes[0].get_legend_handles_labels()[1]
    assert labels[0] == "channel: better - plain"
    assert len(labels) == len(found["contrasts"])
