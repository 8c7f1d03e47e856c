"""Contrasts of answers right: which differences are stated, at which lengths, and between which evaluations."""

import json
from pathlib import Path
from typing import Any

import pytest

from metatokens.errors import DataError
from metatokens.replication.contrasts import write_contrasts

CONTRASTS = """
endpoint: accuracy
evaluation: whole
lengths: [1-48, 49-96]
margin: 0.05
tasks: {e3: 10}
contrasts:
  - {explains: channel, first: meta, second: pause, expected: higher}
  - {explains: special token, first: pause, second: mark, expected: equivalent}
  - {explains: position, first: meta@zeroed, second: meta, expected: higher}
  - {explains: embedding, first: meta@zeroed, second: meta, expected: lower}
"""
SEEDS = list(range(10))
WOBBLE = [0.01 * (seed % 3 - 1) for seed in SEEDS]  # what a seed adds to the pauses alone


def right(share: float, wobble: float = 0.0) -> list[float]:
    return [share + wobble * one for one in WOBBLE]


SHARES = {
    ("mark", "whole"): {"1-48": right(0.9), "49-96": right(0.5)},
    ("pause", "whole"): {"1-48": right(0.9, 1), "49-96": right(0.5, 1)},
    ("meta", "whole"): {"1-48": right(0.9), "49-96": right(0.7)},
    ("meta", "zeroed"): {"1-48": right(0.8), "49-96": right(0.7)},
}


def row(length: str, by_seed: list[float], seeds: list[int]) -> dict[str, Any]:
    interval = {"estimate": sum(by_seed) / len(by_seed), "low": None, "high": None} if by_seed else None
    return {
        **{"length": length, "prompt_tokens": [1, 48], "size": [2, 2], "instances": 200, "seeds": seeds},
        **{"token_accuracy": interval, "sequence_accuracy": interval, "difference": None},
        **{"sequence_by_seed": by_seed, "difference_by_seed": [], "chance": 0.25},
    }


def cell(arm: str, shares: dict[tuple[str, str], dict[str, list[float]]], seeds: list[int]) -> dict[str, Any]:
    evaluations = [
        {
            **{"name": name, "meta_places": "informative", "interventions": []},
            "rows": [row(length, [by_seed[seed] for seed in seeds], seeds) for length, by_seed in by_length.items()],
        }
        for (own, name), by_length in shares.items()
        if own == arm
    ]
    trainings = [{"seed": n, "steps": 9, "solved": n > 0, "training_flops": 1e6, "cpu_seconds": 360} for n in seeds]
    return {
        **{"labels": {"task": "list", "arm": arm}, "task": "list_recall", "matching": "", "seeds": seeds},
        **{"models": [f"runs/{arm}/seed-{seed}/model" for seed in seeds], "parameters": 1, "steps": 1},
        **{"text_tokens": 1.0, "meta_tokens": 0.0, "training_flops": 1e6, "trained_to": 48, "curve": []},
        **{"evaluations": evaluations, "perplexities": [], "trainings": trainings},
    }


def judge(folder: Path, shares: dict[tuple[str, str], dict[str, list[float]]], seeds: list[int]) -> dict[str, Any]:
    (folder / "out" / "e3").mkdir(parents=True)
    (folder / "contrasts.yaml").write_text(CONTRASTS)
    results = {
        **{"format": "sweep/1", "sweep": {}, "arm_axis": "arm", "runs": 9, "done": 9, "failed": [], "versions": {}},
        "cells": [cell(arm, shares, seeds) for arm in ("mark", "pause", "meta")],
    }
    (folder / "out" / "e3" / "results.json").write_text(json.dumps(results))
    write_contrasts(folder, "contrasts.yaml", folder / "out", name="e3")
    found: dict[str, Any] = json.loads((folder / "out" / "e3.json").read_text())["tasks"][0]
    return found


def test_a_difference_that_every_seed_has_is_stated_at_its_length_alone(tmp_path: Path) -> None:
    rows = judge(tmp_path, SHARES, SEEDS)["contrasts"]
    assert [(row["explains"], row["length"], row["verdict"]) for row in rows] == [
        ("channel", "1-48", "equivalent"),
        ("channel", "49-96", "supported"),
        ("special token", "1-48", "equivalent"),
        ("special token", "49-96", "equivalent"),
        ("position", "1-48", "opposite"),  # zeroing was expected to help, and takes ten points
        ("position", "49-96", "equivalent"),
        ("embedding", "1-48", "supported"),  # the same, expected to harm
        ("embedding", "49-96", "equivalent"),
    ]
    channel = rows[1]
    assert channel["by_seed"] == pytest.approx([0.2 - one for one in WOBBLE])
    assert 0.19 < channel["difference"]["low"] < 0.2 < channel["difference"]["high"] < 0.21
    assert channel["p"] == pytest.approx(2 / 2**10)  # no flip of ten seeds is as far from zero but the two of all
    assert channel["p_holm"] == pytest.approx(8 * 2 / 2**10)


