"""Open the model and the tokenizer in a run folder, a checkpoint, a model folder, or a model of the hub.

A model of another package, as GPT-Neo or what its fine-tuning has left, opens as an arm: see
`metatokens.baselines.pretrained`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, logging

from metatokens.baselines.pretrained import PretrainedCausalLM, build_pretrained_on_meta_device, load_pretrained
from metatokens.config.analysis import AnalysisConfig, TaskSubject, TextSubject
from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig
from metatokens.config.loading import load_preset, override
from metatokens.config.schema import ModelConfig, PretrainConfig
from metatokens.data.tokenizer import load_text_tokenizer, text_vocab_size
from metatokens.errors import CheckpointError, UsageError
from metatokens.training.checkpoint import verify_model

# what a config.json with a wrong value, or weights of another shape, end in somewhere inside of transformers
_DOES_NOT_LOAD = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(StrictDataclassError, SafetensorError),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# of a repository what opens a model: no weights but safetensors, nothing in folders
_OPENED = ["*.json", "*.safetensors", "merges.txt"]
_LONGEST_CAUSE = 300


def model_folder(path: Path) -> Path:
    """Return the folder of the model: `model/` of a run, the folder itself, or where a model of the hub is cached.

    `owner/name` is an id on the hub only where no folder `owner` is here, so a run that is spelt wrong is not sought
    there.

    Raises:
        CheckpointError: if there is no config.json, or no such model on the hub or in its cache.
    """
    folder = path / "model" if (path / "model" / "config.json").is_file() else path
    if _HUB_ID.fullmatch(str(path)) and not path.parent.exists():
        folder = _hub_folder(str(path))
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            str(path),
            expected="a folder with config.json",
            found="none",
            remedy="name a run, its model/ or a checkpoint",
        )
    return folder


def _hub_folder(name: str) -> Path:
    try:
        with _silent_transformers():  # the bars of the hub, too
            return Path(snapshot_download(name, allow_patterns=_OPENED, ignore_patterns="*/*"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            name,
            expected="a folder, or a model on the Hugging Face hub or in its cache",
            found=f"neither ({type(error).__name__})",
            remedy="check the spelling and the connection",
        ) from None


def open_model(path: Path, *, seed: int = 0) -> Any:
    """Return a model in evaluation mode: of this package, or any causal language model of transformers as an arm.

    Args:
        path: a run, model or checkpoint folder, or an id on the hub.
        seed: of the rows of meta-token and padding, where the model has none yet.

    Raises:
        CheckpointError: if there is none, a file is not what its manifest says, it does not load, or its weights are
            not those that its config.json describes, to the name and shape of each.
    """
    folder = model_folder(path)
    verify_model(folder)
    if not is_ours(folder):
        vocab_size = text_vocab_size(open_tokenizer(folder))
        with _one_line_errors(folder, "a causal language model in safetensors"):
            return load_pretrained(folder, text_vocab_size=vocab_size, seed=seed, local_files_only=True).eval()
    with _one_line_errors(folder):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _check_weights(folder, loaded)
    return model.eval()


def outline_arm(path: Path) -> PretrainedCausalLM:
    """Return a model of another package as `open_model` does, without its weights, on the meta device.

    Raises:
        CheckpointError: if there is none, or its config does not load.
    """
    folder = model_folder(path)
    vocab_size = text_vocab_size(open_tokenizer(folder))
    with _one_line_errors(folder, "a causal language model in safetensors"):
        return build_pretrained_on_meta_device(folder, text_vocab_size=vocab_size)


def is_ours(path: Path) -> bool:
    """Tell whether a model is of this package.

    Raises:
        CheckpointError: if there is no model, or its config.json is no JSON.
    """
    folder = model_folder(path)
    with _one_line_errors(folder):
        return str(json.loads((folder / "config.json").read_text()).get("model_type")).startswith("metatokens")


def open_config(path: Path) -> Any:
    """Return the Hugging Face config of a model of this package.

    Raises:
        CheckpointError: if there is none, or it does not load.
    """
    folder = model_folder(path)
    ours = is_ours(folder)
    with _one_line_errors(folder):
        if not ours:
            raise ValueError("a model_type of another package")
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
    folder = path / "model" if (path / "model" / "tokenizer.json").is_file() else path
    return load_text_tokenizer(str(folder if folder.exists() else model_folder(path)))


def evaluation_config_of(path: Path, overrides: Sequence[str]) -> EvaluateConfig:
    """Return what a model is asked: the task, the size and the test of its run, changed by overrides.

    A model that no fine-tuning run left behind is asked the defaults.
    """
    config = EvaluateConfig()
    run = _finetuning_of(path)
    if run is not None:
        config = EvaluateConfig(task=run.task, size=run.curriculum[-1].size, seed=run.seed, **run.test.model_dump())
    return override(config, overrides, origin="evaluate")


def analysis_config_of(path: Path, text: str | None, overrides: Sequence[str]) -> AnalysisConfig:
    """Return what is analysed of a model: a text, or the last stage of its run's recall task; changed by overrides.

    Raises:
        UsageError: neither a text nor a fine-tuning run.
    """
    subject: TextSubject | TaskSubject
    if text is not None:
        limit = getattr(open_config(path), "max_sequence_length", None) if is_ours(path) else None
        window = TextSubject.model_fields["window"].default
        subject = TextSubject(source=text, window=min(window, limit or window))
    else:
        run = _finetuning_of(path)
        if run is None:
            raise UsageError(
                str(path),
                expected="the run folder of a recall task, or --text",
                found="neither",
                remedy="name a text, for example --text python-docs",
            )
        subject = TaskSubject(task=run.task, difficulty=run.curriculum[-1].difficulty)
    return override(AnalysisConfig(subject=subject), overrides, origin="analyze")


def _finetuning_of(path: Path) -> FinetuneConfig | None:
    file = path / "config.yaml"
    if file.is_file() and "curriculum" in file.read_text(encoding="utf-8"):
        return load_preset(file, schema=FinetuneConfig)
    return None


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
def _one_line_errors(folder: Path, expected: str = "a model of this package") -> Iterator[None]:
    """Load something of a folder silently; what does not load is one line."""
    try:
        with _silent_transformers():
            yield
    except _DOES_NOT_LOAD as error:
        text = str(error)
        raise CheckpointError(
            str(folder),
            expected=expected,
            # transformers may list all that it knows
            found=f"{type(error).__name__}: {text if len(text) <= _LONGEST_CAUSE else text[:_LONGEST_CAUSE] + '...'}",
            remedy="use another checkpoint",
        ) from None


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
