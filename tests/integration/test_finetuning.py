"""Fine-tuning on a recall task: learns, starts from a checkpoint, resumes to the bit, and runs on two processes."""

import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import losses, numbers, run, start, wait, wait_for_step, weights

from commands import error_line, metatokens
from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.loading import load_preset
from metatokens.errors import UsageError
from metatokens.training.finetuning import finetune
from metatokens.training.loading import open_model

SMALL = """
extends: tiny/recall
start:
  kind: fresh
  model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 128}
task: {kind: parity}
curriculum:
  - {steps: 12, size: [3, 4], prompt_tokens: [1, 24]}
  - {steps: 12, size: [3, 6], prompt_tokens: [1, 32]}
bucket_batches: 5
schedule: {warmup_steps: 2}
training: {batch_blocks: 8, micro_batch_blocks: 4, device: cpu}
evaluation: {interval_steps: 12, instances: 10}
checkpoint: {interval_steps: 4}
logging: {interval_steps: 1}
"""
Config = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def config(preset: Path) -> Config:
    return lambda *overrides: load_preset(preset, overrides, schema=FinetuneConfig)


@pytest.fixture(scope="module")
def done(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "run"
    finetune(config("--checkpoint.keep", "100"), out, show_progress=False)
    return out


def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_was_left_alone(config: Config, done: Path, tmp_path: Path):
    started = start(config(), tmp_path / "run")
    wait_for_step(tmp_path / "run", 14, started)  # in the second stage, in the middle of a group
    started[0].kill()
    assert wait(started) == [-signal.SIGKILL]
    assert run(config(), tmp_path / "run") == [0]
    assert losses(tmp_path / "run") == losses(done)
    assert weights(tmp_path / "run") == weights(done)
    accuracies = [json.loads((folder / "result.json").read_text())["validation"] for folder in (tmp_path / "run", done)]
    assert accuracies[0] == accuracies[1]


EASY = ["--curriculum", "[{steps: 200, size: [1, 1], prompt_tokens: [12, 16]}]", "--optimizer.learning_rate", "3e-3"]
EASY += ["--training.batch_blocks", "32", "--start.model.hidden_size", "64", "--checkpoint.interval_steps", "50"]
SOLVE = ["--solve", "{accuracy: 0.9, evaluations: 2, interval_steps: 5, instances: 50}"]


def logged_accuracies(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["sequence_accuracy"]) for line in lines if "sequence_accuracy" in line]


def test_a_run_ends_at_the_second_evaluation_in_a_row_that_finds_the_task_solved(config: Config, tmp_path: Path):
    easy = config(*EASY, *SOLVE, "--evaluation.instances", "50")
    result = finetune(easy, tmp_path / "run", show_progress=False)
    steps, accuracies = zip(*logged_accuracies(tmp_path / "run"), strict=True)
    in_a_row = [i for i in range(1, len(accuracies)) if min(accuracies[i - 1 : i + 1]) >= 0.9]
    assert in_a_row == [len(accuracies) - 1]
    assert (result.solved, result.steps) == (True, steps[-1])
    assert result.steps < 200
    assert result.validation["sequence_accuracy"] >= 0.9  # it has learnt to repeat a bit
    assert finetune(easy, tmp_path / "run", show_progress=False).steps == result.steps


def test_a_run_that_is_killed_between_the_evaluations_that_count_is_solved_after_as_many_steps(
    config: Config, tmp_path: Path
):
    rule = ["--solve", "{accuracy: 0.01, evaluations: 3, interval_steps: 5, instances: 50}", "--checkpoint.keep", "9"]
    rule += ["--checkpoint.interval_steps", "5"]
    whole = finetune(config(*rule), tmp_path / "whole", show_progress=False)
    assert whole.steps == 15
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000010", tmp_path / "run/checkpoints/step-00000010")
    assert finetune(config(*rule), tmp_path / "run", show_progress=False).steps == 15


def test_a_run_that_does_not_solve_its_task_does_every_step_and_says_so(config: Config, tmp_path: Path):
    result = finetune(config(*SOLVE), tmp_path / "run", show_progress=False)
    assert (result.solved, result.steps) == (False, 24)


def test_another_end_is_another_run(config: Config, done: Path, tmp_path: Path):
    shutil.copytree(done, tmp_path / "run")
    with pytest.raises(UsageError, match="solve"):
        finetune(config(*SOLVE), tmp_path / "run", show_progress=False)


