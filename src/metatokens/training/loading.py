"""Loading: it opens the model and the tokenizer of a run folder, a checkpoint, a model folder or a model of the hub.

A model of another package, such as GPT-Neo or a fine-tuned one, opens as an arm: see `metatokens.baselines.pretrained`.
Paths and configs of runs are read without torch, so that a command refuses a wrong one at once.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from metatokens.config.analysis import AnalysisConfig, GraftSubject, TaskSubject, TextSubject
from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig
from metatokens.config.graft import GRAFT_FILE
from metatokens.config.loading import load_preset, override
from metatokens.config.schema import ModelConfig, PretrainConfig
from metatokens.errors import CheckpointError, UsageError
from metatokens.storage import file_sha256, json_sha256
from metatokens.training.untrusted import OPENED, WEIGHT_SHARDS, check_files, read_config, weight_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LONGEST_CAUSE = 300
_NOT_OF_AN_ARM = {"transformers_version", "dtype", "torch_dtype", "_name_or_path"}


class ModelFolder:
    """A run, model or checkpoint folder, or a model of the hub; each attribute is read once, at its first use.

    `owner/name` is an id on the hub only if there is no folder `owner` here, so a misspelt run is not looked up there.

    Every attribute except `name` and the configs of the run raises CheckpointError if there is no model or it does not
    load.
    """

    def __init__(self, name: Path) -> None:
        """Take the name that the user gave; nothing is opened yet."""
        self.name = name

    def check_path(self) -> None:
        """Raise CheckpointError if there is no model with a readable config; a model of the hub is looked for there."""
        self._config_json  # noqa: B018 - found and kept for later use

    @cached_property
    def path(self) -> Path:
        """The folder of config.json: a run's `model/`, the folder itself, or the cache of a model of the hub."""
        folder = self.name / "model" if (self.name / "model" / "config.json").is_file() else self.name
        if _HUB_ID.fullmatch(str(self.name)) and not self.name.parent.exists():
            folder = _hub_folder(str(self.name))
        if not (folder / "config.json").is_file():
            newest = max((self.name / "checkpoints").glob("step-*"), default=None)
            if newest is None and (self.name / "checkpoints").is_dir():
                raise CheckpointError(
                    str(self.name),
                    expected="a run with a checkpoint",
                    found="none: this run has no checkpoint yet",
                    remedy="wait for its first, or start the same training command again",
                )
            raise CheckpointError(
                str(self.name),
                expected="a folder with config.json",
                found="a run that has not ended"
                if newest
                else "none"
                if self.name.exists()
                else "nothing of that name",
                remedy="name a run, its model/ or a checkpoint" if newest is None else f"name its checkpoint {newest}",
            )
        check_files(folder)
        return folder

    @cached_property
    def is_ours(self) -> bool:
        """Whether this package made the model."""
        from metatokens.baselines.building import MODEL_CLASSES

        return str(self._config_json.get("model_type")) in MODEL_CLASSES

    @cached_property
    def is_grafted(self) -> bool:
        """Whether a graft lies in the folder, alone or beside its base."""
        return (self.path / GRAFT_FILE).is_file()

    def refuse_graft(self, work: str) -> None:
        """Raise UsageError if the folder holds a graft, which some work of this package does not take."""
        if self.is_grafted:
            raise UsageError(
                str(self.name),
                expected=f"a model that is not grafted, for {work}",
                found="a graft",
                remedy="name its base, or another model",
            )

    @cached_property
    def config(self) -> Any:
        """The Hugging Face config of a model of this package."""
        from transformers import AutoConfig

        ours = self.is_ours
        with _one_line_errors(self.path):
            if not ours:
                raise ValueError("a model_type of another package")
            return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)

    @cached_property
    def shape(self) -> ModelConfig:
        """The model in the form that a run's config has."""
        try:
            return ModelConfig.from_hf(self.config.to_dict())
        except ValidationError as error:
            problem = error.errors()[0]
            raise CheckpointError(
                str(self.path / "config.json"),
                expected="a model that a run of this package has made",
                found=f"{'.'.join(str(key) for key in problem['loc'])}: {problem['msg']}",
                remedy="use another checkpoint",
            ) from None

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The text tokenizer beside the model."""
        from metatokens.data.tokenizer import load_text_tokenizer

        return load_text_tokenizer(str(self.path))

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids that the tokenizer of another package's model puts before every text, such as a first token."""
        from transformers import AutoTokenizer

        from metatokens.data.tokenizer import prefix_ids

        if self.is_ours or not (self.path / "tokenizer_config.json").is_file():
            return ()
        with _one_line_errors(self.path, "a tokenizer"):
            whole = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        return prefix_ids(whole)

    @cached_property
    def sha256(self) -> str:
        """The identity of the model: a digest of its weights and its config, without the version of transformers."""
        config = {key: value for key, value in self._config_json.items() if key != "transformers_version"}
        files = [*weight_files(self.path), *([self.path / GRAFT_FILE] if self.is_grafted else [])]
        parts = [json_sha256(config), *map(file_sha256, files)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    @cached_property
    def pretraining(self) -> PretrainConfig | None:
        """The config of the pre-training run that the folder is, or that its model or checkpoint belongs to.

        None if there is no config.yaml, or if it belongs to another kind of run, whose blocks are not fixed.
        """
        file = self._run_config("\ninjection:")
        return None if file is None else load_preset(file)

    @cached_property
    def finetuning(self) -> FinetuneConfig | None:
        """The config of the run on a recall task that the folder is, or that its model or checkpoint belongs to."""
        file = self._run_config("\ncurriculum:")
        return None if file is None else load_preset(file, schema=FinetuneConfig)

    def _run_config(self, mark: str) -> Path | None:
        """Return the config.yaml of the folder's run, if it holds the mark of its kind of run."""
        folder = self.name.absolute()
        above = folder.parent if folder.name == "model" else folder.parent.parent
        for file in (folder / "config.yaml", above / "config.yaml"):
            if file.is_file() and mark in file.read_text(encoding="utf-8"):
                return file
        return None

    def open_model(self, *, seed: int = 0) -> Any:
        """Return the model in evaluation mode; one of another package opens as an arm, a graft upon its base.

        Args:
            seed: of the embedding rows of meta-token and padding, if the model lacks them.

        Raises:
            CheckpointError: if there is no model, a file differs from its manifest, the model does not load, or the
                names and shapes of its weights differ from those that its config.json describes.
        """
        from transformers import AutoModelForCausalLM

        from metatokens.baselines.pretrained import load_pretrained
        from metatokens.data.tokenizer import text_vocab_size
        from metatokens.training.checkpoint import load_weights, verify_model

        verify_model(self.path)
        if self.is_grafted:
            with _one_line_errors(self.path, "a graft whose base opens"):
                return self._open_grafted()
        if any(self.path.glob(WEIGHT_SHARDS)):
            model = self._build()
            load_weights(self.path, model)
            return model.eval()
        if not self.is_ours:
            vocab_size = text_vocab_size(self.tokenizer)
            with _one_line_errors(self.path, "a causal language model in safetensors"):
                return load_pretrained(self.path, text_vocab_size=vocab_size, seed=seed, local_files_only=True).eval()
        with _one_line_errors(self.path):
            model, loaded = AutoModelForCausalLM.from_pretrained(
                self.path,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        _check_weights(self.path, loaded)
        return model.eval()

    def build_on_meta_device(self) -> Any:
        """Return the model as `open_model` does, without its weights, on the meta device.

        Raises:
            CheckpointError: if there is no model, or its config does not load.
        """
        import torch

        from metatokens.baselines.pretrained import build_pretrained_on_meta_device
        from metatokens.data.tokenizer import text_vocab_size

        if self.is_ours:
            with torch.device("meta"):
                return self._build()
        vocab_size = text_vocab_size(self.tokenizer)
        with _one_line_errors(self.path, "a causal language model in safetensors"):
            return build_pretrained_on_meta_device(self.path, text_vocab_size=vocab_size)

    def _open_grafted(self) -> Any:
        """Return the grafted model under the call of an arm: it puts its meta-tokens into a text by itself."""
        from metatokens.baselines.pretrained import PretrainedCausalLM
        from metatokens.graft import load_graft
        from metatokens.model.schedule import NoSchedule, state_schedule

        model = load_graft(self.path)
        model.config.meta_token_id, model.config.loss_policy = None, "skip"  # none of its ids is one
        state_schedule(model.generation_config, NoSchedule())
        return PretrainedCausalLM(model).eval()

    def open_plain(self, dtype: Any) -> Any:
        """Return a model of another package as it came, in evaluation mode, without a meta-token.

        Raises:
            CheckpointError: as for `open_model`.
        """
        from metatokens.baselines.pretrained import load_plain
        from metatokens.training.checkpoint import verify_model

        verify_model(self.path)
        with _one_line_errors(self.path, "a causal language model in safetensors"):
            return load_plain(self.path, local_files_only=True, dtype=dtype).eval()

    def build_plain_on_meta_device(self, dtype: Any) -> Any:
        """Return the model as `open_plain` does, without its weights, on the meta device."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with _one_line_errors(self.path, "a causal language model"), torch.device("meta"):
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)

    def _build(self) -> Any:
        """Return a new model of this shape, whose weights are still to be loaded."""
        import torch
        from transformers import AutoModelForCausalLM

        config = self.config
        with torch.random.fork_rng(devices=[]):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    @cached_property
    def _config_json(self) -> dict[str, Any]:
        return read_config(self.path)


def open_model(path: Path, *, seed: int = 0) -> Any:
    """Return the model of a folder or of the hub; see `ModelFolder.open_model`."""
    return ModelFolder(path).open_model(seed=seed)


def evaluation_config_of(folder: ModelFolder, overrides: Sequence[str]) -> EvaluateConfig:
    """Return the config to evaluate a model with: the task, size and test of its run, changed by overrides.

    Raises:
        UsageError: the model has no run on a recall task, and no override names one.
    """
    config = EvaluateConfig()
    if folder.finetuning is None and not any(text.startswith("--task") for text in overrides):
        raise UsageError(
            str(folder.name),
            expected="the run folder of a recall task, or --task.kind",
            found="neither",
            remedy="name a task, for example --task.kind copying",
        )
    if run := folder.finetuning:
        config = EvaluateConfig(task=run.task, size=run.curriculum[-1].size, seed=run.seed, **run.test.model_dump())
    return override(config, overrides, origin="evaluate")


def check_one_arm(folders: Sequence[ModelFolder]) -> None:
    """Refuse models that are not training seeds of one arm.

    Raises:
        UsageError: two of them differ in their config or their tokenizer.
    """
    first, *others = folders
    for other in others:
        ours, theirs = (
            {key: value for key, value in folder._config_json.items() if key not in _NOT_OF_AN_ARM}
            for folder in (first, other)
        )
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if not differing and first.tokenizer.to_str() != other.tokenizer.to_str():
            differing = ["tokenizer"]
        if differing:
            raise UsageError(
                str(other.name),
                expected=f"a training seed of the same model as {first.name}",
                found=f"another {differing[0]}",
                remedy="evaluate models of different arms one by one",
            )


def analysis_config_of(folder: ModelFolder, text: str | None, overrides: Sequence[str]) -> AnalysisConfig:
    """Return the config to analyse a model on a text or on the last stage of its recall task, changed by overrides.

    Raises:
        UsageError: if there is neither a text nor a fine-tuning run.
    """
    subject: TextSubject | TaskSubject | GraftSubject
    if folder.is_grafted:
        if text is None:
            raise UsageError(str(folder.name), expected="--text, for a graft", found="none", remedy="name a text")
        from transformers import AutoConfig

        base = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        limit = base.max_position_embeddings
        subject = GraftSubject(source=text, window=min(GraftSubject.model_fields["window"].default, limit))
    elif text is not None:
        limit = getattr(folder.config, "max_sequence_length", None) if folder.is_ours else None
        window = TextSubject.model_fields["window"].default
        subject = TextSubject(source=text, window=min(window, limit or window))
    elif run := folder.finetuning:
        subject = TaskSubject(task=run.task, difficulty=run.curriculum[-1].difficulty)
    else:
        raise UsageError(
            str(folder.name),
            expected="the run folder of a recall task, or --text",
            found="neither",
            remedy="name a text, for example --text python-docs",
        )
    return override(AnalysisConfig(subject=subject), overrides, origin="analyze")


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with _silent_transformers():  # this silences the hub's progress bars too
            return Path(snapshot_download(name, allow_patterns=OPENED, ignore_patterns="*/*"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            name,
            expected="a folder, or a model on the Hugging Face hub or in its cache",
            found=f"neither ({type(error).__name__})",
            remedy="check the spelling and the connection",
        ) from None


def _check_weights(folder: Path, loaded: dict[str, Any]) -> None:
    """Refuse missing, mismatched and unexpected weights, which transformers would draw at random or drop.

    Tied weights are stored once; transformers does not count their second name as missing.
    """
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
    """Load something of a folder silently; a failure becomes a CheckpointError of one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # what transformers raises for a wrong value in config.json, or for weights of another shape
    do_not_load = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
    try:
        with _silent_transformers():
            yield
    except UsageError:  # a ValueError that is one line already
        raise
    except (*do_not_load, StrictDataclassError, SafetensorError) as error:
        text = str(error)
        raise CheckpointError(
            str(folder),
            expected=expected,
            # transformers may list every model type that it knows
            found=f"{type(error).__name__}: {text if len(text) <= _LONGEST_CAUSE else text[:_LONGEST_CAUSE] + '...'}",
            remedy="use another checkpoint",
        ) from None


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Keep transformers' progress bar and loading report off standard error; errors are still raised."""
    from transformers import logging

    bar_was_shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar_was_shown:
            logging.enable_progress_bar()
