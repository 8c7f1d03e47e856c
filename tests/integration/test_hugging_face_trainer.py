"""The Hugging Face Trainer trains the same model on the collator's batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from metatokens import MetaTokenCollator, MetaTokenForSequenceClassification, MetaTokenForTokenClassification
from metatokens.baselines.building import MODEL_CLASSES
from metatokens.config.schema import ModelConfig, UniformInjection
from metatokens.data.shards import TokenDataset
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import REMOTE_CODE
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
    return Trainer(model, settings, data_collator=collator(model), train_dataset=rows, eval_dataset=rows)


@torch.no_grad()
def mean_loss(model: MetaTokenForCausalLM, rows: Any) -> float:
    return float(model.eval()(**collator(model)(rows)).loss)


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


def test_its_checkpoint_brings_the_code_of_the_model(make_model: Any, rows: Any, tmp_path: Path):
    trainer_of(make_model(), rows, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert {path.stem for path in (tmp_path / "checkpoint-1").glob("*.py")} == set(REMOTE_CODE)


# What Trainer infers from names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", MODEL_CLASSES.values())
def test_a_batch_with_labels_alone_has_all_labels_of_a_language_model(model_class: Any):
    assert find_labels(model_class) == ["labels"]


def test_evaluation_gives_the_mean_loss(make_model: Any, rows: Any, tmp_path: Path):
    model = make_model()
    metrics = trainer_of(model, rows, tmp_path, per_device_eval_batch_size=NUM_ROWS).evaluate()
    assert metrics["eval_loss"] == pytest.approx(mean_loss(model, rows), rel=1e-5)


def test_training_ends_with_the_model_of_the_lowest_evaluated_loss(make_model: Any, rows: Any, tmp_path: Path):
    model = make_model()
    saving = {
        f"{what}_{how}": value for what in ("save", "eval") for how, value in (("strategy", "steps"), ("steps", 1))
    }
    # so fast that the loss rises again
    options = {"learning_rate": 0.5, "load_best_model_at_end": True, "per_device_eval_batch_size": NUM_ROWS, **saving}
    trainer = trainer_of(model, rows, tmp_path, max_steps=3, **options)
    trainer.train()
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert min(evaluated) < evaluated[-1]
    assert mean_loss(trainer.model, rows) == pytest.approx(min(evaluated), rel=1e-5)


@pytest.mark.parametrize("attention", ["full", "sliding_window", "landmark"])
def test_label_smoothing_smooths_the_loss_of_the_next_token(attention: str, rows: Any, tmp_path: Path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = ModelConfig(**shape, attention={"kind": attention})
    model = build_model(config, text_vocab_size=300, eos_token_id=0, seed=0)
    epsilon = 0.1
    options = {"label_smoothing_factor": epsilon, "max_steps": 1, "per_device_eval_batch_size": NUM_ROWS}
    trainer = trainer_of(model, rows, tmp_path, **options)
    batch = collator(model)(rows)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        log_probabilities = model.eval()(**batch).logits[:, :-1].log_softmax(-1)[labels != -100]
    expected = -(1 - epsilon) * log_probabilities.gather(1, labels[labels != -100][:, None]).mean()
    expected -= epsilon * log_probabilities.mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(float(expected), rel=1e-4)


def test_metrics_see_the_logits_and_labels_of_every_row(make_model: Any, rows: Any, tmp_path: Path):
    model = make_model()
    settings = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=3)

    def most_likely(logits: Tensor, labels: Tensor) -> Tensor:
        assert logits.shape == (*labels.shape, model.config.vocab_size)
        return logits.argmax(-1)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((predicted == labels)[labels != -100].mean())}

    trainer = Trainer(
        model,
        settings,
        data_collator=collator(model),
        eval_dataset=rows,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=most_likely,
    )
    batch = collator(model)(rows)
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        right = model.eval()(**batch).logits.argmax(-1)[:, :-1] == labels
    output = trainer.predict(rows)
    assert output.predictions.shape == output.label_ids.shape == batch["labels"].shape
    assert output.metrics["test_accuracy"] == pytest.approx(float(right[labels != -100].float().mean()))
    assert trainer.evaluate()["eval_accuracy"] == output.metrics["test_accuracy"]


def test_labels_that_count_meta_tokens_are_warned_of(
    make_model: Any, rows: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = make_model()
    batch = collator(model)(rows[:2])
    at_meta = batch["input_ids"] == model.config.meta_token_id
    assert at_meta.any()

    counted = batch | {"labels": torch.where(at_meta, batch["input_ids"], batch["labels"])}

    trainer = trainer_of(model, rows[:2], tmp_path)
    right = trainer.evaluate()["eval_loss"]
    assert "too low" not in caplog.text
    other = make_model()
    trainer = trainer_of(other, rows[:2], tmp_path)
    trainer.data_collator = lambda _: counted
    wrong = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == wrong
    assert caplog.text.count("too low by their share") == 1
    assert wrong < right
    with torch.no_grad():  # without a count of the caller's own the loss is right
        assert float(other.eval()(**counted).loss) == pytest.approx(right, rel=1e-5)


def test_loss_of_the_users_own_gets_the_logits(make_model: Any, rows: Any, tmp_path: Path):
    def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    model = make_model()
    expected = mean_loss(model, rows)
    trainer = trainer_of(model, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = own_loss
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("model_class", [MetaTokenForSequenceClassification, MetaTokenForTokenClassification])
def test_accumulated_steps_of_a_classifier_are_those_of_the_whole_batch(
    model_class: Any, make_model: Any, rows: Any, tmp_path: Path
):
    config = make_model().config
    config.num_labels = 3
    numbers = np.random.default_rng(0)
    labelled = []
    for row in rows:
        ids = row["input_ids"][:20]  # equal lengths, so that the mean over batches is the mean over all
        shape = len(ids) if model_class is MetaTokenForTokenClassification else None
        labelled.append({"input_ids": ids, "labels": numbers.integers(3, size=shape).tolist()})
    models = []
    for size in (NUM_ROWS, NUM_ROWS // 2):
        torch.manual_seed(0)
        trainer = trainer_of(
            model_class(config),
            labelled,
            tmp_path / str(size),
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=NUM_ROWS // size,
        )
        trainer.data_collator = lambda batch: {
            name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")
        }
        trainer.train()
        models.append(trainer.model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
