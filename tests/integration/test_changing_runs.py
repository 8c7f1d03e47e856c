"""A run that goes on under other conditions: what is refused, what is allowed by name, and what is left on record."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import losses, small_config, weights

from commands import error_line, metatokens
from metatokens.config.schema import PretrainConfig
from metatokens.errors import CheckpointError, UsageError
from metatokens.training.checkpoint import TrainingState, read_state
from metatokens.training.pretraining import plan, pretrain
from metatokens.training.resuming import changes_of_bits
from metatokens.training.run_folder import RunFolder
from metatokens.verification import verify_folder

Config = Callable[..., PretrainConfig]
SECRET = "hunter2-of-the-bucket"


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    short = ("--training.duration.steps", "12", "--checkpoint.keep", "9", "--model.num_hidden_layers", "1")
    return lambda *overrides: small_config(preset, tokens, *short, *overrides)


@pytest.fixture(scope="module")
def uninterrupted(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    pretrain(config(), out, show_progress=False)
    return out


def cut_off_after(reference: Path, step: int, out: Path) -> Path:
    """Make the folder of a run that was killed after its checkpoint of this step."""
    shutil.copytree(reference, out)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return out


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_a_changed_learning_rate_is_refused_unless_it_is_allowed_and_then_on_record(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    out = cut_off_after(uninterrupted, 8, tmp_path / "run")
    lower = config("--optimizer.learning_rate", "1e-4")
    with pytest.raises(UsageError, match=r"or pass --allow-change optimizer\.learning_rate"):
        pretrain(lower, out, show_progress=False)
    (out / "config.yaml").unlink()  # the checkpoint knows too
    with pytest.raises(CheckpointError, match=r"or pass --allow-change optimizer\.learning_rate"):
        pretrain(lower, out, show_progress=False)
    with pytest.warns(UserWarning, match=r"bit_exact=false reason=optimizer\.learning_rate 0\.002->0\.0001$"):
        result = pretrain(lower, out, show_progress=False, allow_change=["optimizer.learning_rate"])
    assert not result.bit_exact
    assert RunFolder(out).read_result()["bit_exact"] is False
    assert events(out) == [
        {
            "step": 8,
            "event": "continued",
            "bit_exact": False,
            "reasons": ["optimizer.learning_rate 0.002->0.0001"],
        }
    ]
    assert weights(out) != weights(uninterrupted)
    assert read_state(out / "checkpoints" / "step-00000012").config["optimizer"]["learning_rate"] == 1e-4
    with pytest.raises(
        UsageError, match=r"seed: expected 0 as in its config\.yaml, found 1; take the old value, or an"
    ):
        pretrain(config("--seed", "1"), out, show_progress=False, allow_change=["optimizer"])


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("seed", "name such a key"),
        ("model.hidden_size", "name such a key"),
        ("optimiser.learning_rate", "did you mean"),
    ],
)
def test_a_key_that_no_run_may_change_is_refused_at_once(tokens: Path, key: str, remedy: str) -> None:
    line = error_line("pretrain", "tiny/meta", "--data.path", tokens, "--allow-change", key, code=2)
    assert f"--allow-change {key}: expected a key of optimizer, schedule" in line
    assert remedy in line


def test_a_run_that_goes_on_as_it_was_has_its_bits_and_says_so(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    out = cut_off_after(uninterrupted, 4, tmp_path / "run")
    assert pretrain(config(), out, show_progress=False).bit_exact
    assert events(out) == [{"step": 4, "event": "continued", "bit_exact": True, "reasons": []}]
    assert weights(out) == weights(uninterrupted)
    assert not (uninterrupted / "events.jsonl").exists()


def test_another_micro_batch_goes_on_with_a_warning_that_is_kept_through_later_checkpoints(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    out = cut_off_after(uninterrupted, 4, tmp_path / "run")
    smaller = config("--training.micro_batch_blocks", "2")
    with pytest.warns(UserWarning, match="bit_exact=false reason=micro_batch_blocks 4->2$"):
        pretrain(smaller, out, show_progress=False)
    again = cut_off_after(out, 8, tmp_path / "again")
    assert not pretrain(smaller, again, show_progress=False).bit_exact  # it goes on as it was, but is no longer exact


def test_every_condition_of_the_bits_is_a_reason(config: Config) -> None:
    run = config()
    environment = {"torch": "2.13.0", "threads": 1, "device": "cpu AVX2"}
    state = TrainingState(4, "id", 1, environment=environment, config=run.model_dump(mode="json"))
    assert list(changes_of_bits(state, run, environment, 1)) == []
    other = config("--training.compile", "true", "--training.micro_batch_blocks", "6")
    found = {"torch": "2.14.1", "threads": 2, "device": "cpu AVX512"}
    assert list(changes_of_bits(state, other, found, 2)) == [
        "world_size 1->2",
        "torch 2.13.0->2.14.1",
        "threads 1->2",
        "device cpu AVX2->cpu AVX512",
        "micro_batch_blocks 4->6",
        "compile False->True",
    ]


def test_a_run_begins_with_the_checkpoint_that_is_named_and_goes_on_with_its_own(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    named, out = uninterrupted / "checkpoints" / "step-00000004", tmp_path / "run"
    assert pretrain(config(), out, show_progress=False, resume=named).bit_exact
    assert weights(out) == weights(uninterrupted)
    assert min(losses(out)) == 5
    # killed after a checkpoint of its own, the same command goes on with that
    again = cut_off_after(out, 8, tmp_path / "again")
    pretrain(config(), again, show_progress=False, resume=named)
    assert [event["step"] for event in events(again)] == [4, 8]
    assert weights(again) == weights(uninterrupted)
    # without any, it may have been killed before the first one, but not after it
    gone = cut_off_after(out, 4, tmp_path / "gone")
    with pytest.raises(CheckpointError, match="logged step 12 and saves after step 8"):
        pretrain(config(), gone, show_progress=False, resume=named)


def test_a_run_that_began_with_a_named_checkpoint_does_not_begin_at_step_0_when_none_is_named(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    named, out = uninterrupted / "checkpoints" / "step-00000004", tmp_path / "run"
    own = config("--checkpoint.interval_steps", "8")
    pretrain(own, out, show_progress=False, resume=named)
    killed = cut_off_after(out, 0, tmp_path / "killed")
    log = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(log[:1]))
    assert list(losses(killed)) == [5]
    event = (killed / "events.jsonl").read_text()
    for metrics, record in ((log[0], event), (log[0], ""), ("", event)):
        (killed / "metrics.jsonl").write_text(metrics)
        (killed / "events.jsonl").write_text(record)
        with pytest.raises(CheckpointError, match=r"did not begin at step 0, found none; name the one .* --resume"):
            pretrain(own, killed, show_progress=False)
    pretrain(own, killed, show_progress=False, resume=named)
    assert weights(killed) == weights(uninterrupted)


@pytest.mark.parametrize("killed", [False, True], ids=["whole", "killed between result and model"])
def test_a_finished_run_that_is_lengthened_has_the_result_and_the_model_of_its_new_end(
    config: Config, uninterrupted: Path, tmp_path: Path, killed: bool
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    if killed:  # while the old result and then the old model were removed
        (out / "result.json").unlink()
    longer = config("--training.duration.steps", "16")
    with pytest.warns(UserWarning, match=r"reason=training\.duration .*16"):
        result = pretrain(longer, out, show_progress=False, allow_change=["training.duration"])
    state = read_state(out / "checkpoints" / "step-00000016")
    written = RunFolder(out).read_result()
    assert (result.steps, written["steps"], written["text_tokens"]) == (16, 16, state.text_tokens)
    assert written["final_loss"] == state.final_loss
    assert weights(out) == (out / "checkpoints" / "step-00000016" / "model.safetensors").read_bytes()
    assert weights(out) != weights(uninterrupted)
    assert verify_folder(out).problems == ()
    assert not list(out.glob(".*"))


def test_a_finished_run_refuses_a_value_that_would_train_nothing_and_keeps_its_config(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    before = (out / "config.yaml").read_bytes()
    lower = config("--optimizer.learning_rate", "1e-4")
    with pytest.raises(UsageError, match=r"0\.002 for a run that has no step left after step 12, found 0\.0001"):
        pretrain(lower, out, show_progress=False, allow_change=["optimizer.learning_rate"])
    pretrain(config("--training.micro_batch_blocks", "2"), out, show_progress=False)  # free, and it trains nothing
    assert (out / "config.yaml").read_bytes() == before


def test_a_named_checkpoint_that_is_damaged_is_refused_although_another_is_whole(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    out = cut_off_after(uninterrupted, 8, tmp_path / "run")
    named = out / "checkpoints" / "step-00000008"
    (named / "state.json").write_text((named / "state.json").read_text().replace('"step": 8', '"step": 9'))
    with pytest.raises(CheckpointError, match=r"step-00000008/state\.json: expected SHA-256"):
        pretrain(config(), out, show_progress=False, resume=named)


def test_a_named_checkpoint_never_goes_behind_those_of_the_run(
    config: Config, uninterrupted: Path, tmp_path: Path
) -> None:
    out = cut_off_after(uninterrupted, 8, tmp_path / "run")
    named = out / "checkpoints" / "step-00000004"
    with pytest.raises(UsageError, match="found newer ones, up to step-00000008; choose another --out"):
        pretrain(config(), out, show_progress=False, resume=named)


@pytest.mark.filterwarnings("default:bit_exact")
def test_the_command_resumes_from_a_named_checkpoint_with_an_allowed_change(
    uninterrupted: Path, tmp_path: Path
) -> None:
    preset, named = uninterrupted / "config.yaml", uninterrupted / "checkpoints" / "step-00000008"
    command = ["pretrain", preset, "--out", tmp_path / "run", "--resume", named, "--schedule.floor", "0.2"]
    assert "pass --allow-change schedule.floor" in error_line(*command, "--dry-run", code=4)
    done = metatokens(*command, "--allow-change", "schedule", "--json")
    assert "warning: bit_exact=false reason=schedule.floor 0.1->0.2" in done.stderr
    assert json.loads(done.stdout)["steps"] == 12
    missing = error_line(*command[:5], tmp_path / "nothing", code=4)
    assert "nothing: expected a checkpoint, a folder with state.json and manifest.json, found no such folder" in missing
    # nor is one looked for on the hub
    assert "OWNER/NAME: expected a checkpoint, a folder" in error_line(*command[:5], "OWNER/NAME", code=4)
    task = ("finetune", "tiny/recall", "--out", tmp_path / "task", "--resume", "OWNER/NAME")
    assert "OWNER/NAME: expected a checkpoint, a folder" in error_line(*task, code=4)


def test_no_secret_of_a_config_is_written_anywhere(config: Config, tmp_path: Path) -> None:
    secret = f"memory://me:{SECRET}@bucket/{tmp_path.name}?token={SECRET}"
    trackers = ("--logging.trackers", "[tensorboard]")
    own = config("--checkpoint.copy_to", secret, "--training.duration.steps", "8", *trackers)
    pretrain(own, tmp_path / "run", show_progress=False)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("tensorboard" in path.parts for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert "REDACTED@bucket" in (tmp_path / "run" / "checkpoints" / "step-00000008" / "state.json").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "result.json").unlink()
    pretrain(own, tmp_path / "run", show_progress=False)  # and it goes on


@pytest.mark.parametrize(("steps", "warns"), [("100", False), ("100000", True)])
def test_a_dry_run_warns_of_thousands_of_passes_over_the_same_text(config: Config, steps: str, warns: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = plan(config("--training.duration.steps", steps), "never-made")
    told = [str(one.message) for one in caught if "by heart" in str(one.message)]
    assert [f"{found['passes_over_the_text']:,.0f} times" in line for line in told] == [True] * warns
    assert (found["passes_over_the_text"] >= 1_000) == warns
