"""Start a training from weights that are there already, and know them again when it is resumed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from metatokens.config.extension import EXTENDABLE
from metatokens.config.schema import ModelConfig
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import DataError, UsageError
from metatokens.model import MetaTokenForCausalLM
from metatokens.storage import file_sha256, json_sha256
from metatokens.training.checkpoint import WEIGHTS, load_weights, verify_model
from metatokens.training.loading import model_folder, open_config, open_tokenizer

# what a training may change without changing what the weights mean; of rope_parameters the base stays
_MAY_CHANGE = {
    "max_position_embeddings",
    "rope_parameters",
    "attention_dropout",
    "hidden_dropout",
    "initializer_range",
    "loss_policy",
}


def load_start(path: Path, model: MetaTokenForCausalLM, config: ModelConfig) -> str:
    """Put the weights in a run, model or checkpoint folder into `model`, made of `config`, and return their SHA-256.

    Raises:
        UsageError: if the model's shape is not that of the weights, or their table of learned positions would have to
            grow.
        CheckpointError: if there is no model, it is damaged, or a tensor does not fit.
    """
    folder = model_folder(path)
    verify_model(folder)
    start = open_config(path)
    if start.model_type != model.config.model_type:
        raise UsageError(
            "model.attention",
            expected=f"that of {path}, a {start.model_type}",
            found=model.config.model_type,
            remedy="take the attention of the trained model",
        )
    _check_shape(path, start, config)
    load_weights(folder, model)
    return file_sha256(folder / WEIGHTS)


def model_sha256(folder: Path) -> str:
    """Return the identity of the model in a folder: its config but for the version that wrote it, and its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    whole = folder / WEIGHTS
    files = [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))
    parts = [json_sha256(config), *map(file_sha256, files)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def check_tokenizer(path: Path, tokenizer_sha256: str, tokens: Path | None) -> None:
    """Compare the tokenizer beside the weights with that of the tokens.

    Raises:
        DataError: if they are not the same.
    """
    found = TextEncoder(open_tokenizer(path)).sha256
    if found != tokenizer_sha256:
        raise DataError(
            f"tokenizer of {tokens}",
            expected=f"that of {path}, SHA-256 {found[:12]}...",
            found=f"{tokenizer_sha256[:12]}...",
            remedy=f"prepare the text with --tokenizer {path}",
        )


def _check_shape(path: Path, start: Any, config: ModelConfig) -> None:
    """Compare the model of the weights with that of a run, but for what may change."""
    window, rows = config.max_position_embeddings, start.max_position_embeddings
    if start.position_encoding == config.position_encoding == "learned" and window != rows:
        raise UsageError(
            "model.max_position_embeddings",
            expected=f"the {rows} learned positions of {path}",
            found=str(window),
            remedy=f"what can be extended is {EXTENDABLE}",
        )
    fields = config.to_hf(start.meta_token_id, start.eos_token_id)
    pairs = {key: (getattr(start, key, None), fields[key]) for key in fields.keys() - _MAY_CHANGE}
    if config.has_rotation:
        pairs["rope_theta"] = ((start.rope_parameters or {}).get("rope_theta"), config.rope_theta)
    for key, (old, new) in sorted(pairs.items()):
        if old != new:
            raise UsageError(
                f"model.{key}",
                expected=f"{old!r} as in {path}",
                found=repr(new),
                remedy="take the value of the trained model, as `metatokens extend` does",
            )
