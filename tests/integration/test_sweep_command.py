"""Sweeps of runs of a second, in real processes: killed, continued, skipped, and with an arm that fails."""

import json
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import DEADLINE_SECONDS, weights

from commands import metatokens
from forked import start_command
from metatokens.config.loading import to_yaml
from metatokens.config.sweep import load_sweep
from metatokens.report.tables import to_markdown
from metatokens.storage import hold_lock, read_sealed, write_sealed
from metatokens.sweep.collecting import collect
from metatokens.sweep.planning import plan_sweep
from metatokens.sweep.running import evaluation_arguments, is_done, store_answer, training_arguments

SWEEP = """
preset: base.yaml
axes:
  arm:
    meta:
    pause: {start.model.meta_attention_layers: none}
seeds: [0]
reference: pause
evaluations:
  - {name: lengths, ask: {lengths: [9-24, 25-32, 101-110], instances: 12}}
"""
BASE = """
extends: tiny/recall
start:
  kind: fresh
  model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}
task: {kind: parity, questions: 1}
curriculum: [{steps: 250, size: [1, 1], prompt_tokens: [8, 16]}]
optimizer: {learning_rate: 5.0e-3}
schedule: {warmup_steps: 2}
training: {batch_blocks: 16, micro_batch_blocks: 16, device: cpu}
evaluation: {interval_steps: 50, instances: 20}
checkpoint: {interval_steps: 25, keep: 1}
logging: {interval_steps: 1}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "base.yaml").write_text(BASE)
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "one.yaml").write_text(SWEEP.replace("    meta:\n", ""))
    return folder


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was left alone."""
    out = tmp_path_factory.mktemp("done")
    metatokens("sweep", files / "sweep.yaml", "--out", out, "--jobs", "2")
    return out


def rows(out: Path, arm: str) -> Any:
    """Return all that was measured of an arm, but for the difference from another and the time that it took."""
    cells = json.loads((out / "results.json").read_text())["cells"]
    (cell,) = [cell for cell in cells if cell["labels"]["arm"] == arm]
    for row in cell["evaluations"][0]["rows"]:
        row.pop("difference")
    for training in cell["trainings"]:
        assert training.pop("cpu_seconds") > 1
    return cell


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_leaves_results_a_table_and_its_answers(done: Path):
    results = json.loads((done / "results.json").read_text())
    assert results["format"] == "sweep/1"
    assert (results["runs"], results["done"], results["failed"]) == (2, 2, [])
    meta, pause = results["cells"]
    assert meta["labels"] == {"arm": "meta"}
    assert meta["matching"] == "the same steps as pause"
    assert meta["parameters"] > pause["parameters"]
    assert meta["training_flops"] > pause["training_flops"] > 0
    assert meta["text_tokens"] == pause["text_tokens"]
    assert [point["step"] for point in meta["curve"]] == [50, 100, 150, 200, 250]
    near, _, far = meta["evaluations"][0]["rows"]
    assert (
        near["sequence_accuracy"]["low"] <= near["sequence_accuracy"]["estimate"] <= near["sequence_accuracy"]["high"]
    )
    assert near["difference"] is not None
    assert far["sequence_accuracy"] is None
    assert "n/a" in (done / "table.md").read_text()
    answers = json.loads((done / meta["models"][0]).parent.joinpath("evaluation.json").read_text())
    assert len(answers["lengths"]["report"]["rows"][0]["sequence_outcomes"][0]) == 12


