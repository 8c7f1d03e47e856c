"""Starting: it loads the weights that a training continues from, and identifies them for a later resume."""

from pathlib import Path
from typing import Any

from metatokens.config.extension import EXTENDABLE
from metatokens.config.schema import ModelConfig
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import DataError, UsageError
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.storage import file_sha256
from metatokens.training.checkpoint import WEIGHTS, load_weights, verify_model
from metatokens.training.loading import ModelFolder

# settings that a training may change without changing what the weights mean; the base of rope_parameters must stay
_MAY_CHANGE = {
    "max_position_embeddings",
    "rope_parameters",
    "attention_dropout",
    "hidden_dropout",
    "initializer_range",
    "loss_policy",
    "memory",
}


def load_start(
    folder: ModelFolder, model: MetaTokenForCausalLM, config: ModelConfig, *, share: tuple[int, int] = (0, 1)
) -> str:
    """Load the weights of a folder into `model`, which was built from `config`, and return their SHA-256.

    Args:
        folder: of the weights.
        model: takes them.
        config: that `model` was built from.
        share: index and number of the processes that divide the verification among them.

    Raises:
        UsageError: if the weights are of a model of another shape, or their table of learned positions would have to
            change its length.
        CheckpointError: if there is no model, it is damaged, or a tensor does not fit.
    """
    digests = verify_model(folder.path, share=share)
    path, start = folder.name, folder.config
    reads_by_blocks = config.attention.kind == "blockwise" and start.model_type == MetaTokenConfig.model_type
    if start.model_type != model.config.model_type and not reads_by_blocks:
        raise UsageError(
            "model.attention",
            expected=f"that of {path}, a {start.model_type}",
            found=model.config.model_type,
            remedy="take the attention of the trained model",
        )
    _check_shape(path, start, config)
    load_weights(folder.path, model)
    if WEIGHTS in digests:
        return digests[WEIGHTS]
    whole = folder.path / WEIGHTS
    return file_sha256(whole) if whole.exists() else folder.sha256


def check_tokenizer(folder: ModelFolder, tokenizer_sha256: str, tokens: Path | None) -> None:
    """Compare the tokenizer of the weights with the tokenizer of the tokens.

    Raises:
        DataError: if they differ.
    """
    found = TextEncoder(folder.tokenizer).sha256
    if found != tokenizer_sha256:
        raise DataError(
            f"tokenizer of {tokens}",
            expected=f"that of {folder.name}, SHA-256 {found[:12]}...",
            found=f"{tokenizer_sha256[:12]}...",
            remedy=f"prepare the text with --tokenizer {folder.name}",
        )


def _check_shape(path: Path, start: Any, config: ModelConfig) -> None:
    """Compare the shape of the weights' model with that of a run, except for the settings that may change."""
    window, rows = config.max_position_embeddings, start.max_position_embeddings
    if start.position_encoding == config.position_encoding == "learned" and window != rows:
        raise UsageError(
            "model.max_position_embeddings",
            expected=f"the {rows} learned positions of {path}",
            found=str(window),
            remedy=f"take that number; only {EXTENDABLE} can be extended",
        )
    fields = config.to_hf(start.meta_token_id, start.eos_token_id)
    may_change = _MAY_CHANGE | ({"attention_pattern"} if start.model_type == MetaTokenConfig.model_type else set())
    pairs = {key: (getattr(start, key, None), fields[key]) for key in fields.keys() - may_change}
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
