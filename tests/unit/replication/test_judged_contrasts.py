"""The contrasts of a finished sweep: an arm that is faster, one that is as fast, and seeds that are still missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metatokens.replication.contrasts import write_contrasts
from metatokens.replication.judging import PowerRow, power_table
from metatokens.replication.plan import load_scale
from metatokens.replication.running import write_tables
from metatokens.report.solve_figures import draw_ratios

HORIZON = 2000
CONTRASTS = """
level: 0.05
margin: 1.5
tasks: {parity: 16}
contrasts:
  - {explains: hint, first: twice-as-fast, second: none, expected: faster}
  - {explains: parameters, first: alike, second: none, expected: faster}
  - {explains: channel, first: none, second: twice-as-fast, expected: faster}
"""
SWEEP = f"preset: parity-preset.yaml\naxes: {{arm: {{none: , twice-as-fast: , alike: }}}}\nseeds: {list(range(16))}\n"
PLAN = """
purpose: a test
text_vocab_size: 300
parts:
  - {name: E1, question: speed, contrasts: contrasts.yaml, steps: [{run: "sweep {files}/parity.yaml --out parity"}]}
"""
PRESET = f"extends: tiny/recall\ncurriculum: [{{steps: {HORIZON}, size: [2, 3], prompt_tokens: [1, 22]}}]\n"


def cell(arm: str, steps: list[int]) -> dict[str, Any]:
    trainings = [
        {"seed": seed, "steps": n, "solved": n < HORIZON, "training_flops": n * 1e6, "cpu_seconds": 36.0}
        for seed, n in enumerate(steps)
    ]
    return {
        **{"labels": {"arm": arm}, "task": "parity", "matching": "", "seeds": list(range(len(steps))), "models": []},
        **{"parameters": 1, "steps": 1, "text_tokens": 1.0, "meta_tokens": 0.0, "training_flops": 1.0},
        **{"trained_to": 22, "curve": [], "evaluations": [], "trainings": trainings},
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text in {"contrasts": CONTRASTS, "parity": SWEEP, "parity-preset": PRESET}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "out" / "parity").mkdir(parents=True)
    return tmp_path


def write_results(files: Path, arms: dict[str, list[int]]) -> None:
    results = {
        **{"format": "sweep/1", "sweep": {}, "arm_axis": "arm", "runs": 48, "done": 48, "failed": [], "versions": {}},
        "cells": [cell(arm, steps) for arm, steps in arms.items()],
    }
    (files / "out" / "parity" / "results.json").write_text(json.dumps(results))
    write_contrasts(files, "contrasts.yaml", files / "out", name="e1")


def judge(files: Path, num_seeds: int) -> list[dict[str, Any]]:
    draws = np.random.default_rng(0)
    slow = 600 * np.exp(0.3 * draws.standard_normal(num_seeds))
    noise = np.resize([0.95, 1.05], num_seeds)
    arms = {"none": slow, "twice-as-fast": slow / 2 * noise, "alike": slow * noise[::-1]}
    write_results(files, {arm: times.astype(int).tolist() for arm, times in arms.items()})
    rows: list[dict[str, Any]] = json.loads((files / "out" / "e1.json").read_text())["tasks"][0]["at_equal_steps"]
    return rows


def test_a_faster_arm_a_slower_one_and_an_equal_one_are_told_apart(files: Path) -> None:
    faster, alike, slower = judge(files, 16)
    assert (faster["verdict"], alike["verdict"], slower["verdict"]) == ("supported", "equivalent", "opposite")
    assert 0.4 < faster["ratio"]["low"] < faster["ratio"]["high"] < 1 / 1.5
    assert slower["ratio"]["estimate"] == pytest.approx(1 / faster["ratio"]["estimate"], rel=0.02)


def test_three_seeds_decide_nothing_and_say_so(files: Path) -> None:
    assert {row["verdict"] for row in judge(files, 3)} == {"too few seeds"}


def test_the_page_and_the_figures_show_every_arm_with_its_counts(files: Path) -> None:
    judge(files, 16)
    page = (files / "out" / "e1.md").read_text()
    assert page.count("| hint |") == 3  # at equal steps, at equal operations, and its power
    assert "| twice-as-fast | 16 | 0 |" in page
    assert "0.48 CPU-hours" in page
    assert all((files / "out" / name).stat().st_size > 10_000 for name in ("e1.png", "e1-ratios.png"))


def read_task(files: Path) -> dict[str, Any]:
    (task,) = json.loads((files / "out" / "e1.json").read_text())["tasks"]
    return dict(task)


def test_the_power_is_stated_for_each_contrast_whose_arms_have_solved_seeds(files: Path) -> None:
    solved, others, half_solved = [300, 400] * 8, [300, 400, 400, 300] * 4, [350] * 8 + [HORIZON] * 8
    write_results(files, {"none": [HORIZON] * 16, "twice-as-fast": others, "alike": half_solved})
    assert {row["smallest_ratio"] for row in read_task(files)["power"]} == {None}  # each has `none`
    assert "No power is stated: each contrast has an arm" in (files / "out" / "e1.md").read_text()

    write_results(files, {"none": solved, "twice-as-fast": others, "alike": half_solved})
    hint, parameters, channel = read_task(files)["power"]
    assert hint["smallest_ratio"] == channel["smallest_ratio"]
    assert 1 < hint["smallest_ratio"] < 1.5 < parameters["smallest_ratio"]
    assert hint["equal_found_equivalent"] == 1
    assert parameters["equal_found_equivalent"] < 0.5
    assert parameters["log_deviation"] > 3 * hint["log_deviation"]
    assert hint["correlation"] == pytest.approx(0, abs=1e-12)
    # seeds that make both arms slow can show a smaller ratio
    write_results(files, {"none": solved, "twice-as-fast": [200, 300] * 8, "alike": half_solved})
    assert read_task(files)["power"][0]["smallest_ratio"] < 1.05


def test_the_power_of_a_contrast_is_the_same_whichever_arm_is_named_first(files: Path) -> None:
    half_solved = [1100] * 8 + [HORIZON] * 8
    write_results(files, {"none": [500, 700] * 8, "twice-as-fast": half_solved, "alike": [600, 700] * 8})
    hint, _, channel = read_task(files)["power"]
    assert hint["smallest_ratio"] == pytest.approx(channel["smallest_ratio"], rel=1e-6)
    assert hint["equal_found_equivalent"] == channel["equal_found_equivalent"]


def test_an_arm_that_never_solved_its_task_has_a_bound_and_no_estimate(files: Path) -> None:
    fast = [300, 400] * 8
    write_results(files, {"none": [HORIZON] * 16, "twice-as-fast": fast, "alike": [1900] * 16})
    table = (files / "out" / "e1.md").read_text()
    assert "| none | 0 | 16 | over 2,000 |" in table
    # the bound is the end of the interval: six seeds solve within 300 steps, and 300 / 2,000 is 0.15
    assert "| hint | twice-as-fast : none | 16 of 16 : 0 of 16 | at most 0.15 |" in table
    assert "| parameters | alike : none | 16 of 16 : 0 of 16 | at most 0.95 |" in table
    assert "| channel | none : twice-as-fast | 0 of 16 : 16 of 16 | at least 6.6" in table
    hint = read_task(files)["at_equal_steps"][0]
    assert (hint["verdict"], hint["ratio"]["estimate"]) == ("supported", None)
    (panel,) = draw_ratios([read_task(files)], 1.5).axes
    markers = [line.get_marker() for line in panel.lines if len(np.atleast_1d(line.get_xdata())) == 1]
    assert markers == ["<", "<", ">"]  # open ends


def test_seeds_that_neither_arm_solves_are_too_few_however_many_there_are(files: Path) -> None:
    some = [300] * 5 + [HORIZON] * 11
    write_results(files, {"none": [HORIZON] * 16, "twice-as-fast": some, "alike": [HORIZON] * 16})
    hint, parameters, _ = read_task(files)["at_equal_steps"]
    assert (hint["seeds_that_tell"], hint["verdict"]) == (5, "too few solved")
    assert hint["ratio"] == {"estimate": None, "low": None, "high": None, "level": 0.95}
    table = (files / "out" / "e1.md").read_text()
    assert "| twice-as-fast : none | 5 of 16 : 0 of 16 | no bound |" in table
    assert "| alike : none | 0 of 16 : 0 of 16 | neither arm solved it |" in table
    (panel,) = draw_ratios([read_task(files)], 1.5).axes
    assert [text.get_text() for text in panel.texts] == ["no bound", "neither arm solved it", "no bound"]
    assert parameters["verdict"] == "too few solved"
    # with six both one-sided tests of equivalence could pass: 3 / 2^6 is below 5%
    one_more = [300] * 6 + [HORIZON] * 10
    write_results(files, {"none": [HORIZON] * 16, "twice-as-fast": one_more, "alike": [HORIZON] * 16})
    hint, *_ = read_task(files)["at_equal_steps"]
    assert (hint["seeds_that_tell"], hint["verdict"]) == (6, "cannot tell")


def test_a_contrast_that_shows_next_to_nothing_says_so() -> None:
    rows = [PowerRow([name], "1.0", "", share) for name, share in (("a", 0.009), ("b", 0.01), ("c", None))]
    *_, little, some, none = power_table(["arms"], "the steps", "smallest ratio found", rows)
    assert [line.split(" | ")[-1] for line in (little, some, none)] == ["<1% |", "1% |", "- |"]


def test_a_control_that_differs_is_not_called_supported(files: Path) -> None:
    (files / "contrasts.yaml").write_text(CONTRASTS.replace("expected: faster}", "expected: equivalent}"))
    hint, parameters, channel = judge(files, 16)
    assert hint["verdict"] == channel["verdict"] == "differs"
    assert parameters["verdict"] == "equivalent"


def test_the_tables_leave_out_what_an_earlier_call_judged_and_this_one_cannot(files: Path) -> None:
    (files / "plan.yaml").write_text(PLAN)
    judge(files, 16)
    out, scale = files / "out", load_scale(str(files))
    assert "twice-as-fast" in write_tables(scale, out).read_text()
    assert (out / "explanations.md").is_file()

    (out / "parity" / "results.json").unlink()
    assert (out / "e1.json").is_file()
    assert "twice-as-fast" not in write_tables(scale, out).read_text()
    assert not list(out.glob("explanations.*"))