@pytest.mark.slow
@pytest.mark.long
def test_what_is_done_is_skipped_and_a_failing_arm_costs_the_others_nothing(done: Path, files: Path):
    before = {path: path.stat().st_mtime_ns for path in done.glob("runs/**/*.*")}
    blocked = done / "runs/broken/seed-0"
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").write_text("seed: 7\n")  # the folder of another run
    (files / "more.yaml").write_text("extends: sweep.yaml\npreset: base.yaml\naxes: {arm: {broken: {}}}\n")
    ended = metatokens("sweep", files / "more.yaml", "--out", done, "--json", code=1)
    results = json.loads(ended.stdout)
    assert (results["runs"], results["done"]) == (3, 2)
    (failure,) = results["failed"]
    assert failure["run"] == "broken/seed-0"
    assert ended.stderr.splitlines()[-1] == f"metatokens: broken/seed-0: {failure['error']}"
    assert "another --out" in failure["error"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_sweep_ends_as_one_that_was_left_alone(done: Path, files: Path, tmp_path: Path):
    run = tmp_path / "runs/pause/seed-0"
    # as many threads as in the other sweep: sums depend on them in the last bits
    arguments = ["sweep", str(files / "one.yaml"), "--out", str(tmp_path), "--jobs", "2"]

    errors = tmp_path / "errors.txt"

    sweep = start_command(arguments, errors)
    wait_until(lambda: steps_of(run) >= 8, sweep)
    sweep.kill()
    sweep.join()
    # its training notices within half a second, saves and ends by itself; the steps left take several times as long
    wait_until(lambda: not is_locked(run))
    assert not (run / "result.json").exists()
    stopped_at = steps_of(run)

    sweep = start_command(arguments, errors)
    wait_until(lambda: steps_of(run) >= stopped_at + 8, sweep)
    os.kill(sweep.pid, signal.SIGTERM)
    sweep.join(DEADLINE_SECONDS)
    assert sweep.exitcode == 75, errors.read_text()
    assert "the same command continues from there" in errors.read_text()
    assert not is_locked(run)
    assert not (run / "result.json").exists()

    metatokens(*arguments)
    assert weights(run) == weights(done / "runs/pause/seed-0")
    assert rows(tmp_path, "pause") == rows(done, "pause")


@pytest.mark.slow
@pytest.mark.long
def test_two_sweeps_do_not_share_a_folder(done: Path, files: Path):
    with hold_lock(done / "lock", folder=done, work="a test holds it"):
        refused = metatokens("sweep", files / "sweep.yaml", "--out", done, code=2)
    assert refused.stderr.splitlines() == [
        f"metatokens: {done}: another `metatokens sweep` is at work in this folder "
        f"(process {os.getpid()} on {platform.node()}); wait for it to end or choose another --out"
    ]


PRETRAINING = """
training: pretrain
preset: base.yaml
axes:
  arm:
    plain: {model.meta_attention_layers: none, injection.kind: none}
    meta:
seeds: [0]
match: text_tokens
reference: plain
evaluations:
  - {name: stories, ask: {text: TEXT, window: 24, max_tokens: 100}}
  - {name: bare, ask: {text: TEXT, window: 48, extrapolate: true, max_tokens: 100, injection: none}, where: {arm: meta}}
"""
PRETRAINING_BASE = """
extends: tiny/meta
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32}
data: {path: TOKENS, block_size: 32}
training: {duration: {kind: steps, steps: 20}, batch_blocks: 4, micro_batch_blocks: 4, device: cpu}
schedule: {warmup_steps: 2}
evaluation: {interval_steps: null}
"""


def write_pretraining(folder: Path, tokens: Path) -> Path:
    (folder / "base.yaml").write_text(PRETRAINING_BASE.replace("TOKENS", str(tokens)))
    (folder / "sweep.yaml").write_text(PRETRAINING.replace("TEXT", str(tokens.parent / "text")))
    return folder / "sweep.yaml"


def test_arms_of_pretraining_are_matched_by_their_text(tokens: Path, tmp_path: Path):
    runs = plan_sweep(load_sweep(write_pretraining(tmp_path, tokens)), tmp_path / "out", "sweep.yaml")
    plain, meta = runs
    # 32 text tokens a block against 29, so 20 steps are as much text as 22
    assert (plain.budget.steps, plain.budget.text_tokens) == (20, 20 * 4 * 32)
    assert (meta.budget.steps, meta.budget.text_tokens) == (22, 22 * 4 * 29)
    assert meta.budget.training_flops > plain.budget.training_flops > 0
    assert [evaluation.name for evaluation in meta.evaluations] == ["stories", "bare"]
    assert [evaluation.name for evaluation in plain.evaluations] == ["stories"]
    injections = [evaluation.config.injection for run in runs for evaluation in run.evaluations]
    assert injections == ["none", "uniform", "none"]


def forget_field(answers: Path, name: str) -> None:
    stored = read_sealed(answers, remedy="")
    answers.unlink()
    tree = json.loads(stored)
    for answer in tree.values():
        if isinstance(answer, dict):
            del answer["asked"][name]
    write_sealed(answers, json.dumps(tree) + "\n")


def test_arms_of_pretraining_are_scored_on_the_same_documents(tokens: Path, tmp_path: Path):
    sweep = load_sweep(write_pretraining(tmp_path, tokens))
    runs = plan_sweep(sweep, tmp_path / "out", "sweep.yaml")
    for run in runs:
        run.folder.path.mkdir(parents=True)
        (run.folder.path / "preset.yaml").write_text(to_yaml(run.config))
        metatokens(*training_arguments(run))
        for evaluation in run.evaluations:
            assert not is_done(run)
            store_answer(run, evaluation, metatokens(*evaluation_arguments(run, evaluation)).stdout)
        assert is_done(run)
    forget_field(runs[0].folder.path / "evaluation.json", "extrapolate")
    assert is_done(runs[0])  # as written before there was such a field
    results = collect(sweep, runs, tmp_path / "out")
    plain, meta = results.cells
    assert (plain.task, plain.trained_to, meta.trained_to) == ("pre-training", 32, 29)
    (of_plain,) = plain.perplexities
    of_meta, bare = meta.perplexities
    assert of_plain.documents == of_meta.documents == 40
    assert of_plain.difference is None is bare.difference
    own, theirs = (row.nats_per_word.estimate for row in (of_meta, of_plain))
    assert of_meta.difference.estimate == pytest.approx(own - theirs)
    assert of_meta.difference_by_seed == pytest.approx([own - theirs])
    assert of_plain.by_context[0].lowest == 0
    assert "## pre-training: stories" in to_markdown(results)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def is_locked(run: Path) -> bool:
    from metatokens.training.run_folder import RunFolder

    return bool(RunFolder(run).holder())


def wait_until(condition: Callable[[], bool], process: Any = None) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process is None or process.is_alive(), "the sweep ended too early"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)
