"""Write a model so that it loads anywhere: with this package, or as remote code where it is not installed."""

import shutil
from pathlib import Path
from typing import Any

from transformers import logging

from .configuration import MetaTokenConfig
from .modeling import MetaTokenForCausalLM

REMOTE_CODE = (
    "attention",
    "cache",
    "compatibility",
    "configuration",
    "generation",
    "heads",
    "loss",
    "masks",
    "meta_attention",
    "modeling",
    "outputs",
    "positions",
)
AUTO_MAP = {
    "AutoConfig": "configuration.MetaTokenConfig",
    "AutoModel": "modeling.MetaTokenModel",
    "AutoModelForCausalLM": "modeling.MetaTokenForCausalLM",
    "AutoModelForSequenceClassification": "heads.MetaTokenForSequenceClassification",
    "AutoModelForTokenClassification": "heads.MetaTokenForTokenClassification",
    "AutoModelForQuestionAnswering": "heads.MetaTokenForQuestionAnswering",
}


def save_model(model: MetaTokenForCausalLM, path: Path, tokenizer: Any = None) -> None:
    """Save weights (safetensors), configs, tokenizer and the model's code into the folder `path`.

    `AutoModelForCausalLM.from_pretrained(path)` then needs `import metatokens` or `trust_remote_code=True`. The models
    of `metatokens.baselines` are saved without code and need the import.
    """
    travels = type(model.config) is MetaTokenConfig
    # transformers writes this attribute as it stands; its own helper would leave AutoModel out
    if travels:
        model.config.auto_map = dict(AUTO_MAP)
    bar_was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would tear the training's own
    try:
        model.save_pretrained(path)
    finally:
        if bar_was_shown:
            logging.enable_progress_bar()
    for name in REMOTE_CODE if travels else ():
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), path / f"{name}.py")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
