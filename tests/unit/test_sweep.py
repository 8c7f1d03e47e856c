"""Sweeps before anything runs: the grid that a file describes, matched budgets, and what is wrong in one line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from metatokens.cli import main
from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.loading import load_preset, to_yaml
from metatokens.config.sweep import SweepConfig, evaluations_of, expand, load_sweep
from metatokens.errors import UsageError
from metatokens.evaluation.statistics import bootstrap_paired_seeds_and_instances
from metatokens.report.tables import to_markdown
from metatokens.sweep.collecting import collect
from metatokens.sweep.planning import SweepRun, plan_sweep, scale_steps
from metatokens.sweep.progress import flops_after
from metatokens.sweep.running import count_threads, is_done, make_slots, parse_gpus

BASE = """
extends: tiny/recall
start:
  kind: fresh
  model: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 256}
task: {kind: copying, questions: 1}
curriculum:
  - {steps: 20, size: [2, 2], prompt_tokens: [1, 24]}
  - {steps: 40, size: [2, 3], prompt_tokens: [1, 32]}
schedule: {warmup_steps: 2}
training: {batch_blocks: 4, micro_batch_blocks: 4, device: cpu}
"""
SWEEP = """
preset: base.yaml
axes:
  task:
    copying:
    parity: {task: {kind: parity}, curriculum: [{steps: 60, size: [2, 6], prompt_tokens: [1, 32]}]}
  arm:
    meta:
    pause: {start.model.meta_attention_layers: none}
    deep: {start.model: {num_hidden_layers: 4, meta_attention_layers: none}}
seeds: [3, 5]
reference: pause
evaluations:
  - {name: lengths, ask: {lengths: [17-32, 33-64], task.questions: 2, instances: 6}}
  - {name: zeroed, ask: {lengths: [17-32], instances: 6}, interventions: [zero_embedding], where: {arm: meta}}
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Return a sweep with lines added or changed, `match: flops` for example."""
    (tmp_path / "base.yaml").write_text(BASE)

    def load(changes: str = "") -> SweepConfig:
        (tmp_path / "first.yaml").write_text(SWEEP)
        (tmp_path / "sweep.yaml").write_text(f"extends: first.yaml\n{changes}\n")
        return load_sweep(tmp_path / "sweep.yaml")

    return load


def plan(sweep: SweepConfig, out: Path = Path("out")) -> list[SweepRun]:
    return plan_sweep(sweep, out, "sweep.yaml")


# The grid ----------------------------------------------------------------------------------------------------


def test_there_is_a_run_for_every_combination_with_seeds_outermost(load: Any):
    runs = plan(load())
    assert [run.name for run in runs] == [
        f"{task}/{arm}/seed-{seed}"
        for seed in (3, 5)
        for task in ("copying", "parity")
        for arm in ("meta", "pause", "deep")
    ]
    assert [run.config.seed for run in runs] == [3] * 6 + [5] * 6
    assert runs[4].config.task.kind == "parity"
    assert runs[4].config.start.model.meta_attention_layers == "none"
    assert str(runs[4].folder.path) == "out/runs/parity/pause/seed-3"


def test_a_runs_config_is_a_preset_of_the_same_run(load: Any, tmp_path: Path):
    run = plan(load())[0]
    (tmp_path / "run.yaml").write_text(to_yaml(run.config))
    assert load_preset(tmp_path / "run.yaml", schema=FinetuneConfig) == run.config


def test_runs_start_from_the_models_of_their_seeds_and_labels(tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text("""
axes:
  task: {copying: {task.kind: copying}, parity: {task: {kind: parity}}}
  arm: {meta: {start: {kind: checkpoint, path: "grid/{arm}/seed-{seed}"}}, new: {start.kind: fresh}}
seeds: [3, 5]
""")
    meta, new = expand(load_sweep(tmp_path / "sweep.yaml"), "sweep.yaml")[:2]
    assert meta.with_seed(meta.config, 5).start.path == "grid/meta/seed-5"
    assert meta.with_seed(meta.config, 5).seed == 5
    assert new.with_seed(new.config, 3) == new.config


def test_evaluations_ask_the_models_that_they_are_for_all_with_one_seed(load: Any):
    sweep = load()
    meta, pause = expand(sweep, "sweep.yaml")[:2]
    assert [evaluation.name for evaluation, _ in evaluations_of(sweep, pause, "")] == ["lengths"]
    (_, lengths), (zeroed, _) = evaluations_of(sweep, meta, "")
    assert lengths.task.questions == 2
    assert lengths.size == (2, 3)
    assert lengths.seed == 0
    assert zeroed.interventions == ("zero_embedding",)


def test_ratios_policies_and_layers_are_axes_whose_labels_may_be_numbers(load: Any, tmp_path: Path):
    axes = """