def test_seeds_are_paired_whatever_their_order(tmp_path: Path) -> None:
    judge(tmp_path, SHARES, SEEDS)
    results = tmp_path / "out" / "e3" / "results.json"
    tree = json.loads(results.read_text())
    pause = tree["cells"][1]
    for one in pause["evaluations"][0]["rows"]:  # one seed more, and the others turned round
        one["seeds"] = [10, *one["seeds"][::-1]]
        one["sequence_by_seed"] = [0.0, *one["sequence_by_seed"][::-1]]
    pause["seeds"].append(10)
    results.write_text(json.dumps(tree))
    write_contrasts(tmp_path, "contrasts.yaml", tmp_path / "out", name="e3")
    rows = json.loads((tmp_path / "out" / "e3.json").read_text())["tasks"][0]["contrasts"]
    assert rows[1]["by_seed"] == pytest.approx([0.2 - one for one in WOBBLE])


def test_seeds_of_both_signs_decide_nothing(tmp_path: Path) -> None:
    mixed = [0.5 + (0.3 if seed % 2 else -0.2) for seed in SEEDS]
    rows = judge(tmp_path, SHARES | {("meta", "whole"): {"1-48": right(0.9), "49-96": mixed}}, SEEDS)["contrasts"]
    assert rows[1]["verdict"] == "cannot tell"


def test_so_few_seeds_that_nothing_could_pass_are_said_to_be_too_few(tmp_path: Path) -> None:
    rows = judge(tmp_path, SHARES, SEEDS[:5])["contrasts"]
    assert {row["verdict"] for row in rows} == {"too few seeds"}


def test_seeds_that_are_all_the_same_have_no_interval_and_no_power(tmp_path: Path) -> None:
    rows = judge(tmp_path, SHARES, SEEDS)["contrasts"]
    page = (tmp_path / "out" / "e3.md").read_text()
    assert "| position | meta@zeroed - meta | 1-48 | 80.0 : 90.0 | -10.0, every seed | -10.0, " in page
    assert "| position | meta@zeroed - meta | 1-48 | 0.0 | - | - |" in page
    channel = rows[1]
    assert 1 < channel["smallest_difference"] / channel["deviation"] < 3
    assert channel["equal_found_equivalent"] == 1  # the margin is six deviations


def test_what_the_seeds_can_find_is_stated_from_how_far_they_spread(tmp_path: Path) -> None:
    spread = SHARES | {("pause", "whole"): {"1-48": right(0.9, 4), "49-96": right(0.5, 8)}}
    near, far, *_ = judge(tmp_path, spread, SEEDS)["contrasts"]
    assert far["smallest_difference"] == pytest.approx(2 * near["smallest_difference"])
    assert near["equal_found_equivalent"] > 0.2 > far["equal_found_equivalent"]


def test_few_seeds_have_no_interval(tmp_path: Path) -> None:
    rows = judge(tmp_path, SHARES, SEEDS[:3])["contrasts"]
    assert {row["difference"]["low"] for row in rows} == {None}
    assert (
        "| meta - pause | 49-96 | 70.0 : 50.0 | +20.0 | +21.0, +20.0, +19.0 |"
        in (tmp_path / "out" / "e3.md").read_text()
    )


def test_a_length_that_an_arm_cannot_represent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="meta asked in zeroed at 49-96 tokens"):
        judge(tmp_path, SHARES | {("meta", "zeroed"): {"1-48": right(0.8)}}, SEEDS)


def test_the_page_and_the_figure_show_every_contrast(tmp_path: Path) -> None:
    found = judge(tmp_path, SHARES, SEEDS)
    page = (tmp_path / "out" / "e3.md").read_text()
    assert "## e3: 10 of 10 seeds, 3.00 CPU-hours" in page
    assert f"| meta | zeroed | 1-48 | 80.0% ({', '.join(['80.0'] * 10)}) | 25.0% |" in page
    start = "| channel | meta - pause | 49-96 | 70.0 : 49.9 | +20."
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    assert line.endswith("| supported |")
    assert (tmp_path / "out" / "e3.png").stat().st_size > 10_000
    assert "Trainings that ended without solving the task: 1 of mark, 1 of pause, 1 of meta." in page
    assert found["unsolved"] == {"mark": 1, "pause": 1, "meta": 1}


def test_trainings_that_do_not_stop_at_a_solution_are_not_counted_as_unsolved(tmp_path: Path) -> None:
    judge(tmp_path, SHARES, SEEDS)
    results = tmp_path / "out" / "e3" / "results.json"
    results.write_text(results.read_text().replace('"solved": true', '"solved": null').replace("false", "null"))
    write_contrasts(tmp_path, "contrasts.yaml", tmp_path / "out", name="e3")
    assert "without solving" not in (tmp_path / "out" / "e3.md").read_text()
