"""Baselines that need more than a config: other attentions, and models that were trained elsewhere.

Each kind of attention has its own config class and `model_type`, registered with transformers' Auto classes like the
model itself, so a saved one loads after `import metatokens`. Unlike the model's, its code is not saved with it.
"""

# the modules and not the package metatokens.model: transformers' auto classes may be imported in the middle of that
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from metatokens.baselines.landmark import LandmarkConfig, LandmarkForCausalLM, LandmarkModel
from metatokens.baselines.masks import SparseAttentionConfig, SparseAttentionForCausalLM, SparseAttentionModel
from metatokens.baselines.recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM, BlockRecurrentModel
from metatokens.model.compatibility import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

for _config, _decoder, _model in (
    (LandmarkConfig, LandmarkModel, LandmarkForCausalLM),
    (BlockRecurrentConfig, BlockRecurrentModel, BlockRecurrentForCausalLM),
    (SparseAttentionConfig, SparseAttentionModel, SparseAttentionForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _decoder, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _model.__name__  # for Trainer's label smoothing

__all__ = [
    "BlockRecurrentConfig",
    "BlockRecurrentForCausalLM",
    "BlockRecurrentModel",
    "LandmarkConfig",
    "LandmarkForCausalLM",
    "LandmarkModel",
    "SparseAttentionConfig",
    "SparseAttentionForCausalLM",
    "SparseAttentionModel",
]
