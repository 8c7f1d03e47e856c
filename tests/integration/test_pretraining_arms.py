"""Every arm goes through the same loop: it trains, resumes, is described, saved, loaded, evaluated and decoded."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import numbers, small_config, weights

from metatokens.cli import main
from metatokens.config.schema import NoInjection, PeriodicInjection, PretrainConfig
from metatokens.evaluation.perplexity import measure_perplexity
from metatokens.evaluation.windows import PerplexityOptions
from metatokens.generation.decoding import NoSchedule, PeriodicSchedule, generate_text
from metatokens.training.loading import ModelFolder, open_model
from metatokens.training.pretraining import pretrain

STEPS = 6
VOCABULARY = 300
PLAIN = ("--injection.kind", "none", "--data.block_size", "58")
ARMS = {
    "double": ("--model.meta_attention_over", "all", *PLAIN),
    "random": ("--model.meta_attention_over", "random", "--model.random_ratio", "0.3", *PLAIN),
    "cross": ("--model.meta_attention_over", "cross"),
    "thoughts": (
        "--model.thought_length",
        "3",
        "--injection",
        "{kind: thought, length: 3, ratio: 0.2, after: punctuation}",
    ),
    "alternating": (
        "--model.attention",
        "{kind: sliding_window, window: 8, layers: odd}",
        "--model.meta_attention_layers",
        "none",
        *PLAIN,
    ),
    "longformer": (
        "--model.attention",
        "{kind: longformer, window: 8, meta_tokens_are_global: true}",
        "--model.meta_attention_layers",
        "none",
    ),
    "bigbird": ("--model.attention", "{kind: bigbird, block_size: 8}", "--model.meta_attention_layers", "none", *PLAIN),
    "block_recurrent": (
        "--model.attention",
        "{kind: block_recurrent, window: 8, num_state_vectors: 4, recurrent_layer: 1}",
        "--data.block_size",
        "64",
    ),
    "landmark": (
        "--model.attention",
        "{kind: landmark, every: 7}",
        "--model.meta_attention_layers",
        "none",
        "--model.loss_policy",
        "retarget",
        "--injection",
        "{kind: periodic, ratio: 0.125}",
    ),
}
Config = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    steps = ["--training.duration.steps", str(STEPS), "--optimizer.learning_rate", "1e-2"]
    return lambda *overrides: small_config(preset, tokens, *steps, *overrides)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_and_its_model_is_described_loaded_evaluated_and_decoded(
    arm: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(*ARMS[arm])
    result = pretrain(settings, tmp_path / "run", show_progress=False)
    losses = numbers(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.3)
    assert result.final_loss is not None
    assert result.final_loss < losses[0] - 0.5

    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == result.num_parameters

    folder = tmp_path / "run" / "model"
    model, tokenizer = open_model(folder), ModelFolder(folder).tokenizer
    has_meta = settings.injection.kind != "none"
    options = PerplexityOptions(
        window=40, injection=PeriodicInjection(ratio=0.125) if has_meta else NoInjection(), batch_size=2
    )
    text = "the cat sat on the mat. a dog ran to the far hill, and nobody knew why it was so. " * 4
    score = measure_perplexity(model, [("text", text)], tokenizer, options)
    assert 0 < score.nats_per_token.estimate < math.log(VOCABULARY)
    generated = generate_text(
        model,
        tokenizer,
        "the cat",
        schedule=PeriodicSchedule(text_tokens=7) if has_meta else NoSchedule(),
        max_text_tokens=8,
    )
    assert generated.text_tokens <= 8


@pytest.mark.parametrize("arm", ["random", "landmark"])
def test_an_arm_resumes_to_the_bit(arm: str, config: Config, tmp_path: Path) -> None:
    settings = config(*ARMS[arm], "--checkpoint.interval_steps", "3", "--checkpoint.keep", "9")
    pretrain(settings, tmp_path / "run", show_progress=False)
    whole = weights(tmp_path / "run")
    # back to the middle: without its end the run goes on from step 3
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    pretrain(settings, tmp_path / "run", show_progress=False)
    assert weights(tmp_path / "run") == whole
