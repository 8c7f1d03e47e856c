"""Open the model, its config and the tokenizer in a run folder, a checkpoint, or a model folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig
from metatokens.config.loading import load_preset, override
from metatokens.config.schema import Injection, ModelConfig
from metatokens.data.tokenizer import load_text_tokenizer
from metatokens.errors import CheckpointError


def model_folder(path: Path) -> Path:
    """Return the folder of the model: `model/` of a run, or the folder itself.

    Raises:
        CheckpointError: if there is no config.json.
    """
    folder = path / "model" if (path / "model" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            str(path),
            expected="a folder with config.json",
            found="none",
            remedy="name a run, its model/ or a checkpoint",
        )
    return folder


def open_model(path: Path) -> Any:
    """Return a model of this package in evaluation mode.

    Raises:
        CheckpointError: if there is none, or it does not load.
    """
    folder = model_folder(path)
    bar_was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _one_line_errors(folder):
            return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    finally:
        if bar_was_shown:
            logging.enable_progress_bar()


def open_config(path: Path) -> Any:
    """Return the Hugging Face config of a model of this package.

    Raises:
        CheckpointError: if there is none.
    """
    folder = model_folder(path)
    with _one_line_errors(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def open_shape(path: Path) -> ModelConfig:
    """Return the shape of a model as a run's config has it.

    Raises:
        CheckpointError: if there is no model, or one that no run of this package has made.
    """
    config = open_config(path)
    try:
        return ModelConfig.from_hf(config.to_dict())
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(
            str(model_folder(path) / "config.json"),
            expected="a model that a run of this package has made",
            found=f"{'.'.join(str(key) for key in problem['loc'])}: {problem['msg']}",
            remedy="use another checkpoint",
        ) from None


def injection_of(path: Path) -> Injection | None:
    """Return how the pre-training that made a model injected meta-tokens; None where no run's config tells.

    Args:
        path: a run, its model/, or one of its checkpoints/step-...
    """
    whole = path.absolute()
    run = whole.parent if whole.name == "model" else whole.parents[1] if whole.parent.name == "checkpoints" else whole
    text = (run / "config.yaml").read_text(encoding="utf-8") if (run / "config.yaml").is_file() else ""
    return load_preset(run / "config.yaml").injection if text and "curriculum" not in text else None


@contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        if not str(json.loads((folder / "config.json").read_text()).get("model_type")).startswith("metatokens"):
            raise ValueError("a model_type of another package")
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            str(folder), expected="a model of this package", found=str(error), remedy="use another checkpoint"
        ) from None


def open_tokenizer(path: Path) -> Tokenizer:
    """Return the text tokenizer of a model."""
    return load_text_tokenizer(str(path / "model" if (path / "model" / "tokenizer.json").is_file() else path))


def questions_to(path: Path, overrides: Sequence[str]) -> EvaluateConfig:
    """Return what a model is asked: the task, the size and the test of its run, changed by overrides.

    A model that no fine-tuning run left behind is asked the defaults.
    """
    config = EvaluateConfig()
    if (path / "config.yaml").is_file() and "curriculum" in (path / "config.yaml").read_text(encoding="utf-8"):
        run = load_preset(path / "config.yaml", schema=FinetuneConfig)
        config = EvaluateConfig(task=run.task, size=run.curriculum[-1].size, seed=run.seed, **run.test.model_dump())
    return override(config, overrides, origin="evaluate")