preset: base.yaml
axes:
  k:
    0.05: {task.meta_places: {kind: uniform, meta_ratio: 0.05}}
    0.2: {task.meta_places: {kind: uniform, meta_ratio: 0.2}}
    none: {task.meta_places: {kind: none}}
  layers:
    last: {start.model.meta_attention_layers: [1]}
    all: {start.model.meta_attention_layers: all}
"""
    load()
    (tmp_path / "other.yaml").write_text(axes)
    sweep = load_sweep(tmp_path / "other.yaml")
    cells = {cell.name: cell.config for cell in expand(sweep, "other.yaml")}
    assert list(cells) == ["0.05/last", "0.05/all", "0.2/last", "0.2/all", "none/last", "none/all"]
    assert cells["0.2/last"].task.meta_places.meta_ratio == 0.2
    assert cells["0.2/last"].start.model.meta_attention_layers == (1,)
    assert cells["none/all"].task.meta_places.kind == "none"
    assert sweep.arm_axis == "layers"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("sed: 1", ["did you mean 'seeds'?"]),
        ("reference: paus", ["paus", "did you mean 'pause'?"]),
        ("match: tokens", ["text_tokens", "'tokens'"]),
        ("match: flops\nreference: null", ["match flops needs a reference"]),
        (
            "axes: {arm: {odd: {start.model.num_layers: 3}}}",
            ["arm odd", "did you mean 'start.model.num_hidden_layers'"],
        ),
        ("axes: {arm: {odd: {seed: 3}}}", ["axes.arm.odd sets seed"]),
        ("axes: {arm: {odd: {task.kind: parity}}}", ["axes.task.parity and axes.arm.odd both set task.kind"]),
        ("axes: {arm: {a/b: {}}}", ["a/b"]),
        ("axes: {arm: {act: {start.model.hidden_act: gelo}}}", ["gelo", "did you mean"]),
        ("seeds: [1, 1]", ["seeds [1, 1] has an entry twice"]),
        ("preset: tiny/recal", ["did you mean 'tiny/recall'?"]),
        ("evaluations: [{name: a, ask: {length: [easy]}}]", ["evaluations a: ask", "did you mean 'lengths'?"]),
        ("evaluations: [{nam: a}]", ["evaluations.name"]),
        ("evaluations: [{name: a, where: {arm: met}}]", ["met", "did you mean 'meta'?"]),
        ("evaluations: [{name: a, where: {arms: meta}}]", ["arms", "did you mean 'arm'?"]),
        ("evaluations: [{name: a, ask: {lengths: [1-4]}}]", ["copying/meta", "evaluations a", "1-4"]),
        ("evaluations: [{name: a, interventions: [no_meta_attention]}]", ["copying/pause", "no_meta_attention"]),
        ("axes: {arm: {learned: {start.model: {position_encoding: learned, max_position_embeddings: 32}}}}", ["32"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(load: Any, changes: str, named: Sequence[str]):
    with pytest.raises(UsageError) as caught:
        plan(load(changes))
    text = str(caught.value)
    assert "\n" not in text
    for part in named:
        assert part in text


# Budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "factor", "scaled"),
    [
        ([20, 40], 1.0, [20, 40]),
        ([20, 40], 0.5, [10, 20]),
        ([10, 10, 10], 1.05, [11, 11, 10]),
        ([1, 1, 98], 0.1, [1, 1, 8]),
        ([5, 5], 0.2, [1, 1]),
        ([5, 5], 0.1, None),
    ],
)
def test_steps_are_scaled_together(steps: list[int], factor: float, scaled: list[int] | None):
    assert scale_steps(steps, factor) == scaled


@pytest.mark.parametrize(("match", "measure"), [("text_tokens", "text_tokens"), ("flops", "training_flops")])
def test_arms_are_matched_to_the_reference_of_their_own_task(load: Any, match: str, measure: str):
    small = "axes: {arm: {small: {training: {batch_blocks: 2, micro_batch_blocks: 2}}}}"
    runs = {run.name: run for run in plan(load(f"match: {match}\n{small}"))}
    for task in ("copying", "parity"):
        reference = runs[f"{task}/pause/seed-3"]
        assert reference.budget.steps == 60
        for arm in ("meta", "deep", "small"):
            run = runs[f"{task}/{arm}/seed-3"]
            assert getattr(run.budget, measure) == pytest.approx(getattr(reference.budget, measure), rel=0.03)
            assert run.budget.steps == run.config.total_steps
        assert runs[f"{task}/deep/seed-3"].budget.steps < 60 or match == "text_tokens"
        assert 100 < runs[f"{task}/small/seed-3"].budget.steps < 140


def test_the_matched_steps_are_the_same_for_every_seed(load: Any):
    steps: dict[str, set[int]] = {}
    for run in plan(load("match: flops")):
        steps.setdefault("/".join(run.labels.values()), set()).add(run.budget.steps)
    assert all(len(counts) == 1 for counts in steps.values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("axes: {arm: {small: {training: {batch_blocks: 2, micro_batch_blocks: 2}}}}", ["text tokens", "0.5"]),
        (
            "match: flops\naxes: {arm: {wide: {start.model: {hidden_size: 512, intermediate_size: 80000}}}}",
            ["copying/wide and copying/pause", "steps for 2 stages"],
        ),
    ],
)
def test_arms_that_cannot_share_a_budget_are_refused(load: Any, changes: str, named: Sequence[str]):
    with pytest.raises(UsageError) as caught:
        plan(load(changes))
    for part in named:
        assert part in str(caught.value)


def test_arms_that_train_for_different_steps_are_refused_under_match_steps(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(BASE)
    arms = "a: {}, b: {curriculum: [{steps: 61, size: [2, 3], prompt_tokens: [1, 32]}]}"
    (tmp_path / "sweep.yaml").write_text(f"preset: base.yaml\naxes: {{arm: {{{arms}}}}}\nreference: a\n")
    with pytest.raises(UsageError, match=r"budgets of b and a: expected the same steps, found 61 and 60"):
        plan(load_sweep(tmp_path / "sweep.yaml"))


def test_work_is_counted_stage_by_stage(load: Any):
    run = plan(load())[0]
    first, second = run.budget.flops_of_stages
    assert flops_after(run, 0) == 0
    assert flops_after(run, 25) == 20 * first + 5 * second
    assert flops_after(run, 60) == pytest.approx(run.budget.training_flops)


# Results -----------------------------------------------------------------------------------------------------


def finish(run: SweepRun, outcomes: dict[str, list[float] | None], seed: int = 0, steps: int | None = None) -> None:
    """Leave behind what a finished run does, with these answers by length."""
    folder = run.folder
    folder.model_path.mkdir(parents=True)
    folder.config_path.write_text(to_yaml(run.config))
    spent = {"num_parameters": run.parameters, "text_tokens": 7, "meta_tokens": 3, "training_flops": 1e9}
    spent |= {"steps": 60} if steps is None else {"steps": steps, "solved": steps < 60}
    folder.result_path.write_text(json.dumps(spent))
    lines = [{"step": step, "loss": 1.0, "sequence_accuracy": step / 100} for step in (30, 60)]
    folder.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stored = {}
    for evaluation in run.evaluations:
        rows = [
            {
                **{"length": length, "prompt_tokens": [1, 32], "size": [2, 3], "instances": 6, "chance": 0.04},
                **{f"{kind}_accuracy": right and {"estimate": sum(right) / 6, "low": 0, "high": 1} for kind in KINDS},
                **{f"{kind}_outcomes": right and [right] for kind in KINDS},
            }
            for length, right in outcomes.items()
        ]
        config = {**evaluation.config.model_dump(mode="json"), "seed": seed}
        stored[evaluation.name] = {
            "interventions": list(evaluation.interventions),
            "report": {"config": config, "rows": rows},
        }
    (folder.path / "evaluation.json").write_text(json.dumps(stored))


KINDS = ("token", "sequence")


def test_results_compare_each_arm_with_the_reference_on_the_same_seeds_and_instances(load: Any, tmp_path: Path):
    sweep = load()
    runs = {run.name: run for run in plan(sweep, tmp_path)}
    right = {"meta": [1, 1, 0, 1, 1, 1], "pause": [0, 1, 0, 1, 0, 1]}
    for seed in (3, 5):
        finish(runs[f"copying/meta/seed-{seed}"], {"17-32": right["meta"], "33-64": None})
    finish(runs["copying/pause/seed-3"], {"17-32": right["pause"], "33-64": right["pause"]})
    results = collect(sweep, list(runs.values()), tmp_path)
    assert (results.runs, results.done) == (12, 3)
    meta, pause = results.cells
    assert meta.seeds == (3, 5)
    assert meta.matching == "the same steps as pause"
    assert (meta.window, meta.original_window, meta.trained_to) == (256, 256, 32)
    assert [point.sequence_accuracy for point in meta.curve] == [0.3, 0.6]
    near, far = meta.evaluations[0].rows
    assert near.sequence_accuracy is not None
    assert near.sequence_accuracy.estimate == pytest.approx(5 / 6)
    expected = bootstrap_paired_seeds_and_instances(
        [right["meta"]], [right["pause"]], seed=0
    )  # the seed that both have
    assert near.difference == expected
    assert near.sequence_by_seed == pytest.approx((5 / 6, 5 / 6))
    assert near.difference_by_seed == pytest.approx((1 / 3,))
    assert far.sequence_accuracy is None
    assert far.difference is None
    assert (far.sequence_by_seed, far.difference_by_seed) == ((), ())
    assert pause.evaluations[0].rows[0].difference is None
    assert pause.evaluations[0].rows[0].seeds == (3,)
    table = to_markdown(results)
    assert "| n/a |" in table
    assert "| 83.3% (83.3 / 83.3) |" in table  # no interval from two seeds
    guessing, *_ = (line for line in table.splitlines() if line.startswith("| guessing |"))
    header = next(line for line in table.splitlines() if "17-32 tokens" in line)
    cells = dict(zip(header.split("|"), guessing.split("|"), strict=True))
    assert (cells[" 17-32 tokens "], cells[" 33-64 tokens "], cells[" 17-32 diff "]) == (" 4.0% ", " 4.0% ", "  ")
    assert "| too few seeds (1, at least 6 needed) |" in table


def test_the_steps_to_solve_are_in_the_table_with_those_that_were_not_enough(load: Any, tmp_path: Path):
    sweep = load()
    runs = {run.name: run for run in plan(sweep, tmp_path)}
    for seed, steps in ((3, 45), (5, 60)):
        run = runs[f"copying/meta/seed-{seed}"]
        finish(run, {"17-32": [1.0] * 6}, steps=steps)
        (run.folder.path / "cpu_seconds.json").write_text("2.25\n")
    results = collect(sweep, list(runs.values()), tmp_path)
    assert [(one.steps, one.solved, one.cpu_seconds) for one in results.cells[0].trainings] == [
        (45, True, 2.25),
        (60, False, 2.25),
    ]
    assert "| copying | meta | 1 of 2 | 52 | 45 / 60+ | 4 |" in to_markdown(results)


@pytest.mark.parametrize(
    ("scaling", "original", "own"),
    [
        ("{kind: yarn, factor: 4, original_max_position_embeddings: 64}", 64, 256),
        ("{kind: linear, factor: 4}", 64, 256),
        ("{kind: dynamic, factor: 4}", 256, 1024),
        ("{kind: none}", 256, 256),
    ],
)
def test_a_scaled_window_is_told_beside_the_original_one(load: Any, scaling: str, original: int, own: int):
    runs = plan(load(f"axes: {{arm: {{meta: {{start.model.rope_scaling: {scaling}}}}}}}"))
    (windows,) = {run.windows for run in runs if run.labels["arm"] == "meta"}
    assert (windows.original, windows.own) == (original, own)


def test_a_run_is_done_when_it_has_answered_what_is_asked_now(load: Any, tmp_path: Path):
    run = plan(load(), tmp_path)[0]
    finish(run, {"17-32": [1.0] * 6})
    assert is_done(run)
    other = plan(load("evaluations: [{name: lengths, ask: {instances: 7, lengths: [17-32]}}]"), tmp_path)[0]
    assert not is_done(other)
    longer = plan(load("axes: {arm: {meta: {optimizer.learning_rate: 0.1}}}"), tmp_path)[0]
    assert not is_done(longer)


def test_answers_to_another_question_are_not_answers(load: Any, tmp_path: Path):
    run = plan(load(), tmp_path)[0]
    finish(run, {"17-32": [1.0] * 6}, seed=4)
    assert not is_done(run)


# The command -------------------------------------------------------------------------------------------------


def test_slots_share_the_cores_or_have_a_gpu_each():
    assert [slot.gpu for slot in make_slots(3, [])] == [None] * 3
    slots = make_slots(1, parse_gpus("0, 2"))
    assert [slot.own_environment()["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "2"]
    assert count_threads(1) >= count_threads(2) >= count_threads(1000) == 1


@pytest.mark.parametrize("gpus", ["", "0,", "1,1"])
def test_gpus_that_are_none_are_refused(gpus: str):
    with pytest.raises(UsageError, match="--gpus"):
        parse_gpus(gpus)


def test_the_dry_run_lists_the_runs_and_writes_nothing(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    load("match: flops")
    out = tmp_path / "out"
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(out), "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["matching"] == "equal training FLOPs as pause"
    assert len(listed["runs"]) == 12
    assert listed["runs"][0]["steps"] < listed["runs"][1]["steps"] == 60
    assert not out.exists()


def test_axes_are_not_overridden_on_the_command_line(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    load()
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--axes.arm.meta-rope", "{}"]
    assert main(command) == 2
    assert "--axes.arm.meta-rope" in capsys.readouterr().err
