"""Open the model and the tokenizer in a run folder, a checkpoint, or a model folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig
from metatokens.config.loading import load_preset, override
from metatokens.config.schema import PretrainConfig
from metatokens.data.tokenizer import load_text_tokenizer
from metatokens.errors import CheckpointError
from metatokens.training.checkpoint import verify_model

# what a config.json with a wrong value, or weights of another shape, end in somewhere inside of transformers
_DOES_NOT_LOAD = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(StrictDataclassError, SafetensorError),
)


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
        CheckpointError: if there is none, a file is not what its manifest says, it does not load, or its weights are
            not those that its config.json describes, to the name and shape of each.
    """
    folder = model_folder(path)
    verify_model(folder)
    try:
        if not str(json.loads((folder / "config.json").read_text()).get("model_type")).startswith("metatokens"):
            raise ValueError("a model_type of another package")
        with _silent_transformers():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except _DOES_NOT_LOAD as error:
        raise CheckpointError(
            str(folder),
            expected="a model of this package",
            found=f"{type(error).__name__}: {error}",
            remedy="use another checkpoint",
        ) from None
    _check_weights(folder, loaded)
    return model.eval()


def pretraining_of(path: Path) -> PretrainConfig | None:
    """Return the config of the run that a run folder, its `model/` or one of its checkpoints belongs to.

    None where no config.yaml is around, or that of another kind of run, whose blocks are not fixed.
    """
    folder = path.absolute()
    above = folder.parent if folder.name == "model" else folder.parent.parent
    for run in (folder, above):
        file = run / "config.yaml"
        if file.is_file() and "\ninjection:" in file.read_text(encoding="utf-8"):
            return load_preset(file)
    return None


def open_tokenizer(path: Path) -> Tokenizer:
    """Return the text tokenizer of a model."""
    return load_text_tokenizer(str(path / "model" if (path / "model" / "tokenizer.json").is_file() else path))


def questions_to(path: Path, overrides: Sequence[str]) -> EvaluateConfig:
    """Return what a model is asked: the task and size that its run was trained on, changed by overrides.

    A model that no fine-tuning run left behind is asked the defaults.
    """
    config = EvaluateConfig()
    if (path / "config.yaml").is_file() and "curriculum" in (path / "config.yaml").read_text(encoding="utf-8"):
        run = load_preset(path / "config.yaml", schema=FinetuneConfig)
        config = EvaluateConfig(task=run.task, size=run.curriculum[-1].size, seed=run.seed)
    return override(config, overrides, origin="evaluate")


def _check_weights(folder: Path, loaded: dict[str, Any]) -> None:
    """Refuse what transformers would draw at random or drop; tied weights, stored once, it does not count."""
    problems = [f"no {name}" for name in sorted(loaded["missing_keys"])]
    problems += [
        f"{name} of {tuple(found)}, not {tuple(own)}" for name, found, own in sorted(loaded["mismatched_keys"])
    ]
    problems += [f"{name}, which the model lacks" for name in sorted(loaded["unexpected_keys"])]
    if problems:
        raise CheckpointError(
            str(folder),
            expected="the weights that its config.json describes",
            found=problems[0],
            remedy="use another checkpoint",
        )


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Keep the progress bar and the report of the loading off standard error: what is wrong is raised."""
    bar_was_shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar_was_shown:
            logging.enable_progress_bar()
