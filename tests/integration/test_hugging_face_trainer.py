"""The Hugging Face Trainer trains the same model on the collator's batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from metatokens import MetaTokenCollator
from metatokens.config.schema import ModelConfig, UniformInjection
from metatokens.data.shards import TokenDataset
from metatokens.model import MetaTokenForCausalLM
from metatokens.training.initialization import build_model

NUM_ROWS = 8


@pytest.fixture(scope="module")
def rows(tokens: Path) -> list[dict[str, list[int]]]:
    """Rows of different lengths, so that micro-batches differ in their number of targets."""
    with TokenDataset.open(tokens) as dataset:
        return [{"input_ids": dataset.read("train", 60 * i, 20 + 4 * i).tolist()} for i in range(NUM_ROWS)]


@pytest.fixture
def make_model() -> Callable[[], MetaTokenForCausalLM]:
    config = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    return lambda: build_model(config, text_vocab_size=300, eos_token_id=0, seed=0)


def collator(model: MetaTokenForCausalLM) -> MetaTokenCollator:
    meta, pad = model.config.meta_token_id, model.config.pad_token_id
    return MetaTokenCollator(UniformInjection(), meta_token_id=meta, pad_token_id=pad)


def trainer_of(model: MetaTokenForCausalLM, rows: Any, out: Path, **changes: Any) -> Trainer:
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": NUM_ROWS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    settings = TrainingArguments(output_dir=str(out), **{**arguments, **changes})
    return Trainer(model, settings, data_collator=collator(model), train_dataset=rows)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_loss_falls_from_that_of_guessing(make_model: Any, rows: Any, tmp_path: Path):
    trainer = trainer_of(make_model(), rows, tmp_path, max_steps=12)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


def test_its_loss_is_the_mean_over_all_targets_of_the_step(make_model: Any, rows: Any, tmp_path: Path):
    model = make_model()
    batch = collator(model)(rows)
    with torch.no_grad():
        expected = float(model(**batch).loss)
    trainer = trainer_of(model, rows, tmp_path, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_accumulation_counts_the_targets_of_the_whole_step(make_model: Any, rows: Any, tmp_path: Path):
    whole, parts = make_model().double(), make_model().double()  # Adam makes a step of the sign of a rounding error
    both = []
    for model, size in ((whole, NUM_ROWS), (parts, NUM_ROWS // 2)):
        accumulation = {"per_device_train_batch_size": size, "gradient_accumulation_steps": NUM_ROWS // size}
        trainer = trainer_of(model, rows, tmp_path / str(size), max_steps=3, **accumulation)
        trainer.train()
        both.append(losses(trainer))
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_it_resumes_from_its_own_checkpoint(make_model: Any, rows: Any, tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(make_model(), rows, tmp_path, **saving)
    whole.train()
    resumed = trainer_of(make_model(), rows, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