def test_two_processes_train_as_one(config: Config, done: Path, tmp_path: Path):
    assert run(config(), tmp_path / "run", world_size=2) == [0, 0]
    assert numbers(tmp_path / "run") == pytest.approx(numbers(done), rel=1e-4)
    result, alone = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "run", done))
    for count in ("text_tokens", "meta_tokens"):
        assert result[count] == alone[count] > 0


def test_a_run_starts_from_the_weights_of_a_checkpoint(config: Config, done: Path, tmp_path: Path):
    start_there = ["--start.kind", "checkpoint", "--start.path", str(done)]
    again = config(*start_there, "--optimizer.learning_rate", "1e-9", "--evaluation.instances", "40")
    result = finetune(again, tmp_path / "run", show_progress=False)
    assert numbers(tmp_path / "run")[0] < numbers(done)[0] - 1
    assert result.training_flops == json.loads((done / "result.json").read_text())["training_flops"]


SHORT_CURRICULUM = "[{steps: 2, size: [3, 3], prompt_tokens: [1, 64]}]"


def test_a_run_with_coupled_positions_goes_on_with_the_same_bits_and_reads_more_tokens_than_it_has_positions(
    config: Config, tmp_path: Path
):
    task = [
        "--task",
        "{kind: copying, coupling: span}",
        "--curriculum",
        "[{steps: 8, size: [2, 4], prompt_tokens: [1, 40]}]",
    ]
    with pytest.raises(UsageError, match=r"task\.coupling: expected .*found positions rope"):
        finetune(config(*task), tmp_path / "rope", show_progress=False)
    learned = ["--start.model.position_encoding", "learned", "--start.model.max_position_embeddings", "12"]
    coupled = config(*task, *learned, "--checkpoint.keep", "9")
    finetune(coupled, tmp_path / "whole", show_progress=False)
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000004", tmp_path / "run/checkpoints/step-00000004")
    finetune(coupled, tmp_path / "run", show_progress=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    line = ("evaluate", tmp_path / "run", "--lengths", "[100-120]", "--instances", "4", "--json")
    scored, beyond = (
        json.loads(metatokens(*line, "--size", size).stdout)["rows"][0]["token_accuracy"]
        for size in ("[3, 4]", "[20, 20]")
    )
    assert scored is not None
    assert beyond is None
    too_long = [*task[:-1], "[{steps: 8, size: [2, 12], prompt_tokens: [1, 40]}]"]
    with pytest.raises(UsageError, match="expected at most the 12 positions of the model, found 14 coupled ones"):
        finetune(config(*too_long, *learned), tmp_path / "long", show_progress=False)


def test_a_model_of_full_attention_is_fine_tuned_in_memory_mode(config: Config, done: Path, tmp_path: Path):
    start_there = ["--start.kind", "checkpoint", "--start.path", str(done), "--optimizer.learning_rate", "1e-9"]
    curriculum = ["--curriculum", SHORT_CURRICULUM]
    first_losses = []
    for memory in (
        [],
        ["--start.memory", "{anchors: meta, window: 64}"],
        ["--start.memory", "{anchors: meta, window: 2, num_sinks: 0}"],
    ):
        folder = tmp_path / f"run {len(first_losses)}"
        changed = config(*start_there, *curriculum, *memory, "--evaluation.instances", "10")
        finetune(changed, folder, show_progress=False)
        first_losses.append(numbers(folder)[0])
    assert open_model(folder).config.memory_policy.window == 2
    # a window of the whole prompt hides the anchors alone, a short one the text as well
    assert len(set(first_losses)) == 3
    assert first_losses == pytest.approx([first_losses[0]] * 3, abs=1)  # the trained weights, not new ones


OTHERS = {"landmark": "", "block_recurrent": ", window: 8, num_state_vectors: 4, recurrent_layer: 1"}


@pytest.mark.parametrize("kind", OTHERS)
def test_memory_mode_is_refused_for_a_model_of_another_attention(kind: str, config: Config, tmp_path: Path):
    attention = f"{{kind: {kind}{OTHERS[kind]}}}"
    finetune(
        config("--start.model.attention", attention, "--curriculum", SHORT_CURRICULUM),
        tmp_path / kind,
        show_progress=False,
    )
    start = ["--start.kind", "checkpoint", "--start.path", str(tmp_path / kind)]
    with pytest.raises(UsageError, match=rf"start\.memory: expected a metatokens model.*metatokens_{kind}"):
        finetune(config(*start, "--start.memory", "{window: 2}"), tmp_path / "run", show_progress=False)


def test_a_stage_longer_than_the_model_is_refused_before_anything_is_trained(config: Config, tmp_path: Path):
    with pytest.raises(UsageError, match=r"129.*at most the 128 positions"):
        finetune(config("--curriculum", "[{steps: 1, size: [3, 3], prompt_tokens: [1, 129]}]"), tmp_path / "run")


def test_meta_tokens_and_answers_count_in_the_length_of_a_stage(config: Config, tmp_path: Path):
    task = ["--task", "{kind: copying, meta_places: {kind: uniform, meta_ratio: 0.25}}"]
    stage = "[{{steps: 1, size: [8, 8], prompt_tokens: [{0}, {0}]}}]"
    with pytest.raises(UsageError, match=r"at most the 128 positions of the model, found an instance of 168, with"):
        finetune(config(*task, "--curriculum", stage.format(120)), tmp_path / "run", show_progress=False)
    # 90 text tokens, 30 meta-tokens and the 8 of the answer
    result = finetune(config(*task, "--curriculum", stage.format(90)), tmp_path / "run", show_progress=False)
    assert result.meta_tokens == 30 * 8


def test_the_commands_finetune_and_evaluate(preset: Path, done: Path, tmp_path: Path):
    plan = json.loads(metatokens("finetune", preset, "--dry-run", "--json").stdout)
    assert plan["steps"] == 24
    shutil.copytree(done, tmp_path / "run")
    result = json.loads(metatokens("finetune", preset, "--out", tmp_path / "run", "--json").stdout)
    assert result["steps"] == 24
    lengths = ["--lengths", "[17-24, 25-32, 201-220]", "--instances", "12"]
    report = json.loads(metatokens("evaluate", done, tmp_path / "run", *lengths, "--json").stdout)
    assert report["format"] == "recall/1"
    assert report["config"]["task"]["kind"] == "parity"
    rows = report["rows"]
    assert [row["length"] for row in rows] == ["17-24", "25-32", "201-220"]
    assert [len(row["sequence_outcomes"]) for row in rows] == [2, 2, 0]
    assert rows[0]["sequence_outcomes"][0] == rows[0]["sequence_outcomes"][1]  # one model twice
    assert 0 <= rows[0]["sequence_accuracy"]["low"] <= rows[0]["sequence_accuracy"]["estimate"] <= 1
    assert rows[2]["sequence_accuracy"] is None
    table = metatokens("evaluate", done, *lengths, "--intervention", "zero_embedding").stdout
    assert "201-220" in table
    assert "n/a" in table


def test_every_field_of_an_evaluation_is_an_override(done: Path):
    fields = {"seed": 5, "batch_size": 3, "instances": 7}
    flags = [f"--{key}={value}" for key, value in fields.items()]
    asked = json.loads(metatokens("evaluate", done, *flags, "--dry-run", "--json").stdout)
    assert {key: asked[key] for key in fields} == fields


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--task.kind", "paritty"], ["task.kind", "did you mean 'parity'?"]),
        (["--lengths", "[esay]"], ["esay", "easy"]),
        (["--lengths", "[1-5]"], ["parity", "1-5"]),
        (["--task.numbered", "true"], ["task.numbered"]),
        (["--intervention", "zero"], ["zero"]),
    ],
)
def test_a_wrong_question_is_one_line(done: Path, arguments: list[str], parts: list[str]):
    line = error_line("evaluate", done, *arguments, code=2)
    for part in parts:
        assert part in line


