"""A run whose loss jumps or whose numbers blow up: what it skips, what it records, and what it keeps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import small_config, weights

from metatokens.config.schema import PretrainConfig
from metatokens.data.shards import TokenDataset
from metatokens.errors import NumericError
from metatokens.training.checkpoint import read_state, write_manifest
from metatokens.training.pretraining import _loader, pretrain
from metatokens.verification import verify_folder

Config = Callable[..., PretrainConfig]
SKIP = ("--training.skip_spikes", "true")
FAR = ("--optimizer.gradient_clip", "off", "--checkpoint.interval_steps", "1", "--checkpoint.keep", "2")


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    short = ("--training.duration.steps", "12", "--model.num_hidden_layers", "1", "--evaluation.interval_steps", "off")
    return lambda *overrides: small_config(preset, tokens, *short, *overrides)


@pytest.fixture(scope="module")
def begun(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that skips spikes, killed after its first four steps."""
    out = tmp_path_factory.mktemp("begun") / "run"
    pretrain(config(*SKIP, "--checkpoint.keep", "9"), out, show_progress=False)
    for path in (out / "model", out / "checkpoints" / "step-00000008", out / "checkpoints" / "step-00000012"):
        shutil.rmtree(path)
    (out / "result.json").unlink()
    return out


def with_low_losses_before(begun: Path, out: Path) -> Path:
    """Make the run believe that its losses were about 0.5, so that its next ones, of about 5, are spikes."""
    shutil.copytree(begun, out)
    checkpoint = out / "checkpoints" / "step-00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    state["recent_losses"] = [0.5 + 0.001 * (i % 5) for i in range(128)]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    return out


def unusual(out: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "unusual step"]


def sample_ids(config: PretrainConfig, step: int) -> list[int]:
    with TokenDataset.open(config.data.path) as dataset:
        return _loader(config, dataset, "train", batch_blocks=12).samples_at(step)[0].tolist()


@pytest.mark.filterwarnings("ignore:step")
def test_spikes_are_skipped_until_they_are_usual_recorded_with_their_samples_and_the_same_after_a_kill(
    config: Config, begun: Path, tmp_path: Path
) -> None:
    own = config(*SKIP, "--checkpoint.keep", "9")
    out = with_low_losses_before(begun, tmp_path / "run")
    with pytest.warns(UserWarning, match=r"step 5 changes nothing: its loss 5.* is a spike, limit 0\.6"):
        pretrain(own, out, show_progress=False)
    steps = {name: out / "checkpoints" / f"step-0000{name}" for name in ("0004", "0008", "0012")}
    four, eight, last = ((path / "model.safetensors").read_bytes() for path in steps.values())
    assert four == eight != last
    state = read_state(steps["0012"])
    assert (state.skipped_steps, state.loss_spikes, state.consecutive_skips) == (4, 4, 0)
    assert [(event["step"], event["reason"], event["skipped"]) for event in unusual(out)] == [
        (step, "spike", True) for step in (5, 6, 7, 8)
    ]
    assert [event["samples"] for event in unusual(out)] == [sample_ids(own, step) for step in range(4, 8)]
    # the memory of losses is in the checkpoint
    shutil.copytree(out, tmp_path / "killed")
    killed = with_low_losses_before(begun, tmp_path / "twice")
    shutil.copytree(steps["0008"], killed / "checkpoints" / "step-00000008")
    pretrain(own, killed, show_progress=False)
    assert weights(killed) == weights(out)


@pytest.mark.filterwarnings("ignore:bit_exact", "ignore:step")
def test_a_spike_is_learnt_from_with_a_warning_and_a_count_unless_the_run_skips_it(
    config: Config, begun: Path, tmp_path: Path
) -> None:
    out = with_low_losses_before(begun, tmp_path / "run")
    with pytest.warns(UserWarning, match=r"step 5 is learnt from: its loss 5.* is a spike") as caught:
        pretrain(config(), out, show_progress=False, allow_change=["training.skip_spikes"])
    told = [str(one.message).split()[1] for one in caught if "spike" in str(one.message) and "step" in str(one.message)]
    assert told[:3] == ["5", "6", "8"]  # the first, second and fourth of four
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss_spikes"] == len(unusual(out)) >= 3
    assert last["skipped_steps"] == 0
    before, after = (out / "checkpoints" / name / "model.safetensors" for name in ("step-00000008", "step-00000012"))
    assert before.read_bytes() != after.read_bytes()


@pytest.mark.filterwarnings("ignore:bit_exact", "ignore:step")
@pytest.mark.parametrize(
    ("learning_rate", "message", "kept"),
    [
        # weights so large that the forward pass overflows from then on, each saved as good as the numbers say
        ("1e30", "step 9: expected a finite loss and gradient, found 4 steps in a row without", [4, 7, 8]),
        ("1e300", "step-00000005: expected finite weights, found infinities or NaN", [4]),
    ],
)
def test_when_numbers_blow_up_the_state_is_kept_for_a_diagnosis_and_a_good_checkpoint_too(
    config: Config, begun: Path, tmp_path: Path, learning_rate: str, message: str, kept: list[int]
) -> None:
    out = shutil.copytree(begun, tmp_path / "run")
    good = (out / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes()
    wild = config(*SKIP, *FAR, "--optimizer.learning_rate", learning_rate)
    for _ in range(2):  # the second diagnosis takes the place of the first
        with pytest.raises(NumericError, match=message):
            pretrain(wild, out, show_progress=False, allow_change=["optimizer"])
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in kept]
        assert (out / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes() == good
    state = read_state(out / "diagnostic")
    assert state.step == (9 if kept[-1] == 8 else 5)
    assert (out / "diagnostic" / "model.safetensors").read_bytes() != good
    assert (out / "diagnostic" / "optimizer.safetensors").exists()
    assert verify_folder(out).problems == ()
    for event in unusual(out):
        assert (event["reason"], event["skipped"]) == ("not finite", True)
        assert event["samples"] == sample_ids(wild, event["step"] - 1)
