"""Open the model and the tokenizer in a run folder, a checkpoint, or a model folder."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

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
        if not str(json.loads((folder / "config.json").read_text()).get("model_type")).startswith("metatokens"):
            raise ValueError("a model_type of another package")
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            str(folder), expected="a model of this package", found=str(error), remedy="use another checkpoint"
        ) from None
    finally:
        if bar_was_shown:
            logging.enable_progress_bar()


def open_tokenizer(path: Path) -> Tokenizer:
    """Return the text tokenizer of a model."""
    return load_text_tokenizer(str(path / "model" if (path / "model" / "tokenizer.json").is_file() else path))