def test_a_model_without_a_task_is_not_evaluated(done: Path, tmp_path: Path):
    shutil.copytree(done / "model", tmp_path / "alone")
    line = error_line("evaluate", tmp_path / "alone", code=2)
    assert "the run folder of a recall task, or --task.kind" in line
    plan = json.loads(
        metatokens("evaluate", tmp_path / "alone", "--task.kind", "copying", "--dry-run", "--json").stdout
    )
    assert plan["task"]["kind"] == "copying"


def test_models_of_different_architectures_are_no_seeds_of_one_arm(done: Path, tmp_path: Path):
    shutil.copytree(done, tmp_path / "other")
    config = tmp_path / "other" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 7}))
    line = error_line("evaluate", done, tmp_path / "other", code=2)
    assert "found another num_hidden_layers" in line


def test_an_evaluation_ends_with_a_next_command_that_works(done: Path, tmp_path: Path):
    lengths = ["--lengths", "[17-24]", "--instances", "4"]
    assert metatokens("evaluate", done, *lengths, "--json").stderr == ""
    said = metatokens("evaluate", done, *lengths).stderr.splitlines()[-1]
    program, *arguments = shlex.split(said.removeprefix("next: "))
    assert program == "metatokens"
    arguments[arguments.index("analysis")] = str(tmp_path / "analysis")
    metatokens(*arguments, "--dry-run")
