"""A training whose numbers are none ends with exit code 5 and says what it leaves, however often it is started."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import small_config

from metatokens.config.schema import PretrainConfig
from metatokens.errors import NumericError
from metatokens.training import loop
from metatokens.training.pretraining import pretrain

Config = Callable[..., PretrainConfig]
# the first step throws the weights so far that the forward pass overflows from then on
FAR = ("--optimizer.learning_rate", "1e30", "--optimizer.gradient_clip", "null", "--schedule.warmup_steps", "0")
UNJUDGED = ("--evaluation.interval_steps", "off")

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes nothing")


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    return lambda *overrides: small_config(preset, tokens, *FAR, *overrides)


def error_of(config: PretrainConfig, out: Path) -> str:
    with pytest.raises(NumericError) as caught:
        pretrain(config, out, show_progress=False)
    assert caught.value.exit_code == 5
    assert not (out / "result.json").exists()
    assert not (out / "model").exists()
    return str(caught.value)


def test_a_run_that_ends_in_steps_that_change_nothing_is_no_trained_model(config: Config, tmp_path: Path):
    run = config("--training.duration.steps", "3", *UNJUDGED)
    for _ in range(2):  # nor does its last checkpoint make it one
        line = error_of(run, tmp_path / "run")
        assert "end of the run: expected a finite loss and gradient, found none in the last 2 steps" in line
        assert f"checkpoint {tmp_path / 'run/checkpoints/step-00000003'} is left as it was" in line


def test_a_validation_loss_that_is_no_number_ends_the_run(config: Config, tmp_path: Path):
    run = config("--training.duration.steps", "2", "--evaluation.interval_steps", "1")
    line = error_of(run, tmp_path / "run")
    assert "evaluation after step 1: expected a finite validation loss, found nan" in line
    assert "no checkpoint was made before" in line


def test_too_many_steps_that_change_nothing_end_the_run(config: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPS", 1)
    line = error_of(config("--training.duration.steps", "8", *UNJUDGED), tmp_path / "run")
    assert "step 3: expected at most 1 steps that change nothing, found 2" in line
    assert (tmp_path / "run" / "diagnostic").exists()


def test_steps_that_change_nothing_count_across_a_resume(config: Config, tmp_path: Path):
    run = config("--training.duration.steps", "8", "--checkpoint.interval_steps", "1", *UNJUDGED)
    line = error_of(run, tmp_path / "run")
    assert "step 5: expected a finite loss and gradient, found 4 steps in a row without" in line
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    shutil.rmtree(newest)
    assert error_of(run, tmp_path / "run") == line  # two such steps before the resume, two after it
