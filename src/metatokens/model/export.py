"""Write a model so that it loads anywhere: with this package, or as remote code where it is not installed.

Everything that saves a model also saves its config, so the config writes the code too: under `save_pretrained`,
`push_to_hub`, a Trainer's checkpoints and a merged adapter, and for a model that was itself loaded as remote code.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import logging

if TYPE_CHECKING:
    from .modeling import MetaTokenForCausalLM

REMOTE_CODE = (
    "attention",
    "block",
    "cache",
    "compatibility",
    "configuration",
    "cross_attention",
    "export",
    "generation",
    "heads",
    "loss",
    "masks",
    "memory",
    "memory_cache",
    "memory_compact",
    "memory_pooled",
    "meta_attention",
    "modeling",
    "outputs",
    "position_bias",
    "position_range",
    "position_scores",
    "positions",
    "schedule",
    "thoughts",
)
CUSTOM_GENERATE = Path("custom_generate") / "generate.py"
"""Where transformers looks for a `generate` that comes with a checkpoint."""
AUTO_MAP = {
    "AutoConfig": "configuration.MetaTokenConfig",
    "AutoModel": "modeling.MetaTokenModel",
    "AutoModelForCausalLM": "modeling.MetaTokenForCausalLM",
    "AutoModelForSequenceClassification": "heads.MetaTokenForSequenceClassification",
    "AutoModelForTokenClassification": "heads.MetaTokenForTokenClassification",
    "AutoModelForQuestionAnswering": "heads.MetaTokenForQuestionAnswering",
}


def copy_code(folder: Path) -> None:
    """Copy the files of the model's code into a folder, which may be new."""
    # transformers brings the files that it finds imported, and nothing else imports this one
    from .heads import MetaTokenForSequenceClassification as _  # noqa: F401

    folder.mkdir(parents=True, exist_ok=True)
    for name in REMOTE_CODE:
        _copy(Path(__file__).with_name(f"{name}.py"), folder / f"{name}.py")
    (folder / CUSTOM_GENERATE).parent.mkdir(exist_ok=True)
    _copy(Path(__file__).with_name("schedule.py"), folder / CUSTOM_GENERATE)


def _copy(source: Path, target: Path) -> None:
    """Copy a file; a link in its place is replaced."""
    if target.is_symlink():
        target.unlink()
    shutil.copyfile(source, target)


def save_model(
    model: "MetaTokenForCausalLM", path: Path, tokenizer: Any = None, *, weights: dict[str, Tensor] | None = None
) -> None:
    """Save weights (safetensors), configs, tokenizer and the model's code into the folder `path`.

    `AutoModelForCausalLM.from_pretrained(path)` then needs `import metatokens` or `trust_remote_code=True`. The models
    of `metatokens.baselines` are saved without code and need the import. The tokenizer learns the model's window.

    Args:
        model: the model.
        path: the folder; it may be new.
        tokenizer: saved beside it, unless None.
        weights: saved in place of the model's own, such as a copy of earlier ones.

    Raises:
        ValueError: the folder holds a link, as the hub's cache does; transformers would write through it.
    """
    if links := sorted(entry for entry in Path(path).glob("*") if entry.is_symlink()):
        raise ValueError(f"{links[0]} is a link, and saving would change what it points to; save into another folder")
    bar_was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would break up the training's own
    try:
        model.save_pretrained(path, state_dict=weights)
    finally:
        if bar_was_shown:
            logging.enable_progress_bar()
    _save_tokenizer(model, path, tokenizer)


def save_configs(model: "MetaTokenForCausalLM", path: Path, tokenizer: Any = None) -> None:
    """Save what `save_model` does except for the weights."""
    model.config.architectures = model.config.architectures or [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(path)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(path)
    _save_tokenizer(model, path, tokenizer)


def _save_tokenizer(model: "MetaTokenForCausalLM", path: Path, tokenizer: Any) -> None:
    if tokenizer is not None:
        # a config of another package states its window under this name, if at all
        window = getattr(model.config, "trained_window", getattr(model.config, "max_position_embeddings", None))
        if window is not None:
            tokenizer.model_max_length = window
        tokenizer.save_pretrained(path)
