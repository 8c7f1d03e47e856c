"""From a run's `ModelConfig` to the Hugging Face config and the class of its model, whatever its attention."""

from metatokens.baselines.landmark import LandmarkConfig, LandmarkForCausalLM
from metatokens.baselines.masks import SparseAttentionConfig, SparseAttentionForCausalLM
from metatokens.baselines.recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from metatokens.config.schema import ModelConfig
from metatokens.model.configuration import MetaTokenConfig
from metatokens.model.modeling import MetaTokenForCausalLM

CONFIG_CLASSES: dict[str, type[MetaTokenConfig]] = {
    "full": MetaTokenConfig,
    "memory": MetaTokenConfig,
    "sliding_window": SparseAttentionConfig,
    "blockwise": SparseAttentionConfig,
    "longformer": SparseAttentionConfig,
    "bigbird": SparseAttentionConfig,
    "block_recurrent": BlockRecurrentConfig,
    "landmark": LandmarkConfig,
}
"""Config class of each `model.attention.kind`."""
MODEL_CLASSES: dict[str, type[MetaTokenForCausalLM]] = {
    MetaTokenConfig.model_type: MetaTokenForCausalLM,
    SparseAttentionConfig.model_type: SparseAttentionForCausalLM,
    BlockRecurrentConfig.model_type: BlockRecurrentForCausalLM,
    LandmarkConfig.model_type: LandmarkForCausalLM,
}
"""Model class of each `model_type` of this package."""


def build_config(model: ModelConfig, *, text_vocab_size: int, eos_token_id: int) -> MetaTokenConfig:
    """Return the Hugging Face config of `model` for a text vocabulary."""
    return CONFIG_CLASSES[model.attention.kind](**model.to_hf(text_vocab_size, eos_token_id))
