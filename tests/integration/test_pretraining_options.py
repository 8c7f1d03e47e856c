"""What a run can be told changes how it computes, not what; and it learns."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import ROUNDING, numbers, small_config, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from metatokens.config.schema import PretrainConfig
from metatokens.data.loader import TokenBlocks
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions
from metatokens.errors import NumericError, UsageError
from metatokens.training.checkpoint import find_checkpoint, read_state
from metatokens.training.distributed import Processes
from metatokens.training.initialization import build_model
from metatokens.training.pretraining import evaluation_of, plan, pretrain, vocabulary

Config = Callable[..., PretrainConfig]
STEPS = 8
VOCABULARY = 300


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    steps = ["--training.duration.steps", str(STEPS)]
    return lambda *overrides: small_config(preset, tokens, *steps, *overrides)


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    pretrain(config("--training.micro_batch_blocks", "12"), out, show_progress=False)
    return out


PLAIN = ("--model.meta_attention_layers", "none", "--injection.kind", "none", "--data.block_size", "58")


@pytest.mark.parametrize("changes", [(), PLAIN, ("--model.loss_policy", "retarget")], ids=["meta", "plain", "retarget"])
def test_the_loss_falls_far_below_that_of_guessing(config: Config, tmp_path: Path, changes: tuple[str, ...]):
    learn = [
        "--training.duration.steps",
        "50",
        "--optimizer.learning_rate",
        "1e-2",
        "--checkpoint.interval_steps",
        "off",
    ]
    learn += ["--training.micro_batch_blocks", "12", "--evaluation.interval_steps", "50"]
    result = pretrain(config(*learn, *changes), tmp_path / "run", show_progress=False)
    losses = numbers(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.3)
    assert result.final_loss == losses[-1] < 0.4 * math.log(VOCABULARY)
    assert result.validation
    assert result.validation["validation_loss"] < 0.4 * math.log(VOCABULARY)


@pytest.mark.parametrize("micro_batch_blocks", [1, 4])
def test_accumulated_micro_batches_train_as_one_batch(
    config: Config, reference: Path, tmp_path: Path, micro_batch_blocks: int
):
    changed = config("--training.micro_batch_blocks", str(micro_batch_blocks))
    pretrain(changed, tmp_path / "run", show_progress=False)
    assert numbers(tmp_path / "run") == pytest.approx(numbers(reference), rel=ROUNDING)


@pytest.mark.parametrize(("asked", "evaluated"), [("10", 10), ("1", 1), ("100000", None)])
def test_an_evaluation_is_of_the_blocks_asked_for_whatever_the_micro_batch_and_the_processes(
    config: Config, tokens: Path, asked: str, evaluated: int | None
):
    found = {}
    with TokenDataset.open(tokens) as dataset, torch.no_grad():
        model = build_model(config().model, **vocabulary(dataset), seed=0).eval()
        if evaluated is None:
            evaluated = len(TokenBlocks(dataset, "validation", 58))
            assert evaluated > 12
        for rows, world_size in ((1, 1), (3, 1), (4, 1), (8, 1), (24, 1), (4, 2), (3, 3), (1, 5)):
            changed = config(
                *["--training.batch_blocks", "24", "--training.micro_batch_blocks", str(rows)],
                *["--evaluation.blocks", asked],
            )
            processes = [Processes(rank, world_size) for rank in range(world_size)]
            parts = [evaluation_of(changed, dataset, process, model)()["validation_loss"] for process in processes]
            found[rows, world_size] = [sum(column) for column in zip(*parts, strict=True)]
    assert {count for _, count in found.values()} == {58 * evaluated}
    assert [loss for loss, _ in found.values()] == pytest.approx([found[1, 1][0]] * len(found), rel=ROUNDING)


def test_an_evaluation_spreads_positions_of_a_range_over_the_block_and_not_over_the_window(
    config: Config, tokens: Path
):
    losses = []
    with TokenDataset.open(tokens) as dataset, torch.no_grad():
        for window in ("64", "190"):  # a block has 64 positions
            changed = config("--model.position_range", "200", "--model.max_position_embeddings", window)
            model = build_model(changed.model, **vocabulary(dataset), seed=0).eval()
            losses.append(evaluation_of(changed, dataset, Processes(0, 1), model)()["validation_loss"][0])
    assert losses[0] == losses[1]  # the same sums in the same order; elsewhere, the loss of a fresh model hardly moves


def test_gradient_checkpointing_gives_equal_losses(config: Config, reference: Path, tmp_path: Path):
    changed = config("--training.micro_batch_blocks", "12", "--training.gradient_checkpointing", "true")
    pretrain(changed, tmp_path / "run", show_progress=False)
    assert numbers(tmp_path / "run") == pytest.approx(numbers(reference), rel=1e-6)


def test_the_same_run_twice_gives_the_same_bits(config: Config, reference: Path, tmp_path: Path):
    pretrain(config("--training.micro_batch_blocks", "12"), tmp_path / "run", show_progress=False)
    assert weights(tmp_path / "run") == weights(reference)


def test_bfloat16_learns_and_keeps_float32_weights(config: Config, tmp_path: Path):
    changed = config("--training.precision", "bfloat16", "--training.duration.steps", "20")
    pretrain(changed, tmp_path / "run", show_progress=False)
    losses = numbers(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "backend",
    [
        # traces and differentiates as the other does, which also writes thirty files of C++ and compiles them
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler on the CPU"),
            ],
        ),
    ],
)
def test_a_compiled_step_gives_the_same_losses(config: Config, tmp_path: Path, backend: str):
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend(backend)
    try:
        for name, compiled in (("eager", "false"), ("compiled", "true")):
            changed = config(
                *["--model.num_hidden_layers", "1", "--training.duration.steps", "4"],
                *["--training.micro_batch_blocks", "6", "--evaluation.interval_steps", "off"],
                *["--training.compile", compiled],
            )
            pretrain(changed, tmp_path / name, show_progress=False)
    finally:
        torch.compiler.set_default_backend(before)
    assert numbers(tmp_path / "compiled") == pytest.approx(numbers(tmp_path / "eager"), rel=1e-4)


def test_a_finished_run_loads_as_a_hugging_face_model_with_its_tokenizer(reference: Path):
    model = AutoModelForCausalLM.from_pretrained(reference / "model")
    tokenizer = AutoTokenizer.from_pretrained(reference / "model")
    assert type(model).__name__ == "MetaTokenForCausalLM"
    ids = tokenizer("the cat sat on the mat.", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert sorted(path.name for path in reference.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "lock",
        "metrics.jsonl",
        "model",
        "result.json",
        "versions.json",
    ]


def test_tokens_are_counted_apart(config: Config, reference: Path, tmp_path: Path):
    result = pretrain(config("--training.micro_batch_blocks", "12"), reference, show_progress=False)
    assert (result.text_tokens, result.meta_tokens) == (STEPS * 12 * 58, STEPS * 12 * 6)
    planned = plan(config(), tmp_path / "none")
    assert (planned["text_tokens"], planned["steps"]) == (result.text_tokens, STEPS)
    assert planned["parameters"] == result.num_parameters


def test_a_step_without_a_finite_gradient_changes_nothing_and_the_fourth_in_a_row_ends_the_run(
    config: Config, tmp_path: Path
):
    # the first step throws the weights so far that the forward pass overflows from then on
    changed = config(
        *["--optimizer.learning_rate", "1e30", "--optimizer.weight_decay", "0", "--schedule.warmup_steps", "0"],
        *["--checkpoint.interval_steps", "1", "--checkpoint.keep", "9", "--evaluation.interval_steps", "off"],
    )
    with (
        pytest.warns(UserWarning, match="its gradient is not finite"),
        pytest.raises(NumericError, match="4 steps in a row") as caught,
    ):
        pretrain(changed, tmp_path / "run", show_progress=False)
    assert caught.value.exit_code == 5
    folder = tmp_path / "run" / "checkpoints"
    last = find_checkpoint(folder)
    assert last == folder / "step-00000004"
    assert read_state(last).skipped_steps == 3
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (last / file).read_bytes() == (folder / "step-00000001" / file).read_bytes()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 3]


def test_without_a_data_path_the_remedy_is_named(config: Config, tmp_path: Path):
    with pytest.raises(UsageError, match=r"data\.path: .* run `metatokens prepare`"):
        pretrain(config("--data.path", "null"), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (("--training.batch_blocks", "4000"), "at least one batch of 4000 blocks"),
        (("--data.block_size", "200000", "--model.max_position_embeddings", "200000"), "one block of 180000"),
        (("--model.hidden_act", "geluu"), "did you mean 'gelu'"),
        (("--logging.trackers", "[wandb]"), "the package wandb"),
    ],
    ids=["batch", "block", "activation", "tracker"],
)
def test_a_refused_start_does_not_stand_in_the_way_of_the_corrected_one(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: tuple[str, ...], named: str
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UsageError, match=named):
        pretrain(config(*mistake), tmp_path / "run", show_progress=False)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "checkpoints"}
    pretrain(config("--training.duration.steps", "1"), tmp_path / "run", show_progress=False)


def test_tokens_without_a_validation_split_are_refused_with_a_remedy_that_works(
    config: Config, tokens: Path, tmp_path: Path
):
    prepare(
        str(tokens.parent / "text"),
        tmp_path / "tokens",
        tokenizer=str(tokens),
        vocab_size=0,
        validation_fraction=0,
        shard_tokens=5_000,
        options=SourceOptions(),
    )
    changes = ["--data.path", str(tmp_path / "tokens"), "--training.duration.steps", "1"]
    with pytest.raises(UsageError, match=r"pass --evaluation\.interval_steps null"):
        pretrain(config(*changes), tmp_path / "run", show_progress=False)
    changes += ["--evaluation.interval_steps", "null"]
    assert pretrain(config(*changes), tmp_path / "run", show_progress=False).validation == {}
