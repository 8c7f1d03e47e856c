"""From a run's `ModelConfig` to the Hugging Face config and the class of its model, whatever its attention."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from metatokens.baselines.landmark import LandmarkConfig, LandmarkForCausalLM
from metatokens.baselines.masks import SparseAttentionConfig, SparseAttentionForCausalLM
from metatokens.config.schema import ModelConfig
from metatokens.model.configuration import MetaTokenConfig
from metatokens.model.modeling import MetaTokenForCausalLM

CONFIG_CLASSES: dict[str, type[MetaTokenConfig]] = {
    "full": MetaTokenConfig,
    "sliding_window": SparseAttentionConfig,
    "longformer": SparseAttentionConfig,
    "bigbird": SparseAttentionConfig,
    "landmark": LandmarkConfig,
}
"""Config class of each `model.attention.kind`."""
MODEL_CLASSES: dict[str, type[MetaTokenForCausalLM]] = {
    MetaTokenConfig.model_type: MetaTokenForCausalLM,
    SparseAttentionConfig.model_type: SparseAttentionForCausalLM,
    LandmarkConfig.model_type: LandmarkForCausalLM,
}
"""Model class of each `model_type` of this package."""


def build_config(model: ModelConfig, *, text_vocab_size: int, eos_token_id: int) -> MetaTokenConfig:
    """Return the Hugging Face config of `model` for a text vocabulary."""
    return CONFIG_CLASSES[model.attention.kind](**model.to_hf(text_vocab_size, eos_token_id))


def load_model(folder: Path) -> MetaTokenForCausalLM:
    """Load a saved model of this package, whatever its attention, in evaluation mode.

    Raises:
        ValueError: if the folder holds a model of another `model_type`.
        OSError: if it holds none.
    """
    model_type = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if model_type not in MODEL_CLASSES:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(MODEL_CLASSES)}")
    model: MetaTokenForCausalLM = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model.eval()
    return model
